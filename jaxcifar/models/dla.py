"""Deep layer aggregation for 32x32 images: DLA and the simpler trees of SimpleDLA.

Source: Yu et al. 2018, "Deep Layer Aggregation"; trees, widths, names and initialisation follow
kuangliu/pytorch-cifar.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import checks, layers, units
from jaxcifar.models.resnet import BasicBlock


def _root(nodes, features, train, dtype):
    """Aggregate feature maps: a 1x1 convolution of their concatenation."""
    x = jnp.concatenate(nodes, axis=-1)
    return layers.relu(units.conv_norm(
        x, features, names=("root.conv", "root.bn"), train=train, dtype=dtype))


class Tree(nn.Module):
    """Hierarchical aggregation: one root joins the subtrees, two blocks and a block of the input.

    level: 1 for two blocks; 2 for a tree of level 1 before them. The first block has the stride.
    """

    features: int
    level: int = 1
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        block = functools.partial(BasicBlock, self.features, dtype=self.dtype)
        if self.level == 1:
            left = block(self.stride, name="left_node")(x, train)
            right = block(name="right_node")(left, train)
            return _root([left, right], self.features, train, self.dtype)
        nodes = [block(self.stride, name="prev_root")(x, train)]
        nodes.append(Tree(self.features, 1, self.stride, self.dtype, name="level_1")(x, train))
        for name in ("left_node", "right_node"):
            nodes.append(block(name=name)(nodes[-1], train))
        return _root(nodes, self.features, train, self.dtype)


class SimpleTree(nn.Module):
    """Binary aggregation: a root joins two blocks (level 1) or two trees of one level less.

    block: module class of (features, stride, dtype=, name=).
    """

    features: int
    level: int = 1
    stride: int = 1
    dtype: Any = jnp.float32
    block: Any = BasicBlock

    @nn.compact
    def __call__(self, x, train):
        if self.level == 1:
            half = functools.partial(self.block, self.features)
        else:
            half = functools.partial(SimpleTree, self.features, self.level - 1, block=self.block)
        left = half(self.stride, dtype=self.dtype, name="left_tree")(x, train)
        right = half(1, dtype=self.dtype, name="right_tree")(left, train)
        return _root([left, right], self.features, train, self.dtype)


class DLA(nn.Module):
    """Three convolutions, stages of trees, average pooling and a linear classifier.

    stem_channels: of the convolutions; channels, levels, strides: of each tree; simple: whether
    the trees are SimpleDLA's. DLA's own trees have levels 1 and 2 only.
    """

    num_classes: int = 10
    stem_channels: tuple[int, ...] = (16, 16, 32)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    levels: tuple[int, ...] = (1, 2, 2, 1)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    simple: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_counts("dla", stem_channels=self.stem_channels)
        checks.check_per_stage(
            "dla", channels=self.channels, levels=self.levels, strides=self.strides)
        if max(self.levels) > 2 and not self.simple:
            raise UserError(f"dla: trees of levels {self.levels}: choose 1 or 2 for each stage "
                            "(simple=True has trees of any level from 1)")
        x = images
        for i, features in enumerate(self.stem_channels):
            name = f"layer{i}" if i else "base"
            x = layers.relu(units.conv_norm(
                x, features, 3, names=(f"{name}.0", f"{name}.1"), train=train, dtype=self.dtype))
        tree = SimpleTree if self.simple else Tree
        stages = zip(self.channels, self.levels, self.strides)
        for stage, (features, level, stride) in enumerate(stages, start=len(self.stem_channels)):
            x = tree(features, level, stride, self.dtype, name=f"layer{stage}")(x, train)
        return layers.Linear(self.num_classes, name="linear")(layers.global_avg_pool(x))
