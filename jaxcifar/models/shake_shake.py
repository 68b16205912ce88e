"""Shake-Shake networks for 32x32 images, such as 26 2x32d (depth, branches x width).

Source: Gastaldi 2017, "Shake-Shake regularization" (arXiv 1705.07485) and its published code:
structure, initialisation, and coefficients drawn for every image in both passes ("S-S-I"). Names
follow owruby/shake-shake_pytorch, which leaves out the stem's BatchNorm (bn_in) and gives its
convolution a bias, so that its files of weights do not fit. The second path of a shortcut is shifted
up and left, as there and in AutoAugment's code, so that a strided one meets no padding; Gastaldi's
shifts it down and right.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import layers
from jaxcifar.models.checks import check_positive


@jax.custom_vjp
def shake(a, b, alpha, beta):
    """Return alpha a + (1 - alpha) b, whose gradient is that of beta a + (1 - beta) b.

    a, b: [N, ...] of one dtype, which the result has; alpha, beta: float32, shapes that broadcast
    against a, without a gradient of their own. Sums are float32.
    """
    del beta
    return _mix(a, b, alpha)


def _mix(a, b, alpha):
    return (alpha * a + (1 - alpha) * b).astype(a.dtype)


def _shake_forward(a, b, alpha, beta):
    return _mix(a, b, alpha), (alpha, beta)


def _shake_backward(residuals, dy):
    alpha, beta = residuals
    return ((beta * dy).astype(dy.dtype), ((1 - beta) * dy).astype(dy.dtype),
            jnp.zeros_like(alpha), jnp.zeros_like(beta))


shake.defvjp(_shake_forward, _shake_backward)


class ShakeShake(nn.Module):
    """Mix two branches: in training by numbers drawn per image from U(0, 1), else half and half.

    Forward and backward coefficients are independent. As in layers.Dropout, they come from the
    layer's key (rng "dropout") and the example's position in the global batch.
    """

    @nn.compact
    def __call__(self, a, b, train):
        if not train:
            return (a + b) / 2
        keys = layers.example_keys(self.make_rng("dropout"), a.shape[0])
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (2, *(1,) * (a.ndim - 1))))(keys)
        return shake(a, b, drawn[:, 0], drawn[:, 1])


class Branch(nn.Module):
    """3x3 convolution, BatchNorm, ReLU, 3x3 convolution, BatchNorm, of a map that is rectified."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, self.features, 3, use_bias=False, dtype=self.dtype,
                                 kernel_init=layers.kaiming_normal_fan_out)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        # The names are places in a torch Sequential, where 0 and 3 are ReLUs.
        x = layers.relu(norm(name="2")(conv(self.stride, 1, name="1")(x), train))
        return norm(name="5")(conv(1, 1, name="4")(x), train)


class Shortcut(nn.Module):
    """Two 1x1 convolutions to half the channels, one of the map moved by a pixel; BatchNorm."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, self.features // 2, 1, self.stride, use_bias=False,
                                 dtype=self.dtype, kernel_init=layers.kaiming_normal_fan_out)
        moved = jnp.pad(x[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
        x = jnp.concatenate([conv(name="conv1")(x), conv(name="conv2")(moved)], axis=-1)
        return layers.BatchNorm(dtype=self.dtype, name="bn")(x, train)


class Block(nn.Module):
    """Two branches of the rectified input, mixed, and a shortcut, of it too where widths differ."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        options = {"features": self.features, "stride": self.stride, "dtype": self.dtype}
        rectified = layers.relu(x)
        branches = [Branch(**options, name=name)(rectified, train)
                    for name in ("branch1", "branch2")]
        if x.shape[-1] != self.features:
            x = Shortcut(**options, name="shortcut")(rectified, train)
        return x + ShakeShake(name="shake")(*branches, train)


class ShakeShakeNet(nn.Module):
    """A 3x3 stem to 16 channels, three stages of Blocks, average pooling and a linear classifier.

    depth: 6 n + 2 for n blocks a stage; width: channels of the first stage, even, doubled from
    stage to stage. Defaults: 26 2x32d (2,923,162 parameters).
    """

    num_classes: int = 10
    depth: int = 26
    width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        check_positive("shake_shake", depth=self.depth, width=self.width)
        if self.depth < 8 or self.depth % 6 != 2:
            raise UserError(f"shake_shake: depth is {self.depth}: give 6 n + 2, such as 20 or 26")
        if self.width % 2:
            raise UserError(f"shake_shake: width is {self.width}: give an even number, as the two "
                            "paths of a shortcut have half of the channels each")
        x = layers.Conv(16, 3, 1, 1, use_bias=False, dtype=self.dtype,
                        kernel_init=layers.kaiming_normal_fan_out, name="c_in")(images)
        x = layers.BatchNorm(dtype=self.dtype, name="bn_in")(x, train)
        for stage in (1, 2, 3):
            for i in range((self.depth - 2) // 6):
                stride = 2 if stage > 1 and i == 0 else 1
                x = Block(self.width * 2 ** (stage - 1), stride, self.dtype,
                          name=f"layer{stage}.{i}")(x, train)
        x = layers.global_avg_pool(layers.relu(x))
        return layers.Linear(self.num_classes, bias_init=nn.initializers.zeros, name="fc_out")(x)
