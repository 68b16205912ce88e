"""The 3-convolution network of architectures_report (experiment 2)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.models import layers


class CNN3(nn.Module):
    """Three 3x3 convolutions of stride 2, max pooling, channel dropout, three linear layers.

    filters: of the convolutions; hidden: widths of the linear layers before the classifier;
    dropout: the probability that a channel is zeroed (torch.nn.Dropout2d).
    """

    num_classes: int = 10
    filters: tuple[int, ...] = (32, 64, 128)
    hidden: tuple[int, ...] = (512, 40)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        x = images
        for i, features in enumerate(self.filters, start=1):
            x = layers.Conv(features, 3, 2, 1, dtype=self.dtype, name=f"conv{i}")(x)
            x = layers.relu(x)
        x = layers.max_pool(x, 2)
        x = layers.Dropout2d(self.dropout)(x, train)
        x = layers.flatten(x)
        for i, width in enumerate(self.hidden, start=1):
            x = layers.relu(layers.Linear(width, dtype=self.dtype, name=f"fc{i}")(x))
        return layers.Linear(self.num_classes, name=f"fc{len(self.hidden) + 1}")(x)
