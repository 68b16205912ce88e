"""Pre-activation residual networks for 32x32 images, plain and with squeeze-and-excitation.

Sources: He et al. 2016, "Identity Mappings in Deep Residual Networks"; Hu et al. 2018,
"Squeeze-and-Excitation Networks". Names follow kuangliu/pytorch-cifar, and so does what its
definitions leave out: no normalisation after the last block.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import layers, units
from jaxcifar.models.checks import check_per_stage, check_positive


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; the projection shares the first.

    reduction: the squeeze-and-excitation's, 0 for none.
    """

    features: int
    stride: int = 1
    reduction: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, self.features, use_bias=False, dtype=self.dtype)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        y = layers.relu(norm(name="bn1")(x, train))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(1, self.stride, name="shortcut.0")(y)
        y = conv(3, self.stride, 1, name="conv1")(y)
        y = conv(3, 1, 1, name="conv2")(layers.relu(norm(name="bn2")(y, train)))
        if self.reduction:
            y = units.squeeze_excitation(y, self.features // self.reduction, names=("fc1", "fc2"),
                                         dtype=self.dtype)
        return y + x


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to 4 * features, BatchNorm and ReLU before each."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        y = layers.relu(norm(name="bn1")(x, train))
        if self.stride != 1 or x.shape[-1] != 4 * self.features:
            x = conv(4 * self.features, 1, self.stride, name="shortcut.0")(y)
        y = conv(self.features, 1, name="conv1")(y)
        y = layers.relu(norm(name="bn2")(y, train))
        y = conv(self.features, 3, self.stride, 1, name="conv2")(y)
        y = conv(4 * self.features, 1, name="conv3")(layers.relu(norm(name="bn3")(y, train)))
        return y + x


class PreActResNet(nn.Module):
    """A 3x3 stem, stages of pre-activation blocks, average pooling and a linear classifier.

    channels, blocks: width and number of blocks of each stage; the first block of every stage but
    the first has stride 2. bottleneck: PreActBottleneck, four times as wide at its end, in place
    of PreActBlock. stem_width: of the first convolution. Defaults: PreAct-ResNet-18 (11,171,146
    parameters).
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    stem_width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        check_per_stage("preact_resnet", channels=self.channels, blocks=self.blocks)
        check_positive("preact_resnet", stem_width=self.stem_width)
        block = PreActBottleneck if self.bottleneck else PreActBlock
        x = _conv1(self)(images)
        for name, features, stride in _blocks(self):
            x = block(features, stride, dtype=self.dtype, name=name)(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))


class SENet(nn.Module):
    """PreActResNet of PreActBlocks with squeeze-and-excitation; the stem is normalised too.

    channels, blocks, stem_width: as in PreActResNet; reduction: channels per channel of the
    squeeze-and-excitation's hidden layer. Defaults: SENet-18 (11,260,354 parameters).
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    reduction: int = 16
    stem_width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        check_per_stage("senet", channels=self.channels, blocks=self.blocks)
        check_positive("senet", reduction=self.reduction, stem_width=self.stem_width)
        check_positive("senet", **{"channels // reduction": min(self.channels) // self.reduction})
        x = layers.BatchNorm(dtype=self.dtype, name="bn1")(_conv1(self)(images), train)
        x = layers.relu(x)
        for name, features, stride in _blocks(self):
            x = PreActBlock(features, stride, self.reduction, self.dtype, name=name)(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))


def _conv1(model):
    return layers.Conv(
        model.stem_width, 3, 1, 1, use_bias=False, dtype=model.dtype, name="conv1")


def _blocks(model):
    """Yield (name, features, stride) of every block."""
    for stage, (features, count) in enumerate(zip(model.channels, model.blocks), start=1):
        for i in range(count):
            yield f"layer{stage}.{i}", features, 2 if stage > 1 and i == 0 else 1
