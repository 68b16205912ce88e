"""ResNet with the ImageNet stem, as torchvision.models.resnet18 defines it.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition".
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import imagenet, layers
from jaxcifar.models.checks import check_per_stage


class BasicBlock(nn.Module):
    """torchvision.models.resnet.BasicBlock."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, self.features, use_bias=False, dtype=self.dtype,
                                 kernel_init=layers.kaiming_normal_fan_out)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        y = layers.relu(norm(name="bn1")(conv(3, self.stride, 1, name="conv1")(x), train))
        y = norm(name="bn2")(conv(3, 1, 1, name="conv2")(y), train)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = norm(name="downsample.1")(conv(1, self.stride, name="downsample.0")(x), train)
        return layers.relu(y + x)


class ImageNetResNet(nn.Module):
    """A 7x7 convolution and a max pool, each of stride 2, four stages of blocks, a classifier.

    channels, blocks: width and number of blocks of each stage; remat: see imagenet.block. Defaults:
    torchvision's resnet18 (11,689,512 parameters with 1,000 classes).
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images, train, part="all"):
        x = images if part == "head" else self._features(images, train)
        return x if part == "features" else layers.Linear(self.num_classes, name="fc")(x)

    def _features(self, images, train):
        check_per_stage("imagenet_resnet18", channels=self.channels, blocks=self.blocks)
        imagenet.warn_small_images(self, "imagenet_resnet18", images, "'resnet18'")
        x = layers.Conv(self.channels[0], 7, 2, 3, use_bias=False, dtype=self.dtype,
                        kernel_init=layers.kaiming_normal_fan_out, name="conv1")(images)
        x = layers.relu(layers.BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        x = layers.max_pool(x, 3, 2, 1)
        for stage, (features, count) in enumerate(zip(self.channels, self.blocks), start=1):
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                block = imagenet.block(BasicBlock, self.remat)
                x = block(features, stride, self.dtype, name=f"layer{stage}.{i}")(x, train)
        return layers.global_avg_pool(x)
