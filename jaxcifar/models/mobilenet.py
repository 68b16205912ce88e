"""MobileNet for 32x32 images.

Source: Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications"; strides, names and initialisation follow kuangliu/pytorch-cifar.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import checks, layers, units


class Block(nn.Module):
    """A depthwise 3x3 convolution, then a pointwise one."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        width = x.shape[-1]
        x = layers.relu(unit(x, width, 3, self.stride, width, names=("conv1", "bn1")))
        return layers.relu(unit(x, self.features, names=("conv2", "bn2")))


class MobileNet(nn.Module):
    """A stem, depthwise separable convolutions, average pooling and a linear classifier.

    channels, strides: width and stride of each block; stem_width: of the first convolution.
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (
        64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    strides: tuple[int, ...] = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    stem_width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_per_stage("mobilenet", channels=self.channels, strides=self.strides)
        checks.check_positive("mobilenet", stem_width=self.stem_width)
        x = units.conv_norm(images, self.stem_width, 3, names=("conv1", "bn1"), train=train,
                            dtype=self.dtype)
        x = layers.relu(x)
        for i, (features, stride) in enumerate(zip(self.channels, self.strides)):
            x = Block(features, stride, self.dtype, name=f"layers.{i}")(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
