"""EfficientNetV2, as torchvision.models.efficientnet_v2_s defines it.

Source: Tan and Le 2021, "EfficientNetV2: Smaller Models and Faster Training", table 4.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import imagenet, layers

_ConvNorm = imagenet.ConvNormActivation

S = (  # kind, expansion, stride of the first block, channels, number of blocks
    ("fused", 1, 1, 24, 2),
    ("fused", 4, 2, 48, 4),
    ("fused", 4, 2, 64, 4),
    ("mb", 4, 2, 128, 6),
    ("mb", 6, 1, 160, 9),
    ("mb", 6, 2, 256, 15),
)


class Block(nn.Module):
    """torchvision's MBConv (kind "mb") or FusedMBConv ("fused"), 3x3.

    drop: the probability that training leaves out the block's branch for an image (stochastic
    depth).
    """

    kind: str
    expansion: int
    stride: int
    features: int
    drop: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        channels = x.shape[-1]
        expanded = imagenet.make_divisible(channels * self.expansion)
        conv = functools.partial(_ConvNorm, dtype=self.dtype)
        if self.kind == "fused" and expanded == channels:
            y = conv(self.features, 3, self.stride, activation=nn.silu, name="block.0")(x, train)
        elif self.kind == "fused":
            y = conv(expanded, 3, self.stride, activation=nn.silu, name="block.0")(x, train)
            y = conv(self.features, name="block.1")(y, train)
        else:
            first = int(expanded != channels)
            y = conv(expanded, activation=nn.silu, name="block.0")(x, train) if first else x
            y = conv(expanded, 3, self.stride, expanded, nn.silu, name=f"block.{first}")(y, train)
            y = imagenet.SqueezeExcitation(max(1, channels // 4), nn.silu, nn.sigmoid, self.dtype,
                                           name=f"block.{first + 1}")(y)
            y = conv(self.features, name=f"block.{first + 2}")(y, train)
        if self.stride != 1 or channels != self.features:
            return y
        return x + layers.Dropout(self.drop, broadcast_dims=(1, 2, 3))(y, train)


class EfficientNetV2(nn.Module):
    """A stem of stride 2, stages of (fused) inverted residuals, a 1x1 convolution, a classifier.

    stages: one row ("fused" or "mb", expansion, stride, channels, number of blocks) per stage;
    stem_width; last_width: of the last convolution; dropout: before the classifier;
    stochastic_depth: the probability of leaving out a block, which grows from 0 to this with depth.
    remat: see imagenet.block. Defaults: torchvision's efficientnet_v2_s (21,458,488 parameters with
    1,000 classes).
    """

    num_classes: int = 10
    stages: tuple[tuple, ...] = S
    stem_width: int = 24
    last_width: int = 1280
    dropout: float = 0.2
    stochastic_depth: float = 0.2
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images, train, part="all"):
        x = images if part == "head" else self._features(images, train)
        if part == "features":
            return x
        x = layers.Dropout(self.dropout)(x, train)
        return layers.Linear(self.num_classes, kernel_init=_uniform_fan_out,
                             bias_init=nn.initializers.zeros, name="classifier.1")(x)

    def _features(self, images, train):
        for stage in self.stages:
            if len(stage) != 5 or stage[0] not in ("fused", "mb"):
                raise UserError(f"model option stages: {stage} is not (\"fused\" or \"mb\", "
                                "expansion, stride, channels, number of blocks)")
        imagenet.warn_small_images(self, "efficientnet_v2_s", images, "'efficientnet_b0'")
        x = _ConvNorm(self.stem_width, 3, 2, activation=nn.silu, dtype=self.dtype,
                      name="features.0")(images, train)
        total, done = sum(stage[-1] for stage in self.stages), 0
        for i, (kind, expansion, stride, features, count) in enumerate(self.stages, start=1):
            for j in range(count):
                block = imagenet.block(Block, self.remat)
                x = block(kind, expansion, stride if j == 0 else 1, features,
                          self.stochastic_depth * done / total, self.dtype,
                          name=f"features.{i}.{j}")(x, train)
                done += 1
        x = _ConvNorm(self.last_width, activation=nn.silu, dtype=self.dtype,
                      name=f"features.{len(self.stages) + 1}")(x, train)
        return layers.global_avg_pool(x)


def _uniform_fan_out(key, shape, dtype=jnp.float32):
    return layers.uniform_fan_in(shape[-1])(key, shape, dtype)
