"""Reduce the learning rate when a metric stops improving: torch's ReduceLROnPlateau.

torch compares and multiplies in double, which JAX does not have by default. So `Plateau.update`
runs on the host, in NumPy, once per epoch, and the doubles are kept as their two 32-bit halves:
they pass unchanged through compiled steps and checkpoints, and the rates equal torch's bit for bit
on any sequence of metrics (before the rounding of `learning_rate` to float32).
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

    Arrays (saved with the train state; one leading axis or more where several runs share it):
    learning_rate float32 [], the rate to use; learning_rate_bits and best_bits uint32 [2];
    num_bad_epochs and cooldown_counter int32 []. The options are static, with torch's names and
    defaults.
    """

    learning_rate: Any
    learning_rate_bits: Any
    best_bits: Any
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
        """Return the state before the first epoch, at `learning_rate` (float, or float64 [...]).

        Raises UserError: an unknown option, mode or threshold_mode, or a factor of 1 or more.
        """
        for name in options:
            if name not in OPTIONS:
                raise UserError(unknown("option of schedule 'plateau'", name, OPTIONS))
        rate = np.asarray(learning_rate, np.float64)
        zero = np.zeros(rate.shape, np.int32)
        bits = _to_bits(rate)
        state = cls(rate.astype(np.float32), bits, bits, zero, zero, **options)
        if state.mode not in ("min", "max"):
            raise UserError(f"plateau mode is {state.mode!r}: expected 'min' or 'max'")
        if state.threshold_mode not in ("rel", "abs"):
            mode = state.threshold_mode
            raise UserError(f"plateau threshold_mode is {mode!r}: expected 'rel' or 'abs'")
        if not 0 <= state.factor < 1:
            raise UserError(f"plateau factor is {state.factor}: expected 0 or more and less than 1")
        worst = np.inf if state.mode == "min" else -np.inf
        return state.replace(best_bits=_to_bits(np.full(rate.shape, worst)))

    @property
    def best(self):
        """The best metric so far, float64 []: plus or minus infinity before the first epoch."""
        return _from_bits(self.best_bits)

    def update(self, metric):
        """Return the state after an epoch with this metric (a float; NaN is never better).

        Not for compiled code. The leaves of the result are NumPy arrays.
        """
        metric, best = np.asarray(metric, np.float64), self.best
        with np.errstate(all="ignore"):  # Python's floats, which torch uses, do not warn
            better = self._is_better(metric, best)
            cooldown = np.asarray(self.cooldown_counter)
            bad = np.where(better | (cooldown > 0), 0, np.asarray(self.num_bad_epochs) + 1)
            reduce = bad > self.patience
            old = _from_bits(self.learning_rate_bits)
            new = old * self.factor
            new = np.where(self.min_lr > new, self.min_lr, new)
            rate = np.where(reduce & (old - new > self.eps), new, old)
        cooldown = np.where(reduce, self.cooldown, np.where(cooldown > 0, cooldown - 1, cooldown))
        return self.replace(
            learning_rate=rate.astype(np.float32),
            learning_rate_bits=_to_bits(rate),
            best_bits=_to_bits(np.where(better, metric, best)),
            num_bad_epochs=np.where(reduce, 0, bad).astype(np.int32),
            cooldown_counter=cooldown.astype(np.int32),
        )

    def _is_better(self, metric, best):
        margin = -self.threshold if self.mode == "min" else self.threshold
        bound = best * (1.0 + margin) if self.threshold_mode == "rel" else best + margin
        return metric < bound if self.mode == "min" else metric > bound


OPTIONS = tuple(
    field.name for field in dataclasses.fields(Plateau) if field.default is not dataclasses.MISSING
)


def _to_bits(x):
    """Return float64 [...] as its halves, uint32 [..., 2]."""
    return np.asarray(x, np.float64)[..., None].view(np.uint32)


def _from_bits(bits):
    """Return the float64 [...] whose halves are uint32 [..., 2]."""
    return np.ascontiguousarray(bits).view(np.float64)[..., 0]
