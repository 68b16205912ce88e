"""Wide residual networks for 32x32 images (WRN-depth-width).

Source: Zagoruyko & Komodakis 2016, "Wide Residual Networks": structure and initialisation. Names
follow the PyTorch port xternalz/WideResNet-pytorch, whose checkpoints (RobustBench's and AugMix's
too) are the common ones. Options add squeeze-and-excitation (Hu et al. 2018) and stochastic depth
(Huang et al. 2016, "Deep Networks with Stochastic Depth").
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import layers
from jaxcifar.models.checks import check_positive, check_rate
from jaxcifar.models.units import squeeze_excitation


class WideBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, dropout between the two.

    reduction: the squeeze-and-excitation's, 0 for none; drop: the probability that training leaves
    out the branch for an image.
    """

    features: int
    stride: int = 1
    dropout: float = 0.0
    reduction: int = 0
    drop: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(layers.Conv, self.features, use_bias=False, dtype=self.dtype,
                                 kernel_init=layers.kaiming_normal_fan_out)
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        y = layers.relu(norm(name="bn1")(x, train))
        if x.shape[-1] != self.features:
            x = conv(1, self.stride, name="convShortcut")(y)
        y = layers.relu(norm(name="bn2")(conv(3, self.stride, 1, name="conv1")(y), train))
        y = layers.Dropout(self.dropout)(y, train)
        y = conv(3, 1, 1, name="conv2")(y)
        if self.reduction:
            y = squeeze_excitation(y, self.features // self.reduction, dtype=self.dtype)
        return x + layers.Dropout(self.drop, broadcast_dims=(1, 2, 3))(y, train)


class WideResNet(nn.Module):
    """A 3x3 stem to 16 channels, three stages of WideBlocks, average pooling and a classifier.

    depth: 6 n + 4 for n blocks a stage; width: the stages' 16, 32 and 64 channels are multiplied
    by it, fractions allowed where 16 width is whole; dropout: between a block's convolutions (0.3
    in the paper where there is any); se_reduction: channels per hidden channel of the
    squeeze-and-excitation that ends a block's branch, 0 for none; stochastic_depth: probability of
    leaving out the last block's branch for an image; the l-th of L blocks has l / L of it.
    Defaults: WRN-28-10 (36,479,194 parameters).
    """

    num_classes: int = 10
    depth: int = 28
    width: float = 10
    dropout: float = 0.0
    se_reduction: int = 0
    stochastic_depth: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        self._check()
        x = layers.Conv(16, 3, 1, 1, use_bias=False, dtype=self.dtype,
                        kernel_init=layers.kaiming_normal_fan_out, name="conv1")(images)
        count = (self.depth - 4) // 6
        for stage in (1, 2, 3):
            features = int(8 * 2 ** stage * self.width)
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                drop = self.stochastic_depth * ((stage - 1) * count + i + 1) / (3 * count)
                x = WideBlock(features, stride, self.dropout, self.se_reduction, drop, self.dtype,
                              name=f"block{stage}.layer.{i}")(x, train)
        x = layers.relu(layers.BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        x = layers.global_avg_pool(x)
        return layers.Linear(self.num_classes, bias_init=nn.initializers.zeros, name="fc")(x)

    def _check(self):
        """Raise UserError for options that make no network."""
        check_positive("wide_resnet", depth=self.depth)
        check_rate("wide_resnet", dropout=self.dropout, stochastic_depth=self.stochastic_depth)
        if self.depth < 10 or self.depth % 6 != 4:
            raise UserError(f"wide_resnet: depth is {self.depth}: give 6 n + 4, such as 16 or 28")
        width = self.width
        if isinstance(width, bool) or not isinstance(width, int | float) or not (
                width > 0 and 16 * width % 1 == 0):
            raise UserError(f"wide_resnet: width is {width!r}: give a number above 0 by which 16 "
                            "channels stay whole, such as 2 or 3.5")
        if self.se_reduction:
            check_positive("wide_resnet", se_reduction=self.se_reduction, **{
                "channels // se_reduction": int(16 * width) // self.se_reduction})
