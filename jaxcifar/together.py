"""Several seeds of one configuration trained at once, in one compiled program (vmap of the state).

The data are shared; order, augmentation, dropout and parameters are each seed's own, so that a seed
trained here equals the same seed trained by `train.fit`, to float32 rounding. Every seed has an
ordinary run folder, which goes on here or there.

When it pays. Per seed and step, 3 seeds at once over one alone, batch 128, 2 CPU cores, JAX 0.10:
mlp_s 0.96 (1.07 with crop and flip), the same with hidden layers of 64 and 32 0.92, vit (depth 1)
1.06, cnn3 and a small resnet5m 1.04, resnet18 1.02, the small one with AutoAugment 1.25, since the
branches that AutoAugment skips are all computed. Every seed has convolutions of its own: as grouped
ones they took 2.0 (cnn3, resnet5m). So on CPU "auto" is one by one; on an accelerator both ways are
timed at the start, unless config.deterministic forbids that a timing decides.
"""

import contextlib
import copy
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcifar import features, logs, parallel, programs, selection, splits, train
from jaxcifar.errors import first_line
from jaxcifar.metrics import finalize
from jaxcifar.programs import Programs
from jaxcifar.report import run as run_report
from jaxcifar.run import Run
from jaxcifar.state import create_state
from jaxcifar.task import create_task

