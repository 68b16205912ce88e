"""What the ImageNet models share: torchvision's blocks, and the warning about small images.

Source: torchvision.models, whose definitions and state_dict names they follow, so that its
ImageNet weights load. All of them take `part`: "all", "features" to return what
the last linear layer (and the dropout before it) sees, [N, C], or "head" to take that for images.
"""

import functools
import warnings
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import layers

_SMALL = 64  # pixels; of anything smaller the stages, 32 times smaller, leave 2x2 cells or one


def warn_small_images(module, name, images, instead):
    """Warn, once per process, when a model with an ImageNet stem is applied to small images.

    module: the linen module, silent while it initialises; name: of the model in the registry;
    images: [N, H, W, 3]; instead: what to use for such images.
    """
    size = min(images.shape[1:3])
    if size < _SMALL and not module.is_initializing():
        _warn(name, size, instead)


@functools.cache
def _warn(name, size, instead):
    cells = -(-size // 32)
    warnings.warn(
        f"model {name!r} has an ImageNet stem, made for 224x224 pixels: of {size}x{size} it leaves "
        f"{cells}x{cells} cell(s); use {instead} for these, or larger images", stacklevel=3)


def block(module, remat):
    """Return a block's module class; with remat, one whose activations are not kept for its gradient.

    The class's __call__ takes (x, train).
    """
    return nn.remat(module, static_argnums=(2,)) if remat else module


def make_divisible(channels, divisor=8):
    """Return the nearest multiple of `divisor`, at least 90% of `channels` (torchvision's)."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


class ConvNormActivation(nn.Module):
    """torchvision.ops.Conv2dNormActivation: "0" a convolution without bias, "1" a BatchNorm."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    activation: Any = None
    eps: float = 1e-3
    momentum: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = layers.Conv(self.features, self.kernel_size, self.stride, (self.kernel_size - 1) // 2,
                        groups=self.groups, use_bias=False, kernel_init=layers.kaiming_normal_fan_out,
                        dtype=self.dtype, name="0")(x)
        x = layers.BatchNorm(eps=self.eps, momentum=self.momentum, dtype=self.dtype,
                             name="1")(x, train)
        return x if self.activation is None else self.activation(x)


class SqueezeExcitation(nn.Module):
    """torchvision.ops.SqueezeExcitation: 1x1 convolutions fc1 and fc2 of the channels' means."""

    squeeze: int
    activation: Any
    gate: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(layers.Conv, kernel_size=1, kernel_init=layers.kaiming_normal_fan_out,
                                 bias_init=nn.initializers.zeros, dtype=self.dtype)
        means = layers.global_avg_pool(x)[:, None, None]
        hidden = self.activation(conv(self.squeeze, name="fc1")(means))
        return layers.multiply_by_gate(x, self.gate(conv(x.shape[-1], name="fc2")(hidden)))
