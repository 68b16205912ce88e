"""LeNet-5 as kuangliu/pytorch-cifar has it: ReLU, max pooling, three input channels.

Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition".
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import layers


class LeNet(nn.Module):
    """Two unpadded 5x5 convolutions, each max-pooled, and three linear layers (62,006 parameters).

    filters: of the convolutions; hidden: widths of the linear layers before the classifier.
    """

    num_classes: int = 10
    filters: tuple[int, ...] = (6, 16)
    hidden: tuple[int, ...] = (120, 84)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        x = images
        for i, features in enumerate(self.filters, start=1):
            x = layers.relu(layers.Conv(features, 5, dtype=self.dtype, name=f"conv{i}")(x))
            x = layers.max_pool(x, 2)
        x = layers.flatten(x)
        for i, width in enumerate(self.hidden, start=1):
            x = layers.relu(layers.Linear(width, dtype=self.dtype, name=f"fc{i}")(x))
        return layers.Linear(self.num_classes, name=f"fc{len(self.hidden) + 1}")(x)
