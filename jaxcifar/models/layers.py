"""PyTorch's layers in Flax: every convention that differs between the two lives here.

Submodule names. A module's name is its path in PyTorch's state_dict: `Conv(64, 3,
name="layer1.0.conv1")`, or nested modules "layer1.0" > "conv1"; joined with dots they are the
state_dict's key. Leaves are named as in Flax (kernel, scale, bias, mean, var);
`jaxcifar.torch_weights` translates the leaves and nothing else.

Types. Parameters and BatchNorm's statistics are float32; `dtype` is the type of the computation.
Images and feature maps are [N, H, W, C].
"""

import contextlib
import contextvars
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxcifar.models import conv, products
from jaxcifar.models.batch_norm import batch_norm
from jaxcifar.models.pooling import adaptive_avg_pool, avg_pool, global_avg_pool, max_pool, pair

__all__ = [
    "BatchContext", "BatchNorm", "Conv", "Dropout", "Dropout2d", "LayerNorm", "Linear",
    "adaptive_avg_pool", "add_bias", "avg_pool", "batch_context", "current_batch", "flatten",
    "global_avg_pool", "kaiming_normal_fan_out", "max_pool", "multiply_by_gate", "relu",
    "uniform_fan_in",
]


def relu(x):
    """Return max(x, 0), as torch.nn.functional.relu: NaN stays NaN, the gradient at 0 is 0.

    x: floats of any shape. In bfloat16 on CPU by comparison: under JAX 0.11 and 0.12 two maxima with
    the same bfloat16 constant before a sum give NaN and random values there (XLA has YNNPACK
    compute them, `--xla_cpu_experimental_ynn_fusion_type=-reduce` would prevent it).
    """
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jnp.where(x <= 0, jnp.zeros_like(x), x)
    return nn.relu(x)


def add_bias(x, bias):
    """Return x + bias in x's dtype: [..., C] and float32 [..., C], broadcast.

    Added in float32, and so is the gradient of bias, a sum over the batch and the map: in bfloat16
    256 ones and one more are 256.
    """
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