_TIMED_STEPS = "20"  # in one call, when the two ways are timed
_TIMED_CALLS = 3


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all seeds of a configuration have in common: sizes and functions, devices, data."""

    task: Any
    devices: Any
    arrays: Any
    train_data: Any
    held_out: Any


@dataclasses.dataclass
class Member:
    """One seed on its way: its run folder, its host state and its device state."""

    run: Any
    programs: Any  # of one seed alone; their task has this seed's configuration
    state: Any
    live: Any
    closed: bool = False

    @property
    def seed(self):
        """The seed."""
        return self.programs.task.config.seed

    @property
    def first_step(self):
        """The step of the epoch under way that comes next, from 0."""
        task = self.programs.task
        return int(self.state.step) - int(self.state.epoch) * task.steps_per_epoch

    def is_finished(self):
        """Return whether no epoch is left, or early stopping has ended the run."""
        return selection.is_over(self.state.history, int(self.state.epoch),
                                 self.programs.task.config)

    @contextlib.contextmanager
    def named(self):
        """Let a NonFiniteLoss in the `with` block close the run, and name the seed."""
        try:
            yield
        except train.NonFiniteLoss as error:
            self.close()
            raise named(self.seed, error) from error

    def check_finite(self):
        """Raise NonFiniteLoss as `train.check_finite`."""
        with self.named():
            train.check_finite(self.run, self.programs, self.live)

    def save(self, how=train.save):
        """Save the state by `how`, train.save or save_trained; raises NonFiniteLoss as they do."""
        with self.named():
            self.state = how(self.run, self.programs, self.live, self.state)

    def close(self):
        """Finish writing."""
        self.run.close()
        self.closed = True


class Prefixed:
    """A text stream on which every line begins with a prefix; a progress bar passes as it is."""

    def __init__(self, stream, prefix):
        self._stream, self._prefix, self._in_line = stream, prefix, False

    def write(self, text):
        """Write `text`, with the prefix before each of its lines."""
        if text.startswith("\r"):
            return self._stream.write(text)
        for line in text.splitlines(keepends=True):
            self._stream.write(line if self._in_line else self._prefix + line)
            self._in_line = not line.endswith("\n")
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def named(seed, error):
    """Return a NonFiniteLoss that says which seed `error` is of."""
    return train.NonFiniteLoss(f"seed {seed}: {error}")


def with_seed(config, seed):
    """Return a copy of a configuration with another seed."""
    config = copy.deepcopy(config)
    config.seed = seed
    return config


def prepare(config):
    """Load the data and build the functions that all seeds share.

    Raises:
      UserError: as `train.fit`.
    """
    devices, arrays = parallel.create(config), splits.load(config)
    task = create_task(config, len(arrays.train["labels"]), arrays.num_classes)
    train_data, held_out = devices.replicate((arrays.train, arrays.held_out))
    return Shared(task, devices, arrays, train_data, held_out)


def pays(shared, seeds, say):
    """Return whether training `seeds` (ints) together is the faster way; `say` a line of why.

    Not with features of a frozen backbone (jaxcifar.features), which `fit` here does not cache, nor
    on CPU, where it gains little or loses much (see the module). Elsewhere some steps of the first
    seed alone and of all seeds together are timed; what does not fit into the device's memory, or
    what XLA cannot compile, does not pay.
    """
    if not features.obstacle(shared.task):
        say("one by one: a frozen backbone's features are computed once, the rest is quick")
        return False
    if programs.runs_on_cpu(shared.devices):
        say("one by one: on CPU together takes 0.92 to 1.25 times as long (--seeds_together=yes does "
            "it all the same)")
        return False
    states = [create_state(shared.task, seed).on_device() for seed in seeds]
    try:
        alone = step_seconds(shared, states[0], over_seeds=False)
        all_together = step_seconds(shared, stack(states), over_seeds=True)
    except jax.errors.JaxRuntimeError as error:
        reason = ("do not fit into the device's memory" if "RESOURCE_EXHAUSTED" in str(error)
                  else f"failed: {first_line(error)}")
        say(f"one by one: {len(seeds)} seeds at once {reason}")
        return False
    ratio = all_together / (len(seeds) * alone)
    say(f"{'together' if ratio < 1 else 'one by one'}: a step of one seed takes "
        f"{1e3 * alone:.3g} ms, a step of {len(seeds)} at once {1e3 * all_together:.3g} ms, "
        f"{ratio:.2f} of one by one")
    return ratio < 1


def step_seconds(shared, state, *, over_seeds):
    """Return the seconds of a training step from a device state: the least of a few timings."""
    config = copy.deepcopy(shared.task.config)
    if config.steps_per_call in ("auto", "epoch"):
        config.steps_per_call = _TIMED_STEPS
    timed = Programs(dataclasses.replace(shared.task, config=config), shared.devices,
                     over_seeds=over_seeds)
    state = shared.devices.replicate(jax.tree.map(np.array, state))
    permutation, seconds = timed.permutation(state), []
    for _ in range(1 + _TIMED_CALLS):  # the first one compiles
        watch = logs.Stopwatch()
        state = jax.block_until_ready(timed.train(state, shared.train_data, permutation, 0))
        seconds.append(watch.seconds())
    return min(seconds[1:]) / timed.steps_at(0)[0]


def fit(shared, seeds, workdir, *, stop=lambda: 0, stream=None):
    """Train `seeds` at once, or go on with them; each leaves the run folder workdir/seedN.

    Seeds that stand at the same step of their epochs train together, whatever the epoch; those in
    the middle of one finish it first. The program keeps its width (compiling another would take
    longer than most runs gain): in the place of a seed that has ended, the first one is trained
    twice, and the copy dropped.

    Args:
      shared: from `prepare`. seeds: ints. workdir, stop, stream: as `train.fit`.

    Raises:
      UserError: as `train.fit`. NonFiniteLoss: names the seed; the others are saved. Interrupted:
        what each trained is saved.
    """
    watch = logs.Stopwatch()
    watch.sections["compile"] = 0.0
    alone = Programs(shared.task, shared.devices)
    together = Programs(shared.task, shared.devices, over_seeds=True)
    with contextlib.ExitStack() as opened:
        pending = [_open(shared, alone, seed, workdir, stream, opened) for seed in seeds]
        _introduce(pending, shared.arrays)
        try:
            while pending := _conclude_finished(pending, shared, watch):
                first_step = max(member.first_step for member in pending)
                group = [member for member in pending if member.first_step == first_step]
                if not watch.sections["compile"]:
                    _compile(together, _stacked(group, len(seeds)), shared, first_step, watch)
                    group[0].run.log.print(f"compiled for {len(seeds)} seed(s) at once in "
                                           f"{watch.sections['compile']:.1f} s")
                signum = _train_epoch(group, together, len(seeds), shared, stop)
                if signum:
                    for member in pending:
                        member.save(train.save_trained)
                        member.close()
                    raise train.Interrupted(signum)
        except train.NonFiniteLoss:
            _save_others([member for member in pending if not member.closed])
            raise


def _open(shared, alone, seed, workdir, stream, opened):
    task = dataclasses.replace(shared.task, config=with_seed(shared.task.config, seed))
    stream = Prefixed(sys.stdout if stream is None else stream, f"seed {seed}  ")
    run = opened.enter_context(
        Run(task, pathlib.Path(workdir) / f"seed{seed}", stream, shared.arrays.digest))
    return Member(run, alone.for_seed_of(task), run.state,
                  shared.devices.replicate(run.state.on_device()))


def _introduce(members, arrays):
    """Print one header, and where the others are; draw the training images of each."""
    first, *others = members
    train.announce(first.run, first.programs, arrays)
    for member in others:
        header = run_report.header(member.run, member.programs, arrays)
        member.run.log.header({"run": header["run"]})
    for member in members:
        run_report.samples(member.programs.task, member.state, arrays, member.run.workdir)


def _compile(together, live, shared, first_step, watch):
    with watch.section("compile"):
        together.compile(live, shared.train_data, shared.held_out, first_step)


def _stacked(group, width):
    """Return the states of a group as one of `width` seeds; the first one's fills what is left."""
    return stack([member.live for member in group] + [group[0].live] * (width - len(group)))


