"""The fastest of several forms of a network, found within a time: the most promising first."""

import itertools
import sys
from typing import NamedTuple

from jaxcifar.errors import UserError
from jaxcifar.logs import Stopwatch


class Form(NamedTuple):
    """How PyTorch runs a network; mode: of torch.compile, None: eager."""

    layout: str  # NHWC or NCHW
    dtype: str
    mode: str | None = None

    def __str__(self):
        """Return for instance "compiled bfloat16 NHWC reduce-overhead"."""
        how = "compiled" if self.mode else "eager"
        mode = self.mode if self.mode not in (None, "default") else ""
        return f"{how} {self.dtype} {self.layout} {mode}".rstrip()


EAGER = tuple(itertools.starmap(Form, itertools.product(("NHWC", "NCHW"), ("bfloat16", "float32"))))
# With CUDA graphs first: uncaptured, the host starts small kernels slower than they run.
COMPILED = tuple(EAGER[0]._replace(mode=mode) for mode in ("reduce-overhead", "default"))


def forms(choice, compiled):
    """Yield the forms to try, the most promising first; the last ones depend on what won before.

    With `compiled` (on CUDA) bfloat16 in NHWC is compiled in any case: uncompiled, the time to
    start kernels hides what they take; then what is fastest uncompiled too. choice: the Choice that
    tries each form before it asks for the next.
    """
    if compiled:
        yield from (COMPILED[0], EAGER[0], COMPILED[1])
    yield from EAGER
    fastest = choice.fastest(eager=True)
    if compiled and fastest is not None:
        yield from (fastest._replace(mode=form.mode) for form in COMPILED)


class Choice:
    """What was tried so far, and how much time is left."""

    def __init__(self, seconds):
        """Start the clock; seconds: for all trials together, 0: as many as they take."""
        self._watch, self._limit = Stopwatch(), seconds
        self._longest = {}  # seconds of the longest trial: {whether compiled: seconds}
        self._times, self._tried, self._failed, self._untried = {}, set(), {}, set()

    def has_time(self, kind=None):
        """Return whether a trial as long as the longest of its kind would still end in time.

        kind: of a form, whether it is compiled; None: of something else.
        """
        return not self._limit or (
            self._watch.seconds() + self._longest.get(kind, 0.0) < self._limit)

    def run(self, forms, trial):
        """Try forms in their order; what has no time is left out, but for the first that works.

        forms: iterable of Form; one that was tried is not tried again. trial: function of a Form ->
        seconds of its steps; a form whose trial raises is out.
        """
        for form in forms:
            if form in self._times or form in self._failed:
                continue
            kind, watch = bool(form.mode), Stopwatch()
            if self._times and not self.has_time(kind):
                self._untried.add(form)
                continue
            try:
                self._times[form] = trial(form)
            except Exception as error:  # no C++ compiler, what cannot be compiled, no memory
                print(f"{form}: {error}", file=sys.stderr)
                self._failed[form] = error
            self._tried.add(form)
            self._longest[kind] = max(watch.seconds(), self._longest.get(kind, 0.0))

    def forget_times(self):
        """Keep no times: what comes is measured with larger batches."""
        self._times = {}

    def fastest(self, *, eager=False):
        """Return the fastest Form so far, or None; eager: of those without torch.compile."""
        return min((form for form in self._times if not (eager and form.mode)),
                   key=self._times.get, default=None)

    def best(self):
        """Return the fastest Form. Raises UserError where none worked."""
        if not self._times:
            raise UserError(f"no form worked: {list(self._failed.values())[-1]}")
        return self.fastest()

    def extent(self):
        """Return how far the search went: "best of 5 tried, 3 untried for the limit of 60 s, ..."."""
        parts = [f"best of {len(self._tried)} tried"]
        if self._untried:
            parts.append(f"{len(self._untried)} untried for the limit of {self._limit:.0f} s")
        if self._failed:
            parts.append(f"{len(self._failed)} failed")
        return ", ".join(parts)
