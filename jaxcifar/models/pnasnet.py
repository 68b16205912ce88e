"""PNASNet's cells, simplified, for 32x32 images.

Source: Liu et al. 2018, "Progressive Neural Architecture Search"; cells A and B, widths, names and
initialisation follow kuangliu/pytorch-cifar, whose "separable" convolution has no 1x1 part.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import checks, layers, units


def _branches(x, features, stride, kernel_sizes, train, dtype):
    """Return depthwise convolutions of x, one for each kernel size, and its max pooling."""
    unit = functools.partial(units.conv_norm, train=train, dtype=dtype)
    filtered = [unit(x, features, kernel_size, stride, x.shape[-1],
                     names=(f"sep_conv{i}.conv1", f"sep_conv{i}.bn1"))
                for i, kernel_size in enumerate(kernel_sizes, start=1)]
    pooled = layers.max_pool(x, 3, stride, 1)
    if stride == 2:
        pooled = unit(pooled, features, names=("conv1", "bn1"))
    return filtered, pooled


class CellA(nn.Module):
    """A depthwise 7x7 convolution plus max pooling."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        (y,), pooled = _branches(x, self.features, self.stride, (7,), train, self.dtype)
        return layers.relu(y + pooled)


class CellB(nn.Module):
    """Depthwise 7x7 plus 3x3, beside max pooling plus depthwise 5x5, joined by a 1x1."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        (seven, three, five), pooled = _branches(
            x, self.features, self.stride, (7, 3, 5), train, self.dtype)
        joined = [layers.relu(seven + three), layers.relu(pooled + five)]
        y = units.conv_norm(jnp.concatenate(joined, axis=-1), self.features,
                            names=("conv2", "bn2"), train=train, dtype=self.dtype)
        return layers.relu(y)


CELLS = {"A": CellA, "B": CellB}


class PNASNet(nn.Module):
    """A stem, three stages of cells with a cell of stride 2 between, pooling and a classifier.

    cell: "A" or "B"; num_cells: of each stage; width: of the stem and the first stage, doubled by
    each cell of stride 2.
    """

    num_classes: int = 10
    cell: str = "A"
    num_cells: int = 6
    width: int = 44
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        if self.cell not in CELLS:
            raise UserError(f"pnasnet: unknown cell {self.cell!r}: choose 'A' or 'B'")
        checks.check_positive("pnasnet", num_cells=self.num_cells, width=self.width)
        cell = functools.partial(CELLS[self.cell], dtype=self.dtype)
        x = units.conv_norm(images, self.width, 3, names=("conv1", "bn1"), train=train,
                            dtype=self.dtype)
        x = layers.relu(x)
        for stage in range(3):
            features = self.width * 2 ** stage
            if stage > 0:
                x = cell(features, 2, name=f"layer{2 * stage}")(x, train)
            for i in range(self.num_cells):
                x = cell(features, name=f"layer{2 * stage + 1}.{i}")(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
