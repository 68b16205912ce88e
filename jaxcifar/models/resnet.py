"""Residual networks for 32x32 images: pytorch-cifar's, and the family of resnet5m_report.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition"; names follow
kuangliu/pytorch-cifar.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import layers
from jaxcifar.models.checks import check_per_stage


def shortcut_padding(kernel, stride):
    """Return the padding that gives a shortcut the map size of the block's own convolutions.

    Odd kernels: (kernel - 1) / 2 on each side. Even kernels: none where the stride is 2 (32 to 16,
    as the report's 2x2 shortcut); where it is 1, the odd row and column go to the bottom and
    right, as torch's padding="same".
    """
    if kernel % 2:
        return kernel // 2
    if stride > 1:
        return (kernel - 2) // 2
    side = ((kernel - 1) // 2, kernel // 2)
    return (side, side)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is projected where the stride or the width changes."""

    features: int
    stride: int = 1
    kernel_size: int = 3
    shortcut_kernel: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, self.features, use_bias=False, dtype=self.dtype)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        size, padding = self.kernel_size, self.kernel_size // 2
        y = conv(size, self.stride, padding, name="conv1")(x)
        y = layers.relu(norm(name="bn1")(y, train))
        y = norm(name="bn2")(conv(size, 1, padding, name="conv2")(y), train)
        if self.stride != 1 or x.shape[-1] != self.features:
            kernel = self.shortcut_kernel
            padding = shortcut_padding(kernel, self.stride)
            x = conv(kernel, self.stride, padding, name="shortcut.0")(x)
            x = norm(name="shortcut.1")(x, train)
        return layers.relu(y + x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to 4 * features, and a shortcut as BasicBlock's."""

    features: int
    stride: int = 1
    kernel_size: int = 3
    shortcut_kernel: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        size, width = self.kernel_size, 4 * self.features
        y = layers.relu(norm(name="bn1")(conv(self.features, 1, name="conv1")(x), train))
        y = conv(self.features, size, self.stride, size // 2, name="conv2")(y)
        y = layers.relu(norm(name="bn2")(y, train))
        y = norm(name="bn3")(conv(width, 1, name="conv3")(y), train)
        if self.stride != 1 or x.shape[-1] != width:
            kernel = self.shortcut_kernel
            padding = shortcut_padding(kernel, self.stride)
            x = conv(width, kernel, self.stride, padding, name="shortcut.0")(x)
            x = norm(name="shortcut.1")(x, train)
        return layers.relu(y + x)


class ResNet(nn.Module):
    """A stem, stages of BasicBlocks, average pooling and a linear classifier.

    channels, blocks: width and number of blocks of each stage; the first block of every stage but
    the first has stride 2. kernel_size (odd): of the blocks' convolutions. shortcut_kernel: 1, 2
    or 3. stem_width, stem_kernel: of the first convolution. pool: size of the average pool, None
    for the whole map. bottleneck: Bottlenecks, four times as wide at their end, in place of
    BasicBlocks. Defaults: ResNet-5M model 1 of resnet5m_report (4,951,338 parameters).
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (64, 128, 128, 256)
    blocks: tuple[int, ...] = (5, 4, 3, 2)
    kernel_size: int = 3
    shortcut_kernel: int = 3
    stem_width: int = 32
    stem_kernel: int = 3
    pool: int | None = None
    bottleneck: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        check_per_stage("resnet", channels=self.channels, blocks=self.blocks)
        x = layers.Conv(self.stem_width, self.stem_kernel, padding=self.stem_kernel // 2,
                        use_bias=False, dtype=self.dtype, name="conv1")(images)
        x = layers.relu(layers.BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        block = Bottleneck if self.bottleneck else BasicBlock
        for stage, (features, count) in enumerate(zip(self.channels, self.blocks), start=1):
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                x = block(features, stride, self.kernel_size, self.shortcut_kernel, self.dtype,
                          name=f"layer{stage}.{i}")(x, train)
        x = layers.avg_pool(x, x.shape[1:3] if self.pool is None else self.pool)
        # The classifier is float32 whatever the dtype: at no cost, logits keep their digits.
        return layers.Linear(self.num_classes, name="linear")(layers.flatten(x))
