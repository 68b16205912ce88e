"""Fully connected networks: those of architectures_report (experiment 1) and of cifar100_report."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcifar.errors import UserError
from jaxcifar.models import layers

_ACTIVATIONS = {"relu": layers.relu, "sigmoid": nn.sigmoid}


class MLP(nn.Module):
    """Linear layers fc1, fc2, ... on the flattened image, an activation after each but the last.

    hidden: widths of the layers before the classifier; dropout_last: probability of dropout on the
    last hidden layer; activation: relu or sigmoid. Defaults: MLP-S of architectures_report
    (5,411,110 parameters; the report prints 5,410,110, which no sum of these layers gives).
    """

    num_classes: int = 10
    hidden: tuple[int, ...] = (1500, 500, 100)
    dropout_last: float = 0.1
    activation: str = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        if self.activation not in _ACTIVATIONS:
            raise UserError(f"model option activation = {self.activation!r}: expected one of "
                            f"{', '.join(_ACTIVATIONS)}")
        x = layers.flatten(images)
        for i, width in enumerate(self.hidden, start=1):
            x = layers.Linear(width, dtype=self.dtype, name=f"fc{i}")(x)
            x = _ACTIVATIONS[self.activation](x)
        x = layers.Dropout(self.dropout_last)(x, train)
        return layers.Linear(self.num_classes, name=f"fc{len(self.hidden) + 1}")(x)
