"""RegNetX and RegNetY for 32x32 images.

Source: Radosavovic et al. 2020, "Designing Network Design Spaces"; the stem (64 channels, stride
1), strides, names and initialisation follow kuangliu/pytorch-cifar.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import checks, layers, units


class Block(nn.Module):
    """1x1, grouped 3x3, squeeze-and-excitation on request, 1x1, and a shortcut.

    se_ratio: channels inside squeeze-and-excitation per channel of the block's input; 0: none.
    """

    features: int
    stride: int
    group_width: int
    bottleneck_ratio: float = 1.0
    se_ratio: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        width = round(self.features * self.bottleneck_ratio)
        if width < 1 or width % self.group_width:
            raise UserError(f"regnet: {width} channels cannot be split into groups of "
                            f"{self.group_width}: choose multiples of the group width")
        groups = width // self.group_width
        y = layers.relu(unit(x, width, names=("conv1", "bn1")))
        y = layers.relu(unit(y, width, 3, self.stride, groups, names=("conv2", "bn2")))
        if self.se_ratio > 0:
            inner = max(1, round(x.shape[-1] * self.se_ratio))
            y = units.squeeze_excitation(y, inner, dtype=self.dtype)
        y = unit(y, self.features, names=("conv3", "bn3"))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = unit(x, self.features, 1, self.stride, names=("shortcut.0", "shortcut.1"))
        return layers.relu(y + x)


class RegNet(nn.Module):
    """A stem, stages of residual bottlenecks, average pooling and a linear classifier.

    channels, blocks, strides: of each stage, the stride being its first block's; group_width:
    channels in a group of the 3x3 convolutions; bottleneck_ratio: their width per output channel;
    se_ratio: see Block. Defaults: RegNetX-200MF.
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (24, 56, 152, 368)
    blocks: tuple[int, ...] = (1, 1, 4, 7)
    strides: tuple[int, ...] = (1, 1, 2, 2)
    group_width: int = 8
    bottleneck_ratio: float = 1.0
    se_ratio: float = 0.0
    stem_width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_per_stage(
            "regnet", channels=self.channels, blocks=self.blocks, strides=self.strides)
        checks.check_positive(
            "regnet", group_width=self.group_width, stem_width=self.stem_width)
        x = units.conv_norm(images, self.stem_width, 3, names=("conv1", "bn1"), train=train,
                            dtype=self.dtype)
        x = layers.relu(x)
        stages = zip(self.channels, self.blocks, self.strides)
        for stage, (features, count, stride) in enumerate(stages, start=1):
            for i in range(count):
                x = Block(features, 1 if i else stride, self.group_width, self.bottleneck_ratio,
                          self.se_ratio, self.dtype, name=f"layer{stage}.{i}")(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
