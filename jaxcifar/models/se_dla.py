"""The network of se_resnet_report: squeeze-excitation bottlenecks in the trees of DLA.

Sources: Hu et al. 2018, "Squeeze-and-Excitation Networks"; Yu et al. 2018, "Deep Layer
Aggregation". Structure and names are those of the team's published code (DLEnthusiasts), whose
trees are pytorch-cifar's SimpleDLA.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import layers, units
from jaxcifar.models.dla import SimpleTree

_REDUCTION = 16
_SEARCHED = {"filter_size": (3, 5), "shortcut_kernel": (1, 3)}


class SqueezeExcitation(nn.Module):
    """Scale every channel by a gate that two linear layers without biases compute of the means."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        gate = layers.global_avg_pool(x)
        gate = layers.Linear(channels // _REDUCTION, use_bias=False, dtype=self.dtype,
                             name="fc.0")(gate)
        gate = layers.Linear(channels, use_bias=False, dtype=self.dtype,
                             name="fc.2")(layers.relu(gate))
        return layers.multiply_by_gate(x, nn.sigmoid(gate)[:, None, None])


class SEBottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions of one width, squeeze-excitation, shortcut."""

    features: int
    stride: int = 1
    shortcut_kernel: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv_norm = functools.partial(units.conv_norm, features=self.features, train=train,
                                      dtype=self.dtype)
        y = layers.relu(conv_norm(x, names=("conv1", "bn1")))
        y = layers.relu(conv_norm(y, kernel_size=3, stride=self.stride, names=("conv2", "bn2")))
        y = conv_norm(y, names=("conv3", "bn3"))
        y = SqueezeExcitation(self.dtype, name="se")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv_norm(x, kernel_size=self.shortcut_kernel, stride=self.stride,
                          names=("shortcut.0", "shortcut.1"))
        return layers.relu(y + x)


class SEDLA(nn.Module):
    """Three convolutions, four trees, adaptive average pooling, a linear classifier.

    The options are those of the report's search: C1, C2, C3: widths of the stem's convolutions;
    C4: width of every tree; filter_size: kernel of the stem, 3 or 5; shortcut_kernel: of the
    projections, 1 or 3 (the published code takes this option and always uses 1); pool_size: rows
    and columns of the map that the classifier sees. Defaults: the best found.
    """

    num_classes: int = 10
    C1: int = 16
    C2: int = 32
    C3: int = 128
    C4: int = 256
    filter_size: int = 3
    shortcut_kernel: int = 1
    pool_size: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        for option, allowed in _SEARCHED.items():
            if getattr(self, option) not in allowed:
                raise UserError(f"model option {option} = {getattr(self, option)}: expected "
                                f"{' or '.join(map(str, allowed))}")
        if self.C4 % _REDUCTION:
            raise UserError(f"model option C4 = {self.C4}: expected a multiple of {_REDUCTION}, "
                            "by which squeeze-excitation reduces it")
        x = images
        for name, width in (("base", self.C1), ("layer1", self.C2), ("layer2", self.C3)):
            x = layers.relu(units.conv_norm(x, width, self.filter_size, train=train, dtype=self.dtype,
                                            names=(f"{name}.0", f"{name}.1")))
        block = functools.partial(SEBottleneck, shortcut_kernel=self.shortcut_kernel)
        for stage, (level, stride) in enumerate(((1, 1), (2, 2), (2, 2), (1, 2)), start=3):
            x = SimpleTree(self.C4, level, stride, self.dtype, block, name=f"layer{stage}")(x, train)
        x = layers.flatten(layers.adaptive_avg_pool(x, self.pool_size))
        return layers.Linear(self.num_classes, name="linear")(x)
