"""ShuffleNetV2 for 32x32 images.

Source: Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design"; the stem (3x3, stride 1, no pooling), widths, names and initialisation follow
kuangliu/pytorch-cifar.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import checks, layers, units


class BasicBlock(nn.Module):
    """Half of the channels pass through three convolutions, half stay; both are interleaved."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        half = x.shape[-1] // 2
        y = layers.relu(unit(x[..., half:], half, names=("conv1", "bn1")))
        y = unit(y, half, 3, 1, half, names=("conv2", "bn2"))
        y = layers.relu(unit(y, half, names=("conv3", "bn3")))
        return units.interleave(x[..., :half], y)


class DownBlock(nn.Module):
    """Two branches of stride 2, each giving half of the `features`, interleaved."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        width, half = x.shape[-1], self.features // 2
        left = unit(x, width, 3, 2, width, names=("conv1", "bn1"))
        left = layers.relu(unit(left, half, names=("conv2", "bn2")))
        right = layers.relu(unit(x, half, names=("conv3", "bn3")))
        right = unit(right, half, 3, 2, half, names=("conv4", "bn4"))
        right = layers.relu(unit(right, half, names=("conv5", "bn5")))
        return units.interleave(left, right)


class ShuffleNetV2(nn.Module):
    """A stem, stages of one DownBlock and BasicBlocks, a 1x1 convolution, pooling, a classifier.

    channels, blocks: of each stage, its DownBlock not counted; stem_width, head_width: of the
    first and of the last convolution. Defaults: width 1 of the paper's table 5.
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (116, 232, 464)
    blocks: tuple[int, ...] = (3, 7, 3)
    stem_width: int = 24
    head_width: int = 1024
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_per_stage("shufflenetv2", channels=self.channels, blocks=self.blocks)
        checks.check_positive(
            "shufflenetv2", stem_width=self.stem_width, head_width=self.head_width)
        for features in self.channels:
            checks.check_groups("shufflenetv2", "channels", features, 2)
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        x = layers.relu(unit(images, self.stem_width, 3, names=("conv1", "bn1")))
        for stage, (features, count) in enumerate(zip(self.channels, self.blocks), start=1):
            x = DownBlock(features, self.dtype, name=f"layer{stage}.0")(x, train)
            for i in range(1, count + 1):
                x = BasicBlock(self.dtype, name=f"layer{stage}.{i}")(x, train)
        x = layers.relu(unit(x, self.head_width, names=("conv2", "bn2")))
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
