"""The convolutional network of cifar100_report; its fully connected one is `mlp.MLP`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import layers


class CIFAR100CNN(nn.Module):
    """Four convolutions without padding, max pool, two linear layers.

    filters, kernel_sizes: of the four convolutions, the first with stride 2; batch_norm: after
    every convolution, as the report says (42%; ours 44.4%); fc_batch_norm: after the first linear
    layer too, as in some public solutions of the same homework (ours 38.8% at best); fc_width: of
    that layer; dropout: on its output. In the last stage the order is convolution, BatchNorm, pool,
    ReLU. Names are the public code's (conv1, conv1_bn, ..., conv_final, fc1).
    """

    num_classes: int = 10
    filters: tuple[int, ...] = (128, 128, 128, 256)
    kernel_sizes: tuple[int, ...] = (5, 3, 3, 3)
    batch_norm: bool = False
    fc_batch_norm: bool = False
    fc_width: int = 4096
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        for option in ("filters", "kernel_sizes"):
            if len(getattr(self, option)) != 4:
                raise UserError(f"model option {option} = {getattr(self, option)}: expected four "
                                "numbers, one per convolution")
        x = images
        names = ("conv1", "conv2", "conv3", "conv_final")
        for name, features, kernel in zip(names, self.filters, self.kernel_sizes):
            last = name == "conv_final"
            self._check_size(x.shape[1], kernel, name)
            x = layers.Conv(features, kernel, 2 if name == "conv1" else 1, dtype=self.dtype,
                            name=name)(x)
            x = self._norm(x, train, name, self.batch_norm)
            x = layers.relu(layers.max_pool(x, 2) if last else x)
        x = layers.flatten(x)
        x = layers.Linear(self.fc_width, dtype=self.dtype, name="fc1")(x)
        x = layers.relu(self._norm(x, train, "fc1", self.fc_batch_norm))
        x = layers.Dropout(self.dropout)(x, train)
        return layers.Linear(self.num_classes, name="fc2")(x)

    def _norm(self, x, train, name, wanted):
        if not wanted:
            return x
        return layers.BatchNorm(dtype=self.dtype, name=f"{name}_bn")(x, train)

    def _check_size(self, size, kernel, name):
        if size < kernel + (name == "conv_final"):
            raise UserError(f"model option kernel_sizes = {self.kernel_sizes}: the map before "
                            f"{name} is {size}x{size}, too small; choose smaller kernels")
