"""Learning-rate schedules with the values of torch.optim.lr_scheduler.

A schedule is a frozen function of the step, `schedule(base_lr, step, *, steps_per_epoch,
total_epochs)`. Reduce-on-plateau is a function of the metrics instead:
`Plateau`, in plateau.py.

Accuracy: torch computes in double, a compiled step in float32. Per-epoch schedules are tables
computed in double; per-step ones are written without cancellation, so that small rates keep all
their digits.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxcifar.errors import UserError, unknown
from jaxcifar.plateau import OPTIONS as PLATEAU_OPTIONS


def create(name, **options):
    """Build the schedule `name` of SCHEDULES from its options (the fields of its class).

    Defaults are torch's. Raises UserError: unknown name, unknown or missing option (the nearest
    name suggested), or a value out of range.
    """
    if name == "plateau":
        raise UserError("plateau is no function of the step: build it with Plateau.create")
    known = option_names(name)
    for option in options:
        if option not in known:
            raise UserError(unknown(f"option of schedule {name!r}", option, known))
    for field in dataclasses.fields(SCHEDULES[name]):
        if field.default is dataclasses.MISSING and field.name not in options:
            raise UserError(f"schedule {name!r} needs the option {field.name!r}")
    return SCHEDULES[name](**options)


def option_names(name):
    """Return the names of the options of schedule `name` or of "plateau", a tuple of str.

    Raises UserError: unknown name (the nearest suggested).
    """
    if name == "plateau":
        return PLATEAU_OPTIONS
    if name not in SCHEDULES:
        raise UserError(unknown("schedule", name, [*SCHEDULES, "plateau"]))
    return tuple(field.name for field in dataclasses.fields(SCHEDULES[name]))


def warmup(step, steps):
    """Return min(1, (step + 1) / steps): a linear ramp over `steps` steps, then 1. float32 [].

    As torch's LinearLR(start_factor=1 / steps, total_iters=steps - 1) stepped after every batch.
    """
    return jnp.minimum((jnp.asarray(step) + 1).astype(jnp.float32) / max(steps, 1), 1.0)


def _require(condition, message):
    if not condition:
        raise UserError(message)


def _require_rates(schedule, *names):
    """Raise UserError for a rate, or a factor of it, below 0: it would climb the loss."""
    for name in names:
        value = getattr(schedule, name)
        _require(0 <= value < math.inf, f"{name} is {value}: expected 0 or more, and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate as a function of the step; this class itself is the constant rate.

    `warmup_epochs` (fractions allowed, 0 = off) multiplies the rate by the ramp of `warmup` over
    the first warmup_epochs * steps_per_epoch steps. It does not shift a per-epoch schedule.
    """

    warmup_epochs: float = 0

    def __call__(self, base_lr, step, *, steps_per_epoch, total_epochs):
        """Return the learning rate of step `step` (from 0), float32 [].

        `base_lr` is a float or float32 [], `step` an int or int32 []; both may be traced.
        `steps_per_epoch` and `total_epochs` are Python ints.
        """
        base_lr, step = jnp.asarray(base_lr, jnp.float32), jnp.asarray(step)
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        lr = self._rate(base_lr, step, steps_per_epoch, total_epochs)
        return (lr * warmup(step, warmup_steps) if warmup_steps else lr).astype(jnp.float32)

    def momentum(self, step, *, steps_per_epoch, total_epochs):
        """Return the momentum of step `step`, float32 [], or None where it is the optimiser's."""
        del step, steps_per_epoch, total_epochs
        return None

    def _rate(self, base_lr, step, steps_per_epoch, total_epochs):
        del step, steps_per_epoch, total_epochs
        return base_lr

    def _ends(self, steps_per_epoch, total_epochs):
        """Return the first step after the warm-up and the number of steps (of a ramp alone: both)."""
        first = round(self.warmup_epochs * steps_per_epoch)
        return first, max(first, steps_per_epoch * total_epochs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PerEpoch(Schedule):
    """A rate that is constant within an epoch: a torch scheduler stepped once per epoch.

    Subclasses define _factor(epochs float64 [E]) -> float64 [E].
    """

    def _rate(self, base_lr, step, steps_per_epoch, total_epochs):
        table = self._factor(np.arange(total_epochs, dtype=np.float64)).astype(np.float32)
        epoch = jnp.minimum(step // steps_per_epoch, total_epochs - 1)
        return base_lr * jnp.asarray(table)[epoch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(_PerEpoch):
    """torch CosineAnnealingLR(T_max=t_max, eta_min), once per epoch.

    `t_max` (epochs) is independent of the length of the run: a shorter run sees the start of the
    cosine, and after t_max epochs the rate rises again, as torch's does.
    """

    t_max: int
    eta_min: float = 0.0

    def __post_init__(self):
        _require(self.t_max >= 1, f"t_max is {self.t_max}: expected 1 epoch or more")
        _require_rates(self, "eta_min")

    def _factor(self, epoch):
        return np.cos(np.pi * (epoch % (2 * self.t_max)) / (2 * self.t_max)) ** 2

    def _rate(self, base_lr, *args):
        return self.eta_min + super()._rate(base_lr - self.eta_min, *args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(_PerEpoch):
    """torch StepLR: times `gamma` every `step_size` epochs."""

    step_size: int
    gamma: float = 0.1

    def __post_init__(self):
        _require(self.step_size >= 1, f"step_size is {self.step_size}: expected 1 epoch or more")
        _require_rates(self, "gamma")

    def _factor(self, epoch):
        return self.gamma ** (epoch // self.step_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStep(_PerEpoch):
    """torch MultiStepLR: times `gamma` at each of the epochs `milestones`."""

    milestones: tuple
    gamma: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "milestones", tuple(sorted(self.milestones)))  # hashable
        _require_rates(self, "gamma")

    def _factor(self, epoch):
        return self.gamma ** np.searchsorted(self.milestones, epoch, side="right").astype(float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential(_PerEpoch):
    """torch ExponentialLR: times `gamma` every epoch."""

    gamma: float

    def __post_init__(self):
        _require_rates(self, "gamma")

    def _factor(self, epoch):
        return self.gamma**epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial(_PerEpoch):
    """torch PolynomialLR: (1 - epoch / total_iters)**power, 0 from epoch total_iters on."""

    total_iters: int
    power: float = 1.0

    def __post_init__(self):
        _require(self.total_iters >= 1, f"total_iters is {self.total_iters}: expected 1 or more")

    def _factor(self, epoch):
        return (1 - np.minimum(epoch, self.total_iters) / self.total_iters) ** self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineStep(Schedule):
    """Half a cosine from the base rate to `eta_min` over all steps that follow the warm-up.

    torch SequentialLR of LinearLR (see `warmup`) and CosineAnnealingLR, stepped after every batch.
    """

    eta_min: float = 0.0

    def __post_init__(self):
        _require_rates(self, "eta_min")

    def _rate(self, base_lr, step, steps_per_epoch, total_epochs):
        ends = self._ends(steps_per_epoch, total_epochs)
        return _anneal("cos", step, ends, (base_lr, self.eta_min))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A line from the base rate to `end_factor` of it over all steps that follow the warm-up.

    torch LinearLR(start_factor=1, end_factor, total_iters=steps), stepped after every batch.
    """

    end_factor: float = 0.0

    def __post_init__(self):
        _require_rates(self, "end_factor")

    def _rate(self, base_lr, step, steps_per_epoch, total_epochs):
        ends = self._ends(steps_per_epoch, total_epochs)
        return _anneal("linear", step, ends, (base_lr, self.end_factor * base_lr))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triangular(Schedule):
    """Lines from start_factor to 1 to end_factor of the base rate, 1 at `peak` of all steps.

    numpy.interp(step, [0, int(peak * steps), steps], [start_factor, 1, end_factor]), a schedule
    of fast CIFAR recipes.
    """

    peak: float
    start_factor: float = 0.0
    end_factor: float = 0.0

    def __post_init__(self):
        _require(0 < self.peak < 1, f"peak is {self.peak}: expected a fraction between 0 and 1")
        _require_rates(self, "start_factor", "end_factor")

    def _rate(self, base_lr, step, steps_per_epoch, total_epochs):
        total = steps_per_epoch * total_epochs
        top = int(self.peak * total)
        rise = _anneal("linear", step, (0, top), (self.start_factor * base_lr, base_lr))
        fall = _anneal("linear", step, (top, total), (base_lr, self.end_factor * base_lr))
        return jnp.where(step < top, rise, fall)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """torch OneCycleLR over all steps; the base rate is its max_lr.

    torch cycles the momentum too unless told otherwise. Here `cycle_momentum` is off by default;
    where it is on, pass `momentum(step, ...)` to the optimiser's update (Adam: the first beta).
    """

    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False
    cycle_momentum: bool = False
    base_momentum: float = 0.85
    max_momentum: float = 0.95

    def __post_init__(self):
        _require(0 <= self.pct_start <= 1, f"pct_start is {self.pct_start}: expected 0 to 1")
        _require_rates(self, "div_factor", "final_div_factor")
        _require(self.div_factor and self.final_div_factor,
                 "div_factor and final_div_factor divide the rate: expected numbers above 0")
        _require(
            self.anneal_strategy in ("cos", "linear"),
            f"unknown anneal_strategy {self.anneal_strategy!r}: choose 'cos' or 'linear'",
        )

    def _rate(self, base_lr, step, steps_per_epoch, total_epochs):
        initial = base_lr / self.div_factor
        final = initial / self.final_div_factor
        return self._cycle(step, steps_per_epoch * total_epochs, initial, base_lr, final)

    def momentum(self, step, *, steps_per_epoch, total_epochs):
        """Return the momentum of step `step`, float32 [], or None where it is fixed."""
        if not self.cycle_momentum:
            return None
        low, high = jnp.float32(self.base_momentum), self.max_momentum
        return self._cycle(jnp.asarray(step), steps_per_epoch * total_epochs, high, low, high)

    def _cycle(self, step, total, initial, peak, final):
        """Go from initial to peak to final; with three phases back to initial before that."""
        ends = [0.0, float(self.pct_start * total) - 1, total - 1]
        values = [initial, peak, final]
        if self.three_phase:
            ends.insert(2, float(2 * self.pct_start * total) - 2)
            values.insert(2, initial)
        result = None
        for i in reversed(range(len(ends) - 1)):
            value = _anneal(self.anneal_strategy, step, ends[i : i + 2], values[i : i + 2])
            inside = step <= math.floor(ends[i + 1])
            result = value if result is None else jnp.where(inside, value, result)
        return result


def _anneal(strategy, step, ends, values):
    """Go from values[0] at step ends[0] to values[1] at ends[1], by "cos" or "linear".

    Each value times its own weight, sin(pi / 2 * distance to the other end)**2: no cancellation
    where the result is small.
    """
    length = (ends[1] - ends[0]) or 1  # an empty phase: any step is before or after it
    past = jnp.clip((step - ends[0]).astype(jnp.float32) / length, 0.0, 1.0)
    left = jnp.clip((ends[1] - step).astype(jnp.float32) / length, 0.0, 1.0)
    if strategy == "cos":
        past, left = jnp.sin(jnp.pi / 2 * past) ** 2, jnp.sin(jnp.pi / 2 * left) ** 2
    return values[0] * left + values[1] * past


SCHEDULES = {
    "constant": Schedule,
    "cosine": Cosine,
    "cosine_step": CosineStep,
    "step": Step,
    "multistep": MultiStep,
    "exponential": Exponential,
    "polynomial": Polynomial,
    "linear": Linear,
    "triangular": Triangular,
    "one_cycle": OneCycle,
}
