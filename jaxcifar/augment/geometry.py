"""Nearest-neighbour geometry as maps of coordinates, so that a chain of them costs one gather.

Flip, crop, rotation, shear and translation all say, for each output pixel, which input pixel it
shows. Applied in turn, m1 then m2, the result at p shows the input at m1(m2(p)): integer
arithmetic on coordinates, equal bit for bit to moving the pixels twice, since every one of them
fills with zero outside the image. A `View` is an image with such a chain not yet carried out.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PADDING_MODES = ("constant", "edge", "reflect", "symmetric")
_FIXED = 65536  # Pillow's nearest-neighbour affine works in 16.16 fixed point.
IDENTITY_MATRIX = (_FIXED, 0, _FIXED // 2, 0, _FIXED, _FIXED // 2)


class Grid(NamedTuple):
    """Source coordinates of every output pixel: row, column int32 [H, W], inside bool [H, W]."""

    row: jax.Array
    column: jax.Array
    inside: jax.Array


class View(NamedTuple):
    """One image [H, W, C] seen through maps of coordinates that are applied when it is read.

    size: (height, width) of what the view shows, None where it is that of the image.
    """

    image: jax.Array
    maps: tuple[Callable[[Grid], Grid], ...] = ()
    size: tuple[int, int] | None = None

    @property
    def shape(self):
        """(height, width, channels) of what the view shows."""
        return (*(self.size or self.image.shape[:2]), self.image.shape[2])

    def through(self, coordinate_map, size=None):
        """Return the view with one more map (Grid -> Grid), applied after those already there.

        size: (height, width) that it then shows, where the map changes it.
        """
        return View(self.image, (*self.maps, coordinate_map), size or self.size)

    def read(self):
        """Return the image [H, W, C] that this view shows, by one gather; outside it is 0."""
        if not self.maps:
            return self.image
        height, width, channels = self.shape
        row = jnp.broadcast_to(jnp.arange(height, dtype=jnp.int32)[:, None], (height, width))
        column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (height, width))
        grid = Grid(row, column, jnp.ones((height, width), bool))
        for coordinate_map in reversed(self.maps):
            grid = coordinate_map(grid)
        index = jnp.where(grid.inside, grid.row * self.image.shape[1] + grid.column, 0)
        pixels = self.image.reshape(-1, channels).at[index].get(mode="promise_in_bounds")
        return jnp.where(grid.inside[..., None], pixels, jnp.zeros((), self.image.dtype))


def flip_map(flip, width):
    """Return the map of a left-right mirror, applied where `flip` (bool scalar) is true."""

    def flipped(grid):
        return grid._replace(column=jnp.where(flip, width - 1 - grid.column, grid.column))

    return flipped


def _source(index, size, mode):
    """Return (index inside 0..size-1, inside) for an index that may lie in the padding."""
    if mode == "constant":
        inside = (index >= 0) & (index < size)
    else:
        inside = jnp.ones_like(index, bool)
        if mode == "reflect":
            index = jnp.abs(index)
            index = size - 1 - jnp.abs(size - 1 - index)
        elif mode == "symmetric":
            index = jnp.where(index < 0, -index - 1, index)
            index = jnp.where(index >= size, 2 * size - 1 - index, index)
    return jnp.clip(index, 0, size - 1), inside


def crop_map(top, left, padding, shape, mode):
    """Return the map that pads by `padding` pixels and crops back to `shape` at (top, left).

    top, left: int32 scalars in 0..2*padding; shape: (height, width); mode: one of PADDING_MODES.
    """

    def cropped(grid):
        row, row_inside = _source(grid.row + top - padding, shape[0], mode)
        column, column_inside = _source(grid.column + left - padding, shape[1], mode)
        return Grid(row, column, grid.inside & row_inside & column_inside)

    return cropped


def affine_map(matrix, shape):
    """Return the map of Pillow's nearest-neighbour affine transform.

    matrix: int32 [6] in 16.16 fixed point (`fixed_point`, `rotation_matrix`); shape: (height,
    width).
    """
    a, b, c, d, e, f = (matrix[i] for i in range(6))

    def transformed(grid):
        column = (grid.column * a + grid.row * b + c) >> 16
        row = (grid.column * d + grid.row * e + f) >> 16
        inside = (column >= 0) & (column < shape[1]) & (row >= 0) & (row < shape[0])
        return Grid(jnp.clip(row, 0, shape[0] - 1), jnp.clip(column, 0, shape[1] - 1),
                    grid.inside & inside)

    return transformed


def fixed_point(matrix):
    """Return Pillow's fixed-point form, int32 [6], of an inverse affine matrix of six floats.

    The half-pixel offset of the pixel centres is folded into the translation, as Pillow does.
    """
    a, b, c, d, e, f = (float(value) for value in matrix)
    offset = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return np.array([math.floor(value * _FIXED + 0.5) for value in offset], np.int32)


def shear_x(level):
    """Return the inverse matrix (6 floats) of torchvision AutoAugment's ShearX by `level`."""
    return (1.0, math.tan(math.radians(math.degrees(math.atan(level)))), 0.0, 0.0, 1.0, 0.0)


def shear_y(level):
    """Return the inverse matrix (6 floats) of torchvision AutoAugment's ShearY by `level`."""
    angle = math.radians(math.degrees(math.atan(level)))
    return (1.0, 0.0, 0.0, math.sin(angle) / math.cos(angle), 1.0, 0.0)


def translate(right, down):
    """Return the inverse matrix (6 floats) of a shift by whole pixels."""
    return (1.0, 0.0, float(-right), 0.0, 1.0, float(-down))


def rotate(degrees, shape):
    """Return the inverse matrix (6 floats) of PIL's Image.rotate about the centre of `shape`."""
    height, width = shape
    angle = -math.radians(degrees % 360.0)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y)


def rotation_matrix(degrees, shape):
    """Return the fixed-point matrix, int32 [6], of a rotation by a traced angle.

    degrees: float32 scalar, counter-clockwise; shape: (height, width). float32 arithmetic where
    Pillow's is float64: entries can be off by one unit of 1/65536, which moves under one pixel
    in 1,000 (the test counts them).
    """
    height, width = shape
    angle = -degrees * np.float32(math.pi / 180)
    sine = jnp.sin(angle)
    versine = 2 * jnp.square(jnp.sin(angle / 2))  # 1 - cos, without its cancellation.
    # With pixel centres at half-integers, both translations are small differences.
    x, y = (width - 1) / 2, (height - 1) / 2
    offsets = jnp.stack([-versine, sine, versine * x - sine * y, -sine, -versine,
                         sine * x + versine * y])
    return jnp.floor(offsets * _FIXED + 0.5).astype(jnp.int32) + np.array(IDENTITY_MATRIX, np.int32)
