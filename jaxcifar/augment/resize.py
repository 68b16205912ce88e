"""Resize and center crop: what torchvision's transforms do to a PIL image, bit for bit.

Pillow resizes along rows, rounds to uint8, then along columns; every pass is a sum of a few
neighbours with weights in 1/2**22. The weights depend on sizes only, so they are constants of the
program, and the sums below are Pillow's own integers.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxcifar.augment import geometry
from jaxcifar.augment.geometry import View

_BITS = 22  # Pillow's PRECISION_BITS


def _triangle(x):
    return np.maximum(1 - np.abs(x), 0.0)


def _cubic(x):
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


INTERPOLATIONS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}  # filter, half its width


@functools.cache
def taps(size, new_size, interpolation):
    """Return the neighbours of each output pixel along one axis, and their weights.

    size, new_size: pixels before and after; interpolation: a name in INTERPOLATIONS. Where the
    image shrinks, the filter widens with it (torchvision's antialias). Returns index int32 and
    weight int32, in units of 2**-22, both [new_size, k]. Source: Pillow, Resample.c.
    """
    function, half_width = INTERPOLATIONS[interpolation]
    scale = size / new_size
    stretch = max(scale, 1.0)
    center = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((center - half_width * stretch + 0.5).astype(int), 0)
    stop = np.minimum((center + half_width * stretch + 0.5).astype(int), size)
    index = first[:, None] + np.arange((stop - first).max())
    weight = function((index - center[:, None] + 0.5) / stretch) * (index < stop[:, None])
    weight = weight / weight.sum(1, keepdims=True) * 2**_BITS
    weight = np.trunc(weight + np.where(weight < 0, -0.5, 0.5)).astype(np.int32)
    used = weight.any(0)
    return np.minimum(index, size - 1).astype(np.int32)[:, used], weight[:, used]


def resize(images, size, interpolation="bilinear"):
    """Return uint8 [..., H', W', C] of uint8 [..., H, W, C]: PIL.Image.resize, bit for bit.

    size: (H', W'); interpolation: bilinear or bicubic (a = -0.5), antialiased as in Pillow. Not
    square to square: recent versions of Pillow may take columns first where the height shrinks by
    more than the width, and then differ by 1 level (bilinear) or up to about 20 (bicubic, of noise).
    """
    for axis in (-2, -3):  # rows first, as Pillow
        new_size = size[axis + 3]
        if images.shape[axis] == new_size:
            continue
        index, weight = taps(images.shape[axis], new_size, interpolation)
        pixels = images.astype(jnp.int32)
        shape = (-1,) + (1,) * (-axis - 1)
        total = sum(jnp.take(pixels, index[:, k], axis) * weight[:, k].reshape(shape)
                    for k in range(index.shape[1]))
        images = jnp.clip((total + (1 << (_BITS - 1))) >> _BITS, 0, 255).astype(jnp.uint8)
    return images


def _is_side(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value):
    return _is_side(value) or (
        isinstance(value, tuple) and len(value) == 2 and all(map(_is_side, value)))


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resize: torchvision Resize; size: of the shorter side, which keeps the shape, or (H, W)."""

    size: int | tuple[int, int]
    interpolation: str = "bilinear"
    on_normalized: ClassVar[bool] = False

    def __post_init__(self):
        if not _is_size(self.size):
            raise ValueError("size is a whole number >= 1, or (height, width)")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is one of {', '.join(INTERPOLATIONS)}")

    def output_shape(self, shape):
        """Return (H', W', C) of an image of shape (H, W, C)."""
        if isinstance(self.size, tuple):
            return (*self.size, shape[2])
        short = min(shape[:2])
        return (*(int(self.size * side / short) for side in shape[:2]), shape[2])

    def sample(self, key, shape):
        """Draw nothing."""
        return ()

    def apply(self, view, parameters):
        """Return the view of the resized image."""
        return View(resize(view.read(), self.output_shape(view.shape)[:2], self.interpolation))

    def describe(self):
        """Return one line for the run's header."""
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return f"resize to {height}x{width}, {self.interpolation}"


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Keep the middle: torchvision CenterCrop (zeros where the image is smaller)."""

    size: int | tuple[int, int]
    on_normalized: ClassVar[bool] = False  # there the zeros would not be black

    def __post_init__(self):
        if not _is_size(self.size):
            raise ValueError("size is a whole number >= 1, or (height, width)")

    def output_shape(self, shape):
        """Return (H', W', C) of an image of shape (H, W, C)."""
        size = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return (*size, shape[2])

    def sample(self, key, shape):
        """Draw nothing."""
        return ()

    def apply(self, view, parameters):
        """Return the view of the image's middle."""
        shape = view.shape
        size = self.output_shape(shape)[:2]
        top, left = (_offset(side, kept) for side, kept in zip(shape, size))
        return view.through(geometry.crop_map(top, left, 0, shape[:2], "constant"), size)

    def describe(self):
        """Return one line for the run's header."""
        height, width = self.output_shape((0, 0, 0))[:2]
        return f"center crop of {height}x{width}"


def _offset(side, kept):
    """Return where the kept pixels start; negative where zeros come first."""
    if kept > side:
        return -((kept - side) // 2)
    return round((side - kept) / 2)
