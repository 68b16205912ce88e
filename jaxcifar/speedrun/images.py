"""What a speedrun's network sees: batches of training images, and the views of a test image."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxcifar import streams
from jaxcifar.augment import ops


def order(seed, num_train, batch_size, steps):
    """Return the examples of every batch, int32 [steps, batch_size].

    Every epoch is a permutation of its own, whose partial last batch is dropped; seed: uint32 [].
    """
    per_epoch = num_train // batch_size

    def of_epoch(epoch):
        key = streams.stream_key(seed, "order", epoch)
        shuffled = jax.random.permutation(key, num_train)[:per_epoch * batch_size]
        return shuffled.reshape(per_epoch, batch_size)

    epochs = jnp.arange(math.ceil(steps / per_epoch))
    return jax.vmap(of_epoch)(epochs).reshape(-1, batch_size)[:steps].astype(jnp.int32)


def first_flips(seed, num_train):
    """Return whether each example is mirrored in epoch 0, bool [num_train]."""
    return jax.random.bernoulli(streams.stream_key(seed, "mix"), 0.5, (num_train,))


def mirrored(first, epoch):
    """Return whether examples are mirrored in an epoch: `first` in even ones, else the opposite.

    So two epochs show both sides of every image; a coin in each would show one twice to half of
    them. Source: arXiv 2404.00498, section 3.6 (alternating flip).
    """
    return first ^ (epoch % 2 == 1)


def pad(images, translate):
    """Return uint8 [N, H + 2 t, W + 2 t, C], the borders reflected: for `translated`."""
    sides = ((0, 0), (translate, translate), (translate, translate), (0, 0))
    return jnp.pad(images, sides, mode="reflect")


def translated(padded, index, shift, size):
    """Return a window [*size, C] of each image `index` (int32 [n]) of `pad`: [n, *size, C].

    shift: int32 [n, 2], row and column of the window's corner in the padded image. One gather both
    shuffles and translates.
    """
    def window(i, corner):
        return lax.dynamic_slice(padded, (i, *corner, 0), (1, *size, padded.shape[-1]))[0]

    return jax.vmap(window)(index, shift)


def squares(key, count, shape, side):
    """Return corners int32 [2, count] of squares of `side` pixels that lie inside of [H, W]."""
    rows, columns = (length - side + 1 for length in shape)
    return jax.random.randint(key, (2, count), 0, jnp.array([[rows], [columns]]))


def cut_out(images, corners, side):
    """Set the square with a corner of `squares` of each image [n, H, W, C] to 0."""
    erase = jax.vmap(lambda image, i, j: ops.erase(image, i, j, side, side, 0.0))
    return erase(images, *corners)


def views(images):
    """Return [(images, weight)] of the six views that test-time augmentation averages.

    The image, and it moved by a pixel up and left, and down and right, with reflected borders; each
    and its mirror image. The weights, 1/4 each for the unmoved and 1/8 for the moved, sum to 1.
    """
    height, width = images.shape[1:3]
    padded = pad(images, 1)
    plain = [(images, 0.25), (padded[:, :height, :width], 0.125), (padded[:, 2:, 2:], 0.125)]
    return [*plain, *((view[:, :, ::-1], weight) for view, weight in plain)]
