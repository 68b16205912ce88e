"""Batch normalisation in training: one pass over the batch forward, and a gradient of its own."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def _total(values, axis_name):
    """Sum a tuple of arrays over the devices of `axis_name`, in one collective."""
    return values if axis_name is None else lax.psum(values, axis_name)


def _sums(a, b):
    """Return the sums of a and b, [..., C], over every axis but the last.

    As one reduction on accelerators, where XLA makes two kernels of it, and three of two sums; on
    CPU two sums are two to four times as fast.
    """
    axes = tuple(range(a.ndim - 1))
    if jax.default_backend() == "cpu":
        return jnp.sum(a, axes), jnp.sum(b, axes)
    return lax.reduce((a, b), (jnp.float32(0), jnp.float32(0)),
                      lambda total, entry: (total[0] + entry[0], total[1] + entry[1]), axes)


def _per_example(mask, x):
    return mask.astype(jnp.float32).reshape((-1,) + (1,) * (x.ndim - 1))


def _statistics(x, mask, shift, axis_name):
    """Return (mean, biased variance, count) of each channel over the real examples, float32.

    Sums are of x - shift: a variance from E[d^2] - E[d]^2 loses its digits where the mean is far
    from zero, so the running mean, which every device holds alike, is taken off first.
    """
    axes = tuple(range(x.ndim - 1))
    d = x.astype(jnp.float32) - shift
    if mask is None:
        sums = _sums(d, d * d)
        count = jnp.float32(x.size // x.shape[-1])
        if axis_name is not None:
            count = count * lax.psum(1, axis_name)
        first, second = _total(sums, axis_name)
    else:
        weight = _per_example(mask, x)
        d = jnp.where(weight > 0, d, 0.0)
        local = (jnp.sum(d, axes), jnp.sum(d * d, axes), jnp.sum(weight))
        first, second, examples = _total(local, axis_name)
        count = examples * (x[0].size // x.shape[-1])
    divisor = jnp.maximum(count, 1.0)
    mean = first / divisor
    var = jnp.maximum(second / divisor - mean * mean, 0.0)
    if mask is not None:  # a device that has padding only must not blow it up
        var = jnp.where(count > 0, var, 1.0)
    return mean + shift, var, count


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def batch_norm(x, mask, shift, scale, bias, eps, axis_name):
    """Normalise by the batch's statistics; return (y, mean, var, count).

    x: [..., C], any float dtype; mask: float [N] (1 real, 0 padding) or None; shift: float32 [C],
    a guess of the mean (see `_statistics`), which changes rounding only; scale, bias: float32 [C];
    axis_name: the data axis whose devices share statistics, or None. y: as x; mean, var (biased):
    float32 [C], without a gradient; count: float32, values per channel. Gradients of scale and
    bias are this device's share: the caller sums them over devices, as those of every parameter.
    Source: Ioffe & Szegedy 2015; torch.nn.BatchNorm2d (torch.nn.SyncBatchNorm over an axis).
    """
    return _forward(x, mask, shift, scale, bias, eps, axis_name)[0]


def _forward(x, mask, shift, scale, bias, eps, axis_name):
    mean, var, count = _statistics(x, mask, shift, axis_name)
    inverse = lax.rsqrt(var + eps)
    y = (x.astype(jnp.float32) - mean) * (inverse * scale) + bias
    return (y.astype(x.dtype), mean, var, count), (x, mask, scale, mean, inverse, count)


def _backward(eps, axis_name, residuals, cotangents):
    x, mask, scale, mean, inverse, count = residuals
    dy = cotangents[0].astype(jnp.float32)
    centred = x.astype(jnp.float32) - mean
    dbias, dscale = _sums(dy, dy * centred)
    dscale = dscale * inverse
    total_bias, total_scale = _total((dbias, dscale), axis_name)
    divisor = jnp.maximum(count, 1.0)
    through = total_bias / divisor + centred * (total_scale * inverse / divisor)
    if mask is not None:  # padding took no part in the statistics
        through = through * _per_example(mask, x)
    dx = (dy - through) * (inverse * scale)
    nothing = None if mask is None else jnp.zeros_like(mask)
    return dx.astype(x.dtype), nothing, jnp.zeros_like(mean), dscale, dbias


batch_norm.defvjp(_forward, _backward)
