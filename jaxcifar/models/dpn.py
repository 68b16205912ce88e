"""Dual path networks for 32x32 images.

Source: Chen et al. 2017, "Dual Path Networks"; widths, strides, names and initialisation follow
kuangliu/pytorch-cifar.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import checks, layers, units


class Bottleneck(nn.Module):
    """A grouped bottleneck whose first `features` outputs are added and whose others are appended.

    width: of the 3x3 convolution; dense: channels that the block appends; project: whether the
    input is projected, as by the first block of a stage.
    """

    width: int
    features: int
    dense: int
    stride: int = 1
    groups: int = 32
    project: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        unit = functools.partial(units.conv_norm, train=train, dtype=self.dtype)
        d, total = self.features, self.features + self.dense
        y = layers.relu(unit(x, self.width, names=("conv1", "bn1")))
        y = layers.relu(unit(y, self.width, 3, self.stride, self.groups, names=("conv2", "bn2")))
        y = unit(y, total, names=("conv3", "bn3"))
        if self.project:
            x = unit(x, total, 1, self.stride, names=("shortcut.0", "shortcut.1"))
        joined = [x[..., :d] + y[..., :d], x[..., d:], y[..., d:]]
        return layers.relu(jnp.concatenate(joined, axis=-1))


class DPN(nn.Module):
    """A stem, four stages of dual path bottlenecks, average pooling and a linear classifier.

    widths, channels, blocks, dense: of each stage: channels of the 3x3 convolutions, of the
    residual path, number of blocks, channels that each block appends; every stage but the first
    halves the map. groups: of the 3x3 convolutions.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (96, 192, 384, 768)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    dense: tuple[int, ...] = (16, 32, 24, 128)
    groups: int = 32
    stem_width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_per_stage("dpn", widths=self.widths, channels=self.channels,
                               blocks=self.blocks, dense=self.dense)
        checks.check_positive("dpn", groups=self.groups, stem_width=self.stem_width)
        for width in self.widths:
            checks.check_groups("dpn", "channels of a 3x3 convolution", width, self.groups)
        x = units.conv_norm(images, self.stem_width, 3, names=("conv1", "bn1"), train=train,
                            dtype=self.dtype)
        x = layers.relu(x)
        stages = zip(self.widths, self.channels, self.blocks, self.dense)
        for stage, (width, features, count, dense) in enumerate(stages, start=1):
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                x = Bottleneck(width, features, dense, stride, self.groups, i == 0, self.dtype,
                               name=f"layer{stage}.{i}")(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
