"""Image operations, one image at a time: what torchvision's transforms do to a PIL image.

Every function takes uint8 [H, W, 3] and returns uint8 [H, W, 3], equal to Pillow's output bit for
bit, whatever the (traced) parameters; use jax.vmap for a batch. Functions that only move pixels
take any dtype and any number of channels.
"""

import jax
import jax.numpy as jnp

from jaxcifar.augment import color, geometry
from jaxcifar.augment.geometry import View


def hflip(image):
    """Mirror left to right: torchvision's hflip."""
    return image[:, ::-1]


def crop(image, top, left, padding, mode="constant"):
    """Pad every side by `padding` pixels, then crop back to the image's size at (top, left).

    top, left: int32 in 0..2*padding; mode: constant (zeros), edge, reflect or symmetric.
    """
    shape = image.shape[:2]
    return View(image).through(geometry.crop_map(top, left, padding, shape, mode)).read()


def affine(image, matrix):
    """Transform by an inverse matrix in 16.16 fixed point, int32 [6]: PIL's AFFINE, NEAREST."""
    return View(image).through(geometry.affine_map(matrix, image.shape[:2])).read()


def rotate(image, degrees):
    """Rotate counter-clockwise about the centre, nearest, zeros outside; degrees: float32.

    Differs from PIL.Image.rotate in less than 1 pixel of 1,000 (see geometry.rotation_matrix).
    """
    return affine(image, geometry.rotation_matrix(degrees, image.shape[:2]))


def brightness(image, factor):
    """Blend with black: PIL.ImageEnhance.Brightness; factor: float32 >= 0, 1 = unchanged."""
    return color.blend(jnp.zeros((), jnp.int32), image, factor)


def saturation(image, factor):
    """Blend with the gray image: PIL.ImageEnhance.Color; factor: float32 >= 0, 1 = unchanged."""
    return color.blend(color.luma(image), image, factor)


def contrast(image, factor):
    """Blend with the mean gray: PIL.ImageEnhance.Contrast; factor: float32 >= 0, 1 = unchanged."""
    return color.blend(color.mean_luma(color.luma(image)), image, factor)


def sharpness(image, factor):
    """Blend with the smoothed image: PIL.ImageEnhance.Sharpness; factor: float32 >= 0."""
    return color.blend(color.smooth(image), image, factor)


def posterize(image, bits):
    """Keep the highest `bits` (int32 in 0..8) of every value: PIL.ImageOps.posterize."""
    kept = 256 - (1 << (8 - jnp.asarray(bits, jnp.int32)))
    return (image.astype(jnp.int32) & kept).astype(jnp.uint8)


def solarize(image, threshold):
    """Invert the values at or above `threshold` (0..255): PIL.ImageOps.solarize."""
    return jnp.where(image.astype(jnp.float32) < threshold, image, 255 - image)


def invert(image):
    """Invert every value: PIL.ImageOps.invert."""
    return 255 - image


def autocontrast(image):
    """Stretch every channel to 0..255: PIL.ImageOps.autocontrast."""
    below = color.count_below(image)
    return color.look_up(image, color.autocontrast_table(below, image.shape[0] * image.shape[1]))


def equalize(image):
    """Equalise every channel's histogram: PIL.ImageOps.equalize."""
    below = color.count_below(image)
    return color.look_up(image, color.equalize_table(below, image.shape[0] * image.shape[1]))


def hue(image, shift):
    """Add `shift` (int32, = int(hue_factor * 255)) to the uint8 hue: torchvision's adjust_hue."""
    angle, chroma, value = color.rgb_to_hsv(image)
    return color.hsv_to_rgb((angle + shift) & 255, chroma, value)


def erase(image, top, left, height, width, value):
    """Set a rectangle to `value`, a scalar, [C] or [H, W, C]: torchvision's erase.

    image: [H, W, C] of any dtype; top, left, height, width: int32, parts outside are ignored.
    """
    row = jnp.arange(image.shape[0])[:, None, None]
    column = jnp.arange(image.shape[1])[:, None]
    erased = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return jnp.where(erased, jnp.asarray(value).astype(image.dtype), image)


def normalize(images, mean, std, dtype=jnp.float32):
    """Return (images / 255 - mean) / std: torchvision's ToTensor and Normalize.

    images: uint8 [..., C]; mean, std: C floats on the scale 0..1, where (0, ...) and (1, ...) give
    images / 255; computed in float32, returned as dtype [..., C].
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    scaled = images.astype(jnp.float32) / 255
    return jax.lax.convert_element_type((scaled - mean) / std, dtype)