def _train_epoch(group, together, width, shared, stop):
    """Train a group to the end of its epoch, and evaluate, report and save each seed.

    Returns:
      The number of a signal that asks to stop, or 0. Raises NonFiniteLoss.
    """
    config, lap, first = shared.task.config, logs.Stopwatch(), group[0]
    first_step = first.first_step
    with first.run.log.progress(
            total_steps=shared.task.steps_per_epoch, first_step=first_step,
            epoch=int(first.state.epoch) + 1, epochs=config.epochs,
            batch_size=len(group) * config.batch_size) as bar:
        live, signum = train.train_epoch(together, _stacked(group, width), shared.train_data,
                                         first_step, bar, stop)
    for member, own in zip(group, unstack(live, len(group)), strict=True):
        member.live = own
    for member in group:
        member.check_finite()
    if signum:
        return signum
    rows = [train.train_row(member.programs, member.live, int(member.state.epoch) + 1, first_step,
                            lap) for member in group]
    for split in splits.measured(config):
        sums = together.evaluate(live, shared.held_out, shared.arrays.spans[split])["sums"]
        for number, row in enumerate(rows):
            row |= finalize(jax.tree.map(lambda x, i=number: x[i], sums), split)
    took = {"seconds": lap.seconds(), "seeds_at_once": len(group)}
    for member, row in zip(group, rows, strict=True):
        row |= took
        member.live, member.state = train.finish_epoch(member.programs, member.live, member.state,
                                                       row["epoch"], row)
        member.run.report(row, member.state.history)
        if member.run.is_due(member.state.history, row["epoch"]):
            member.save()
    return 0


def _conclude_finished(pending, shared, watch):
    """Save and measure the seeds whose training has ended; return the others."""
    for member in [m for m in pending if m.is_finished()]:
        member.save()
        train.measure_result(member.run, member.programs, member.live, member.state,
                             shared.held_out, shared.arrays, watch)
        member.close()
    return [member for member in pending if not member.closed]


def _save_others(members):
    """Save what is left when one seed's loss was not finite."""
    for member in members:
        with contextlib.suppress(train.NonFiniteLoss):
            member.check_finite()
            member.save(train.save_trained)


@jax.jit
def stack(states):
    """Return one state of a list of them: every array gets a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@functools.partial(jax.jit, static_argnums=1)
def unstack(state, count):
    """Return the list of `count` states that `stack` took."""
    return [jax.tree.map(lambda x, i=number: x[i], state) for number in range(count)]
