"""ShuffleNet for 32x32 images.

Source: Zhang et al. 2018, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for
Mobile Devices"; the 1x1 stem, widths, names and initialisation follow kuangliu/pytorch-cifar.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import checks, layers, units


class Bottleneck(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; stride 2 appends the pooled input.

    features: of the last convolution; first_groups, groups: of the two 1x1 convolutions.
    """

    features: int
    stride: int
    first_groups: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        width = self.features // 4
        y = unit(x, width, groups=self.first_groups, names=("conv1", "bn1"))
        y = units.channel_shuffle(layers.relu(y), self.first_groups)
        y = layers.relu(unit(y, width, 3, self.stride, width, names=("conv2", "bn2")))
        y = unit(y, self.features, groups=self.groups, names=("conv3", "bn3"))
        if self.stride == 1:
            return layers.relu(y + x)
        pooled = layers.avg_pool(x, 3, 2, 1)
        return layers.relu(jnp.concatenate([y, pooled], axis=-1))


class ShuffleNet(nn.Module):
    """A 1x1 stem, stages of shuffled bottlenecks, average pooling and a linear classifier.

    channels, blocks: of each stage, whose first block has stride 2; groups: of the 1x1
    convolutions, but the first one after the stem, which is not grouped.
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (200, 400, 800)
    blocks: tuple[int, ...] = (4, 8, 4)
    groups: int = 2
    stem_width: int = 24
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_per_stage("shufflenet", channels=self.channels, blocks=self.blocks)
        checks.check_positive("shufflenet", groups=self.groups, stem_width=self.stem_width)
        x = units.conv_norm(images, self.stem_width, names=("conv1", "bn1"), train=train,
                            dtype=self.dtype)
        x = layers.relu(x)
        for stage, (total, count) in enumerate(zip(self.channels, self.blocks), start=1):
            for i in range(count):
                # What stride 2 appends is part of the stage's width.
                features = total if i else total - x.shape[-1]
                checks.check_groups(
                    "shufflenet", "channels inside a block", features // 4, self.groups)
                checks.check_groups("shufflenet", "channels of a block", features, self.groups)
                first_groups = 1 if stage == 1 and i == 0 else self.groups
                x = Bottleneck(features, 1 if i else 2, first_groups, self.groups, self.dtype,
                               name=f"layer{stage}.{i}")(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
