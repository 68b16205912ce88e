"""The network of the speedruns: a frozen whitening layer and three groups of convolutions.

Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), section 3.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcifar.models import checks, layers, products


def dirac(key, shape, dtype=jnp.float32):
    """Initialise a kernel [k, k, in, out] whose filter i passes channel i on, for i < in.

    The other filters are torch's default. Source: section 3.3; torch.nn.init.dirac_.
    """
    k, _, channels, features = shape
    identity = jnp.zeros(shape, dtype).at[k // 2, k // 2].set(jnp.eye(channels, features))
    drawn = layers.uniform_fan_in()(key, shape, dtype)
    return jnp.where(jnp.arange(features) < channels, identity, drawn)


def scaled_to(std):
    """Return torch's initialiser of a kernel, scaled to a standard deviation; 0: as it is."""
    def init(key, shape, dtype=jnp.float32):
        kernel = layers.uniform_fan_in()(key, shape, dtype)
        return kernel * (std / jnp.std(kernel, ddof=1)) if std else kernel
    return init


def patches(images):
    """Return the 2x2 patches of images [N, H, W, C]: [N, H - 1, W - 1, 4 C], row by row."""
    height, width = images.shape[1:3]
    return jnp.concatenate([images[:, i:height - 1 + i, j:width - 1 + j]
                            for i in (0, 1) for j in (0, 1)], axis=-1)


class Whitening(nn.Module):
    """A convolution with 24 filters of 2x2 pixels, in float32 up to its result, of `dtype`.

    [N, H, W, C] to [N, H - 1, W - 1, 24]. draw_bias: whether the bias starts as torch's, else at 0.

    The weakest filters are small differences of neighbours, multiplied: in bfloat16, images' and
    filters' rounding would be 2 to 7% of their values, in float16 (as published) and TF32 (a GPU's
    product of float32) it is less than 1%. A product of patches, since XLA pads convolutions of
    three channels for tensor cores in float16 only.
    """

    draw_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, images):
        x = patches(images.astype(jnp.float32))
        kernel = self.param("kernel", layers.uniform_fan_in(), (2, 2, images.shape[-1], 24))
        first = layers.uniform_fan_in(x.shape[-1]) if self.draw_bias else nn.initializers.zeros
        bias = self.param("bias", first, (24,))
        return (products.linear(x, kernel.reshape(-1, 24)) + bias).astype(self.dtype)


class Norm(nn.Module):
    """BatchNorm without a scale: after it only a filter's direction counts."""

    momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        norm = layers.BatchNorm(1e-12, self.momentum, affine=False, dtype=self.dtype, name="bn")
        x = norm(x, train)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layers.add_bias(x, bias)


class ConvGroup(nn.Module):
    """Convolution, 2x2 max pool, then depth - 1 convolutions; a shortcut around two of them."""

    features: int
    depth: int
    momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        shortcut = None
        for i in range(1, self.depth + 1):
            x = layers.Conv(self.features, 3, 1, 1, use_bias=False, kernel_init=dirac,
                            dtype=self.dtype, name=f"conv{i}")(x)
            x = layers.max_pool(x, 2) if i == 1 else x
            x = Norm(self.momentum, self.dtype, name=f"norm{i}")(x, train)
            x = nn.gelu(x + shortcut if i == 3 else x, approximate=False)
            shortcut = x if i == 1 else shortcut
        return x


class SpeedrunNet(nn.Module):
    """Whitening of 2x2 patches to 24 channels, three groups, 3x3 max pool, a scaled linear layer.

    channels: of the groups; depth: convolutions in each, 2, or 3 with a shortcut; bn_momentum:
    share of the new statistics in the running ones; head_scale: factor of the logits; head_std:
    standard deviation of the last kernel at first, 0 for torch's default; draw_bias: whether the
    whitening's bias starts as torch's, else at 0. The whitening kernel is drawn like any other:
    jaxcifar.speedrun sets it from images, and leaves it as it is. Images in float32 keep its
    precision, whatever the dtype.
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (64, 256, 256)
    depth: int = 2
    bn_momentum: float = 0.4
    head_scale: float = 1 / 9
    head_std: float = 0.0
    draw_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        checks.check_counts("speedrun_net", channels=self.channels)
        if self.depth not in (2, 3):
            raise ValueError(f"speedrun_net: depth is {self.depth!r}: give 2 or 3")
        x = Whitening(self.draw_bias, self.dtype, name="whiten")(images)
        x = nn.gelu(x, approximate=False)
        for i, features in enumerate(self.channels, start=1):
            x = ConvGroup(features, self.depth, self.bn_momentum, self.dtype,
                          name=f"group{i}")(x, train)
        x = layers.flatten(layers.max_pool(x, 3))
        head = layers.Linear(self.num_classes, use_bias=False, dtype=self.dtype,
                             kernel_init=scaled_to(self.head_std), name="head")
        return jnp.asarray(head(x), jnp.float32) * self.head_scale


def whitening_kernel(images, eps):
    """Return the kernel [2, 2, 3, 24] that whitens the 2x2 patches of images: 12 filters, and -12.

    images: float32 [N, H, W, 3], as the network sees them; eps: added to the eigenvalues of the
    patches' covariance (second moments: the images are normalised). The outputs of the first 12
    filters, and of the last 12, are uncorrelated with variance 1. Source: section 3.2.
    """
    channels = images.shape[-1]
    flat = patches(images).reshape(-1, 4 * channels)
    covariance = jnp.matmul(flat.T, flat, precision="highest") / len(flat)
    values, vectors = jnp.linalg.eigh(covariance)
    filters = vectors * jax.lax.rsqrt(values + eps)
    return jnp.concatenate([filters, -filters], axis=1).reshape(2, 2, channels, -1)
