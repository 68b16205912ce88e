"""Pooling as torch does it, from slices and reshapes, whose backward passes are deterministic.

Windows that overlap are taken along one axis, then along the other: k + k operations, not k * k.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def pair(value):
    """Return an int twice, and a pair as a tuple."""
    return (value, value) if isinstance(value, int) else tuple(value)


def _pad(x, padding, value):
    if not any(padding):
        return x
    rows, columns = padding
    return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)), constant_values=value)


def _windows(x, kernel, stride):
    """Yield kernel[0] * kernel[1] arrays [N, H', W', C]: the window's entries, row by row."""
    n, h, w, c = x.shape
    out_h, out_w = (h - kernel[0]) // stride[0] + 1, (w - kernel[1]) // stride[1] + 1
    if out_h < 1 or out_w < 1:
        raise ValueError(f"pooling window {kernel} is larger than the padded map {(h, w)}: "
                         "use a smaller one")
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            yield lax.slice(
                x, (0, i, j, 0),
                (n, i + (out_h - 1) * stride[0] + 1, j + (out_w - 1) * stride[1] + 1, c),
                (1, stride[0], stride[1], 1))


def max_pool(x, kernel, stride=None, padding=0):
    """Return the maximum of each window, [N, H', W', C] (torch.nn.MaxPool2d, ceil_mode off).

    x: [N, H, W, C]; kernel, stride (the kernel by default), padding: int or pair. Of equal values
    the first in row order takes the gradient, and NaN wins, as in torch.
    """
    kernel, padding = pair(kernel), pair(padding)
    stride = kernel if stride is None else pair(stride)
    padded = _pad(x, padding, -jnp.inf)
    if kernel == stride:
        return _max_of_tiles(padded, kernel, padded.shape)
    columns = _first_maximum(_windows(padded, (1, kernel[1]), (1, stride[1])))
    return _first_maximum(_windows(columns, (kernel[0], 1), (stride[0], 1)))


def _first_maximum(entries):
    return functools.reduce(lambda best, entry: jnp.where(_wins(entry, best), entry, best), entries)


def _wins(entry, best):
    return (entry > best) | (entry != entry)


def avg_pool(x, kernel, stride=None, padding=0):
    """Return the mean of each window, zero padding counted (torch.nn.AvgPool2d's defaults).

    x: [N, H, W, C]; kernel, stride (the kernel by default), padding: int or pair. Sums are float32.
    """
    kernel, padding = pair(kernel), pair(padding)
    stride = kernel if stride is None else pair(stride)
    padded = _pad(x.astype(jnp.float32), padding, 0.0)
    if kernel == stride:
        total = _sum_of_tiles(padded, kernel, padded.shape)
    else:
        total = _sum_of_windows(padded, kernel, stride)
    return (total / (kernel[0] * kernel[1])).astype(x.dtype)


def _sum_of_windows(x, kernel, stride):
    rows = sum(_windows(x, (kernel[0], 1), (stride[0], 1)))
    return sum(_windows(rows, (1, kernel[1]), (1, stride[1])))


# Windows that do not overlap: in one pass, the gradient of every entry is its window's or zero.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_of_tiles(x, kernel, shape):
    """Return the maximum of each window of x, which has this shape; kept for the gradient: its place."""
    return _max_forward(x, kernel, shape)[0]


def _places(kernel):
    count = math.prod(kernel)
    return np.arange(count, dtype=np.min_scalar_type(count - 1))  # one byte, mostly


def _max_forward(x, kernel, shape):
    (best, *entries), places = _windows(x, kernel, kernel), _places(kernel)
    winner = jnp.full(best.shape, places[0])
    for place, entry in zip(places[1:], entries, strict=True):
        wins = _wins(entry, best)
        winner, best = jnp.where(wins, place, winner), jnp.where(wins, entry, best)
    return best, winner


def _max_backward(kernel, shape, winner, dy):
    places = _places(kernel).reshape(kernel[0], 1, kernel[1], 1)
    dx = jnp.where(winner[:, :, None, :, None] == places, dy[:, :, None, :, None], 0)
    return (_from_tiles(dx, shape),)


_max_of_tiles.defvjp(_max_forward, _max_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sum_of_tiles(x, kernel, shape):
    """Return the sum of each window of x, which has this shape: the gradient needs no more of it."""
    return _sum_of_windows(x, kernel, kernel)


def _sum_forward(x, kernel, shape):
    return _sum_of_tiles(x, kernel, shape), None


def _sum_backward(kernel, shape, _, dy):
    n, h, w, c = dy.shape
    tiles = jnp.broadcast_to(dy[:, :, None, :, None], (n, h, kernel[0], w, kernel[1], c))
    return (_from_tiles(tiles, shape),)


_sum_of_tiles.defvjp(_sum_forward, _sum_backward)


def _from_tiles(tiles, shape):
    """Return [N, H, W, C] of [N, H', kh, W', kw, C]; zeros in rows and columns that no window has.

    XLA would let one of two convolutions that read the result add such zeros itself, and compute the
    rest for each of them.
    """
    n, h, kh, w, kw, c = tiles.shape
    edges = [(0, 0), (0, shape[1] - h * kh), (0, shape[2] - w * kw), (0, 0)]
    x = jnp.pad(tiles.reshape(n, h * kh, w * kw, c), edges)
    return lax.optimization_barrier(x) if x.size > tiles.size else x


def global_avg_pool(x):
    """Return the mean of each channel's map, [N, C] (torch.nn.AdaptiveAvgPool2d(1), flattened)."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)


def adaptive_avg_pool(x, output_size):
    """Return a map of the given size, int or pair: [N, H, W, C] to [N, *output_size, C].

    Cell i averages rows floor(i H / out) to ceil((i + 1) H / out). Source:
    torch.nn.AdaptiveAvgPool2d.
    """
    for axis, out in zip((1, 2), pair(output_size)):
        size = x.shape[axis]
        cells = []
        for i in range(out):
            low, high = i * size // out, -((-(i + 1) * size) // out)
            cell = lax.slice_in_dim(x, low, high, axis=axis)
            cells.append(jnp.mean(cell, axis=axis, keepdims=True, dtype=jnp.float32))
        x = jnp.concatenate(cells, axis=axis).astype(x.dtype)
    return x