def multiply_by_gate(x, gate):
    """Return x * gate in x's dtype: [N, H, W, C] and [N, 1, 1, C].

    Multiplied in float32, and so is the gradient of gate summed over the map, see `add_bias`.
    """
    return (x.astype(jnp.float32) * gate.astype(jnp.float32)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class BatchContext:
    """What layers need to know of the batch that they see: see `batch_context`."""

    axis_name: str | None = None
    bn_axis_name: str | None = None
    mask: Any = None
    frozen_norms: frozenset = frozenset()


_BATCH = contextvars.ContextVar("jaxcifar_batch", default=BatchContext())


@contextlib.contextmanager
def batch_context(axis_name=None, bn_axis_name=None, mask=None, frozen_norms=frozenset()):
    """Tell the layers, while a model is traced, how the batch lies on the devices.

    axis_name: the data axis of pmap or shard_map, or None on one device; dropout numbers examples
    by their position in the global batch. bn_axis_name: the axis over which BatchNorm shares its
    statistics; None keeps them per device. mask: float [N], 1 for a real example and 0 for
    padding, which BatchNorm leaves out; None: all real. frozen_norms: paths (tuples of module names)
    of the BatchNorms that use and keep their running statistics in training too.
    """
    token = _BATCH.set(BatchContext(axis_name, bn_axis_name, mask, frozen_norms))
    try:
        yield
    finally:
        _BATCH.reset(token)


def current_batch():
    """Return the BatchContext that the nearest enclosing `batch_context` set."""
    return _BATCH.get()


def uniform_fan_in(fan_in=None):
    """Return an initialiser U(-b, b), b = 1 / sqrt(fan_in): that of torch's Conv and Linear layers.

    fan_in is by default that of a kernel [..., in, out]. torch calls it
    kaiming_uniform_(a=sqrt(5)), whose bound is sqrt(6 / ((1 + 5) fan_in)), and gives biases the
    same bound (torch.nn.Linear.reset_parameters).
    """
    def init(key, shape, dtype=jnp.float32):
        bound = 1 / math.sqrt(fan_in or math.prod(shape[:-1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)
    return init


def kaiming_normal_fan_out(key, shape, dtype=jnp.float32):
    """Draw N(0, 2 / fan_out), fan_out = kh kw out of a kernel [kh, kw, in, out].

    Source: torch.nn.init.kaiming_normal_(mode="fan_out"), with torch's fan_out of grouped kernels.
    """
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return jax.random.normal(key, shape, dtype) * math.sqrt(2 / fan_out)


def _sides(padding):
    """Return ((top, bottom), (left, right)) from an int, (rows, columns), or that form itself."""
    return tuple(pair(side) for side in pair(padding))


class Conv(nn.Module):
    """torch.nn.Conv2d: [N, H, W, C] to [N, H', W', features]; padding in numbers, never "SAME".

    kernel_size, stride: int or (rows, columns); padding: int, (rows, columns) or ((top, bottom),
    (left, right)), since "SAME" pads strided convolutions on other sides than torch.
    """

    features: int
    kernel_size: Any
    stride: Any = 1
    padding: Any = 0
    groups: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = uniform_fan_in()
    bias_init: Any = None

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"Conv {self.name}: {channels} input and {self.features} output channels "
                f"cannot be split into {self.groups} groups: choose a divisor of both")
        shape = (*pair(self.kernel_size), channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x = conv.conv2d(
            x.astype(self.dtype), kernel.astype(self.dtype), stride=pair(self.stride),
            padding=_sides(self.padding), groups=self.groups)
        if self.use_bias:
            bias_init = self.bias_init or uniform_fan_in(math.prod(shape[:-1]))
            x = add_bias(x, self.param("bias", bias_init, (self.features,)))
        return x


class Linear(nn.Module):
    """torch.nn.Linear: [..., in] to [..., features]."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = uniform_fan_in()
    bias_init: Any = None

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = products.linear(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias_init = self.bias_init or uniform_fan_in(x.shape[-1])
            y = add_bias(y, self.param("bias", bias_init, (self.features,)))
        return y


class BatchNorm(nn.Module):
    """torch.nn.BatchNorm1d and 2d, over every axis but the last.

    In training: the biased variance normalises, the UNBIASED one enters the running variance, and
    `momentum` is the new value's share (Flax's is the old one's). Statistics are those of the real
    examples of the whole batch (see `batch_context`), in float32 whatever the dtype. Collection
    "batch_stats": mean, var.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        shape = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape) if self.affine else jnp.ones(shape)
        bias = self.param("bias", nn.initializers.zeros, shape) if self.affine else jnp.zeros(shape)
        x = x.astype(self.dtype)
        batch = current_batch()
        if not train or self.path in batch.frozen_norms:
            factor = scale * lax.rsqrt(running_var.value + self.eps)
            y = (x.astype(jnp.float32) - running_mean.value) * factor + bias
            return y.astype(self.dtype)
        if batch.mask is not None and batch.mask.shape != x.shape[:1]:
            raise ValueError(
                f"BatchNorm {self.name}: mask of shape {batch.mask.shape} for a batch of "
                f"{x.shape[0]}: expected one number per example")
        y, mean, var, count = batch_norm(
            x, batch.mask, lax.stop_gradient(running_mean.value), scale, bias, self.eps,
            batch.bn_axis_name)
        if not self.is_initializing():
            unbiased = var * (count / jnp.maximum(count - 1, 1.0))
            # A device whose share of the batch is all padding keeps what it had.
            share = self.momentum * (count > 0)
            running_mean.value += share * (mean - running_mean.value)
            running_var.value += share * (unbiased - running_var.value)
        return y


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last axis; computed in float32, returned in `dtype`."""

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        centred = x - jnp.mean(x, -1, keepdims=True)
        var = jnp.mean(centred * centred, -1, keepdims=True)
        return (centred * lax.rsqrt(var + self.eps) * scale + bias).astype(self.dtype)


class Dropout(nn.Module):
    """torch.nn.Dropout: in training zero values with probability `rate`, divide others by 1 - rate.

    Values along `broadcast_dims` share their fate. Each example has its own key, from the layer's
    key (rng "dropout", the same on every device) and the example's position in the global batch:
    the number of devices does not change the result. 16 random bits decide on each value: its
    probability is `rate` to within 1e-5.
    """

    rate: float
    broadcast_dims: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x, train):
        if not 0 <= self.rate <= 1:
            raise ValueError(f"Dropout {self.name}: rate {self.rate}: expected a probability, 0 to 1")
        if not train or self.rate == 0:
            return x
        if self.rate >= 1:
            return jnp.zeros_like(x)
        keys = example_keys(self.make_rng("dropout"), x.shape[0])
        shape = [1 if i in self.broadcast_dims else n for i, n in enumerate(x.shape)][1:]
        with jax.threefry_partitionable(False):  # every bit of every hash is used: 4 times as fast
            bits = jax.vmap(lambda key: jax.random.bits(key, shape, "uint16"))(keys)
        keep = bits >= min(round(self.rate * 2**16), 2**16 - 1)
        if self.broadcast_dims and jax.default_backend() == "cpu":
            # XLA would unpack the bits anew for every value of x, but keeps what is looked up.
            keep = jnp.array([False, True]).at[keep.astype(jnp.uint8)].get(mode="promise_in_bounds")
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))


def Dropout2d(rate, **kwargs):  # noqa: N802 (a layer's name)
    """Build torch.nn.Dropout2d: whole channels of [N, H, W, C] are zeroed together."""
    return Dropout(rate, broadcast_dims=(1, 2), **kwargs)


def example_keys(key, count):
    """Return keys [count], one per example here, from its position in the global batch."""
    axis_name = current_batch().axis_name
    first = 0 if axis_name is None else lax.axis_index(axis_name) * count
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


def flatten(x):
    """Return [N, C * H * W] from [N, H, W, C], in torch's order: channel, row, column."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
