"""EfficientNet-B0 for 32x32 images.

Source: Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks";
strides, names and initialisation follow kuangliu/pytorch-cifar, whose network has no wide 1x1
convolution before its classifier.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import checks, layers, units


class Block(nn.Module):
    """Expand, filter each channel, squeeze-and-excitation, project; a shortcut if shapes agree.

    drop_connect: the probability that, in training, an example skips all but the shortcut.
    """

    features: int
    kernel_size: int
    stride: int
    expansion: int
    drop_connect: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        width = self.expansion * x.shape[-1]
        if self.expansion == 1:
            # Never used, but checkpoints hold it; train=False leaves its statistics as they were.
            units.conv_norm(x, width, names=("conv1", "bn1"), train=False, dtype=self.dtype)
            y = x
        else:
            y = nn.swish(unit(x, width, names=("conv1", "bn1")))
        y = unit(y, width, self.kernel_size, self.stride, width, names=("conv2", "bn2"))
        y = units.squeeze_excitation(
            nn.swish(y), max(1, x.shape[-1] // 4), nn.swish, dtype=self.dtype)
        y = unit(y, self.features, names=("conv3", "bn3"))
        if self.stride != 1 or x.shape[-1] != self.features:
            return y
        return layers.Dropout(self.drop_connect, broadcast_dims=(1, 2, 3))(y, train) + x


class EfficientNet(nn.Module):
    """A stem, stages of mobile inverted bottlenecks, average pooling, dropout and a classifier.

    expansion, channels, blocks, kernel_sizes, strides: of each stage, the stride being its
    first block's. dropout: before the classifier. drop_connect: of the last block, growing
    linearly with depth from 0 at the first. pytorch-cifar's configuration says 0.2, as the paper,
    but its block counter never advances, so what it trains with is the default here, 0.
    """

    num_classes: int = 10
    expansion: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    blocks: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    stem_width: int = 32
    dropout: float = 0.2
    drop_connect: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_per_stage(
            "efficientnet", expansion=self.expansion, channels=self.channels,
            blocks=self.blocks, kernel_sizes=self.kernel_sizes, strides=self.strides)
        checks.check_positive("efficientnet", stem_width=self.stem_width)
        checks.check_rate("efficientnet", dropout=self.dropout, drop_connect=self.drop_connect)
        if any(kernel_size % 2 == 0 for kernel_size in self.kernel_sizes):
            raise UserError(f"efficientnet: kernel_sizes {self.kernel_sizes}: give odd ones")
        x = units.conv_norm(images, self.stem_width, 3, names=("conv1", "bn1"), train=train,
                            dtype=self.dtype)
        x = nn.swish(x)
        stages = zip(self.expansion, self.channels, self.blocks, self.kernel_sizes,
                     self.strides)
        index, total = 0, sum(self.blocks)
        for expansion, features, count, kernel_size, stride in stages:
            for i in range(count):
                x = Block(features, kernel_size, 1 if i else stride, expansion,
                          self.drop_connect * index / total, self.dtype,
                          name=f"layers.{index}")(x, train)
                index += 1
        x = layers.Dropout(self.dropout)(layers.global_avg_pool(x), train)
        return layers.Linear(self.num_classes, name="linear")(x)
