"""DenseNet-BC for 32x32 images; names and the order of concatenation follow kuangliu/pytorch-cifar.

Source: Huang et al. 2017, "Densely Connected Convolutional Networks".
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import layers
from jaxcifar.models.checks import check_counts, check_positive


class Bottleneck(nn.Module):
    """1x1 convolution to 4 * growth_rate channels, 3x3 to growth_rate; put before the input's."""

    growth_rate: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        y = conv(4 * self.growth_rate, 1, name="conv1")(layers.relu(norm(name="bn1")(x, train)))
        y = layers.relu(norm(name="bn2")(y, train))
        y = conv(self.growth_rate, 3, 1, 1, name="conv2")(y)
        return jnp.concatenate([y, x.astype(y.dtype)], axis=-1)


class Transition(nn.Module):
    """1x1 convolution to half the channels, 2x2 average pooling."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        y = layers.relu(layers.BatchNorm(dtype=self.dtype, name="bn")(x, train))
        y = layers.Conv(x.shape[-1] // 2, 1, use_bias=False, dtype=self.dtype, name="conv")(y)
        return layers.avg_pool(y, 2)


class DenseNet(nn.Module):
    """A 3x3 stem, dense blocks with transitions between them, average pooling, a classifier.

    growth_rate: channels that a bottleneck adds; the stem has twice as many. blocks: bottlenecks
    of each dense block. Defaults: DenseNet-121 (6,956,298 parameters).
    """

    num_classes: int = 10
    growth_rate: int = 32
    blocks: tuple[int, ...] = (6, 12, 24, 16)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        check_positive("densenet", growth_rate=self.growth_rate)
        check_counts("densenet", blocks=self.blocks)
        x = layers.Conv(2 * self.growth_rate, 3, 1, 1, use_bias=False, dtype=self.dtype,
                        name="conv1")(images)
        for stage, count in enumerate(self.blocks, start=1):
            for i in range(count):
                x = Bottleneck(self.growth_rate, self.dtype, name=f"dense{stage}.{i}")(x, train)
            if stage < len(self.blocks):
                x = Transition(self.dtype, name=f"trans{stage}")(x, train)
        x = layers.relu(layers.BatchNorm(dtype=self.dtype, name="bn")(x, train))
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
