"""ResNeXt-29 for 32x32 images; names follow kuangliu/pytorch-cifar.

Source: Xie et al. 2017, "Aggregated Residual Transformations for Deep Neural Networks".
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import layers
from jaxcifar.models.checks import check_counts, check_positive


class Block(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions, to twice the groups' total width, and a shortcut."""

    cardinality: int
    bottleneck_width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        width = self.cardinality * self.bottleneck_width
        y = layers.relu(norm(name="bn1")(conv(width, 1, name="conv1")(x), train))
        y = conv(width, 3, self.stride, 1, self.cardinality, name="conv2")(y)
        y = layers.relu(norm(name="bn2")(y, train))
        y = norm(name="bn3")(conv(2 * width, 1, name="conv3")(y), train)
        if self.stride != 1 or x.shape[-1] != 2 * width:
            x = conv(2 * width, 1, self.stride, name="shortcut.0")(x)
            x = norm(name="shortcut.1")(x, train)
        return layers.relu(y + x)


class ResNeXt(nn.Module):
    """A 1x1 stem, stages of Blocks, average pooling and a linear classifier.

    blocks: of each stage; the groups' width doubles and the map halves from stage to stage.
    cardinality: groups of the 3x3 convolutions; bottleneck_width: channels of a group in the first
    stage; stem_width: of the first convolution. Defaults: ResNeXt-29 2x64d (9,128,778 parameters).
    """

    num_classes: int = 10
    cardinality: int = 2
    bottleneck_width: int = 64
    blocks: tuple[int, ...] = (3, 3, 3)
    stem_width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        check_positive("resnext", cardinality=self.cardinality,
                       bottleneck_width=self.bottleneck_width, stem_width=self.stem_width)
        check_counts("resnext", blocks=self.blocks)
        x = layers.Conv(
            self.stem_width, 1, use_bias=False, dtype=self.dtype, name="conv1")(images)
        x = layers.relu(layers.BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                x = Block(self.cardinality, self.bottleneck_width * 2 ** stage, stride, self.dtype,
                          name=f"layer{stage + 1}.{i}")(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
