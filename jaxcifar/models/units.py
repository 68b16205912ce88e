"""What several families are built of: convolution + BatchNorm, squeeze-and-excitation, shuffles.

Functions that take names are called in a module's compact method; the submodules become its own.
"""

import jax
import jax.numpy as jnp

from jaxcifar.models import layers


def conv_norm(x, features, kernel_size=1, stride=1, groups=1, *, names, train, dtype):
    """Convolve without biases and normalise.

    x: [N, H, W, C]; kernel_size: odd, padded so that stride 1 keeps the map's size; names: of the
    convolution and of the BatchNorm. Returns [N, H / stride (rounded up), W', features] of dtype.
    """
    conv, norm = names
    x = layers.Conv(features, kernel_size, stride, kernel_size // 2, groups, use_bias=False,
                    dtype=dtype, name=conv)(x)
    return layers.BatchNorm(dtype=dtype, name=norm)(x, train)


def squeeze_excitation(x, features, activation=layers.relu, *,
                       names=("se.se1", "se.se2"), dtype):
    """Scale every channel by a number in (0, 1) that two 1x1 convolutions make of all their means.

    x: [N, H, W, C]; features: channels between the convolutions, which are called
    `names`. Source: Hu et al. 2018, "Squeeze-and-Excitation Networks".
    """
    means = layers.global_avg_pool(x)[:, None, None]
    first, second = names
    hidden = layers.Conv(features, 1, dtype=dtype, name=first)(means)
    scale = layers.Conv(x.shape[-1], 1, dtype=dtype, name=second)(activation(hidden))
    return layers.multiply_by_gate(x, jax.nn.sigmoid(scale))


def interleave(a, b):
    """Return [N, H, W, 2 C]: channels of a and b in turn, a channel shuffle of their concatenation.

    a, b: [N, H, W, C].
    """
    return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)


def channel_shuffle(x, groups):
    """Return x [N, H, W, C] with channel g of group i where channel i of group g was.

    Source: Zhang et al. 2018, "ShuffleNet", section 3.1.
    """
    if groups == 1:
        return x
    split = x.reshape(*x.shape[:-1], groups, -1)
    return jnp.swapaxes(split, -1, -2).reshape(x.shape)
