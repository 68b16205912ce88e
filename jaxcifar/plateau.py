"""Reduce the learning rate when a metric stops improving: torch's ReduceLROnPlateau.

torch compares and multiplies in double, which JAX does not have by default. So the rule is applied on
the host, once per epoch, to doubles that no compiled program sees (state.TrainState): the rates equal
torch's bit for bit on any sequence of metrics, before a step rounds them to float32.
"""

import dataclasses
from typing import Any

import flax.struct
import numpy as np

from jaxcifar.errors import UserError, unknown


def _option(default):
    return flax.struct.field(pytree_node=False, default=default)


@flax.struct.dataclass
class Plateau:
    """torch.optim.lr_scheduler.ReduceLROnPlateau as an immutable pytree; see `Plateau.create`.

    NumPy's scalars, saved with the train state: learning_rate, the rate to use, and best, the best
    metric so far (plus or minus infinity before the first epoch), float64 []; num_bad_epochs and
    cooldown_counter, int32 []. The options are static, with torch's names and defaults.
    """

    learning_rate: Any
    best: Any
    num_bad_epochs: Any
    cooldown_counter: Any
    mode: str = _option("min")
    factor: float = _option(0.1)
    patience: int = _option(10)
    threshold: float = _option(1e-4)
    threshold_mode: str = _option("rel")
    cooldown: int = _option(0)
    min_lr: float = _option(0.0)
    eps: float = _option(1e-8)

    @classmethod
    def create(cls, learning_rate, **options):
        """Return the state before the first epoch, at `learning_rate`, a float.

        Raises UserError: an unknown option, mode or threshold_mode, or a factor of 1 or more.
        """
        for name in options:
            if name not in OPTIONS:
                raise UserError(unknown("option of schedule 'plateau'", name, OPTIONS))
        state = cls(np.float64(learning_rate), np.float64(np.inf), np.int32(0), np.int32(0), **options)
        if state.mode not in ("min", "max"):
            raise UserError(f"plateau mode is {state.mode!r}: expected 'min' or 'max'")
        if state.threshold_mode not in ("rel", "abs"):
            mode = state.threshold_mode
            raise UserError(f"plateau threshold_mode is {mode!r}: expected 'rel' or 'abs'")
        if state.factor >= 1:
            raise UserError(f"plateau factor is {state.factor}: expected less than 1")
        return state if state.mode == "min" else state.replace(best=np.float64(-np.inf))

    def update(self, metric):
        """Return the state after an epoch with this metric (a float; NaN is never better)."""
        best, rate = float(self.best), float(self.learning_rate)  # as torch's: they do not warn
        cooldown, bad = int(self.cooldown_counter), int(self.num_bad_epochs)
        better = self._is_better(float(metric), best)
        bad = 0 if better or cooldown > 0 else bad + 1
        cooldown = max(cooldown - 1, 0)
        if bad > self.patience:
            lower = max(rate * self.factor, self.min_lr)
            rate = lower if rate - lower > self.eps else rate
            bad, cooldown = 0, self.cooldown
        return self.replace(
            learning_rate=np.float64(rate), best=np.float64(metric if better else best),
            num_bad_epochs=np.int32(bad), cooldown_counter=np.int32(cooldown))

    def _is_better(self, metric, best):
        margin = -self.threshold if self.mode == "min" else self.threshold
        bound = best * (1.0 + margin) if self.threshold_mode == "rel" else best + margin
        return metric < bound if self.mode == "min" else metric > bound


OPTIONS = tuple(
    field.name for field in dataclasses.fields(Plateau) if field.default is not dataclasses.MISSING
)
