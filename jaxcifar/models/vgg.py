"""VGG with BatchNorm for 32x32 images; names follow kuangliu/pytorch-cifar.

Source: Simonyan & Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image
Recognition" (configurations A, B, D and E, with one linear layer in place of three).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import layers
from jaxcifar.models.checks import check_per_stage


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each stage halved by max pooling, and a linear classifier.

    channels, blocks: width and number of convolutions of each stage. Defaults: VGG-16
    (14,728,266 parameters).
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    blocks: tuple[int, ...] = (2, 2, 3, 3, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        check_per_stage("vgg", channels=self.channels, blocks=self.blocks)
        x, i = images, 0  # i: the position in torch's Sequential: convolution, BatchNorm, ReLU, ...
        for features, count in zip(self.channels, self.blocks):
            for _ in range(count):
                x = layers.Conv(features, 3, 1, 1, dtype=self.dtype, name=f"features.{i}")(x)
                x = layers.BatchNorm(dtype=self.dtype, name=f"features.{i + 1}")(x, train)
                x = layers.relu(x)
                i += 3
            x = layers.max_pool(x, 2)
            i += 1
        return layers.Linear(self.num_classes, name="classifier")(layers.flatten(x))
