"""MobileNetV2 for 32x32 images.

Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"; strides
(1 in the stem and in the second stage), shortcuts (projected where the width changes), names and
initialisation follow kuangliu/pytorch-cifar.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import checks, layers, units


class Block(nn.Module):
    """Expand, filter each channel, project; a shortcut where the stride is 1."""

    features: int
    expansion: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        width = self.expansion * x.shape[-1]
        y = layers.relu(unit(x, width, names=("conv1", "bn1")))
        y = layers.relu(unit(y, width, 3, self.stride, width, names=("conv2", "bn2")))
        y = unit(y, self.features, names=("conv3", "bn3"))
        if self.stride != 1:
            return y
        if x.shape[-1] != self.features:
            x = unit(x, self.features, names=("shortcut.0", "shortcut.1"))
        return y + x


class MobileNetV2(nn.Module):
    """A stem, stages of inverted residuals, a wide 1x1 convolution, pooling, a classifier.

    expansion, channels, blocks, strides: of each stage, the stride being its first block's;
    stem_width, head_width: of the first and of the last convolution.
    """

    num_classes: int = 10
    expansion: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    channels: tuple[int, ...] = (16, 24, 32, 64, 96, 160, 320)
    blocks: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)
    strides: tuple[int, ...] = (1, 1, 2, 2, 1, 2, 1)
    stem_width: int = 32
    head_width: int = 1280
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_per_stage(
            "mobilenetv2", expansion=self.expansion, channels=self.channels, blocks=self.blocks,
            strides=self.strides)
        checks.check_positive(
            "mobilenetv2", stem_width=self.stem_width, head_width=self.head_width)
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        x = layers.relu(unit(images, self.stem_width, 3, names=("conv1", "bn1")))
        stages = zip(self.expansion, self.channels, self.blocks, self.strides)
        index = 0
        for expansion, features, count, stride in stages:
            for i in range(count):
                x = Block(features, expansion, 1 if i else stride, self.dtype,
                          name=f"layers.{index}")(x, train)
                index += 1
        x = layers.relu(unit(x, self.head_width, names=("conv2", "bn2")))
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
