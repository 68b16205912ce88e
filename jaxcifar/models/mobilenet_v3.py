"""MobileNetV3, as torchvision.models.mobilenet_v3_small defines it.

Source: Howard et al. 2019, "Searching for MobileNetV3", table 2.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcifar.models import imagenet, layers

_ACTIVATIONS = {"RE": layers.relu, "HS": jax.nn.hard_swish}
_ConvNorm = functools.partial(imagenet.ConvNormActivation, momentum=0.01)
_linear = functools.partial(layers.Linear, kernel_init=nn.initializers.normal(0.01),
                            bias_init=nn.initializers.zeros)

SMALL = (  # kernel, expanded channels, channels, squeeze-excitation, activation, stride
    (3, 16, 16, True, "RE", 2),
    (3, 72, 24, False, "RE", 2),
    (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2),
    (5, 240, 40, True, "HS", 1),
    (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1),
    (5, 144, 48, True, "HS", 1),
    (5, 288, 96, True, "HS", 2),
    (5, 576, 96, True, "HS", 1),
    (5, 576, 96, True, "HS", 1),
)


class InvertedResidual(nn.Module):
    """torchvision's InvertedResidual: expand, depthwise, squeeze-excitation, project."""

    kernel_size: int
    expanded: int
    features: int
    squeeze: bool
    activation: str
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        activation = _ACTIVATIONS[self.activation]
        steps = []
        if self.expanded != x.shape[-1]:
            steps.append(functools.partial(_ConvNorm, self.expanded, activation=activation))
        steps.append(functools.partial(
            _ConvNorm, self.expanded, self.kernel_size, self.stride, self.expanded, activation))
        if self.squeeze:
            steps.append(functools.partial(
                imagenet.SqueezeExcitation, imagenet.make_divisible(self.expanded // 4),
                layers.relu, jax.nn.hard_sigmoid))
        steps.append(functools.partial(_ConvNorm, self.features))
        y = x
        for i, step in enumerate(steps):
            module = step(dtype=self.dtype, name=f"block.{i}")
            y = module(y) if isinstance(module, imagenet.SqueezeExcitation) else module(y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV3(nn.Module):
    """A stem of stride 2, inverted residuals, a 1x1 convolution, two linear layers.

    blocks: one row (kernel, expanded channels, channels, squeeze-excitation, "RE" or "HS", stride)
    per block; stem_width; last_width: of the hidden linear layer; dropout: on its output; remat: see
    imagenet.block. Defaults: torchvision's mobilenet_v3_small (2,542,856 parameters with 1,000
    classes).
    """

    num_classes: int = 10
    blocks: tuple[tuple, ...] = SMALL
    stem_width: int = 16
    last_width: int = 1024
    dropout: float = 0.2
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images, train, part="all"):
        x = images if part == "head" else self._features(images, train)
        if part == "features":
            return x
        x = layers.Dropout(self.dropout)(x, train)
        return _linear(self.num_classes, name="classifier.3")(x)

    def _features(self, images, train):
        imagenet.warn_small_images(self, "mobilenet_v3_small", images, "'mobilenetv2'")
        hard_swish = jax.nn.hard_swish
        x = _ConvNorm(self.stem_width, 3, 2, activation=hard_swish, dtype=self.dtype,
                      name="features.0")(images, train)
        for i, block in enumerate(self.blocks, start=1):
            module = imagenet.block(InvertedResidual, self.remat)
            x = module(*block, dtype=self.dtype, name=f"features.{i}")(x, train)
        x = _ConvNorm(6 * x.shape[-1], activation=hard_swish, dtype=self.dtype,
                      name=f"features.{len(self.blocks) + 1}")(x, train)
        x = _linear(self.last_width, dtype=self.dtype,
                    name="classifier.0")(layers.global_avg_pool(x))
        return hard_swish(x)
