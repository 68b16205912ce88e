"""Mixup and CutMix over the global batch, the same on any number of devices.

Like torchvision's v2.MixUp and v2.CutMix: one draw per batch, and every example is mixed with the
one before it. Under a data axis the batch is the global one, of which each device holds a
contiguous slice; padded examples, which sit at its end, are nobody's partner among the real ones.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_QUANTILES = 1 << 14


def previous(values, axis_name=None, mask=None):
    """Return for each example of the global batch the one before it; the first gets the last.

    values: [n, ...], this device's slice; axis_name: the data axis, None outside pmap/shard_map;
    mask: float32 [n], 1 = real, 0 = padding at the global end: "the last" is the last real one.
    """
    last = values[-1:]
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    first = last if axis_name is None else jax.lax.ppermute(
        last, axis_name, [(d, (d + 1) % devices) for d in range(devices)])
    if mask is not None:
        device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
        count = jnp.sum(mask)
        count = count if axis_name is None else jax.lax.psum(count, axis_name)
        n = values.shape[0]
        index = count.astype(jnp.int32) - 1 - device * n  # of the last real one, if it is here
        held = jax.lax.dynamic_slice_in_dim(values, jnp.clip(index, 0, n - 1), 1)
        held = jnp.where((index >= 0) & (index < n), held, jnp.zeros_like(held))
        held = held if axis_name is None else jax.lax.psum(held, axis_name)
        first = jnp.where(device == 0, held, first)
    return jnp.concatenate([first, values[:-1]])


def _check_alpha(alpha):
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise ValueError("alpha is a number > 0, both parameters of the Beta distribution")


def _beta(key, alpha):
    """Draw from Beta(alpha, alpha), a float32 scalar; Beta(1, 1) is the uniform distribution.

    By its quantile function, from a table: jax.random.beta rejects and draws again, and a GPU waits
    for the host in every such loop.
    """
    uniform = jax.random.uniform(key)
    if alpha == 1:
        return uniform
    table, place = jnp.asarray(_beta_quantiles(alpha)), uniform * _QUANTILES
    below = place.astype(jnp.int32)
    share = place - below
    return table[below] * (1 - share) + table[below + 1] * share


@functools.lru_cache
def _beta_quantiles(alpha):
    """Return the quantiles of Beta(alpha, alpha) at i / _QUANTILES, i = 0 to _QUANTILES, float32."""
    from scipy import special
    return special.betaincinv(alpha, alpha, np.linspace(0, 1, _QUANTILES + 1)).astype(np.float32)


def _mix(values, others, weight):
    return others * (1 - weight) + values * weight


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Mix images and labels by one weight per batch: torchvision v2.MixUp (arXiv:1710.09412)."""

    alpha: float

    def __post_init__(self):
        _check_alpha(self.alpha)

    def sample(self, key, shape):
        """Draw the weight of the example itself, float32 scalar."""
        return _beta(key, self.alpha)

    def apply(self, images, targets, parameters, axis_name=None, mask=None):
        """Return mixed images float32 [n, H, W, C] and targets float32 [n, num_classes]."""
        return (_mix(images, previous(images, axis_name, mask), parameters),
                _mix(targets, previous(targets, axis_name, mask), parameters))

    def describe(self):
        """Return one line for the run's header."""
        return f"mixup, alpha={self.alpha:g}, one weight per batch"


class Box(NamedTuple):
    """Rows top..bottom-1 and columns left..right-1, int32 scalars."""

    top: jax.Array
    bottom: jax.Array
    left: jax.Array
    right: jax.Array


@dataclasses.dataclass(frozen=True)
class Cutmix:
    """Paste a box of the partner, mix labels by area: torchvision v2.CutMix (arXiv:1905.04899)."""

    alpha: float

    def __post_init__(self):
        _check_alpha(self.alpha)

    def sample(self, key, shape):
        """Draw the `Box` for images of shape (H, W, C)."""
        weight_key, centre_key = jax.random.split(key)
        half = 0.5 * jnp.sqrt(1 - _beta(weight_key, self.alpha))
        size = jnp.array(shape[:2])
        centre = jnp.minimum((jax.random.uniform(centre_key, (2,)) * size).astype(jnp.int32),
                             size - 1)
        reach = (half * size).astype(jnp.int32)
        low, high = jnp.maximum(centre - reach, 0), jnp.minimum(centre + reach, size)
        return Box(low[0], high[0], low[1], high[1])

    def apply(self, images, targets, parameters, axis_name=None, mask=None):
        """Return mixed images float32 [n, H, W, C] and targets float32 [n, num_classes]."""
        top, bottom, left, right = parameters
        height, width = images.shape[1:3]
        row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
        pasted = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        weight = 1 - (bottom - top) * (right - left) / (height * width)
        return (jnp.where(pasted, previous(images, axis_name, mask), images),
                _mix(targets, previous(targets, axis_name, mask), weight))

    def describe(self):
        """Return one line for the run's header."""
        return f"cutmix, alpha={self.alpha:g}, one box per batch"
