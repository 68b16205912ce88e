"""Colour arithmetic of Pillow on uint8 pixels, in forms that no compiler can round differently.

Pillow blends in float32 and builds its autocontrast table in float64. XLA may fuse a product and a
sum into one rounding, and has no float64 here: so the products below are exact by construction,
and the float64 rounding is reproduced in integers.
"""

import jax
import jax.numpy as jnp
import numpy as np


def luma(image):
    """Return Pillow's "L" of an RGB image: int32 [H, W, 1] in 0..255 (weights in 1/65536)."""
    red, green, blue = (image[..., c:c + 1].astype(jnp.int32) for c in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def mean_luma(gray):
    """Return the mean of `gray` (int32 [H, W, 1]) rounded half up, int32 scalar."""
    return (2 * jnp.sum(gray) + gray.size) // (2 * gray.size)


def _split(factor):
    """Return (head, tail, scale) with factor = (head * 4096 + tail) * scale, all exact.

    factor: float32 >= 0; head, tail: int32 under 4096; scale: a power of two, float32.
    """
    bits = jax.lax.bitcast_convert_type(jnp.asarray(factor, jnp.float32), jnp.int32)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | 0x800000
    scale = jax.lax.bitcast_convert_type(jnp.maximum(exponent - 23, 0) << 23, jnp.float32)
    return mantissa >> 12, mantissa & 4095, scale


def blend(base, image, factor):
    """Return PIL.Image.blend(base, image, factor): float32, truncated and clipped, as uint8.

    base, image: integers in 0..255, shapes that broadcast; factor: float32 scalar >= 0 (1 = image).
    factor * (image - base) is rounded once, then the sum with base once, as in Pillow on x86: the
    two partial products are integers below 2**24, so a fused multiply-add changes nothing.
    """
    head, tail, scale = _split(factor)
    base = base.astype(jnp.int32)
    difference = image.astype(jnp.int32) - base
    product = (head * difference).astype(jnp.float32) * 4096
    product = (product + (tail * difference).astype(jnp.float32)) * scale
    return jnp.clip(base.astype(jnp.float32) + product, 0, 255).astype(jnp.uint8)


def smooth(image):
    """Return PIL.ImageFilter.SMOOTH of uint8 [H, W, C] as int32; the border is copied."""
    pixels = image.astype(jnp.int32)
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * pixels[1:-1, 1:-1]
    inner = (2 * total + 13) // 26  # total / 13 + 1/2, never an integer: float32 agrees.
    height, width, _ = image.shape
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    inside = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    return jnp.where(inside, jnp.pad(inner, ((1, 1), (1, 1), (0, 0))), pixels)


def _divide(numerator, denominator):
    """Return floor(numerator / denominator) for 0 <= numerator, quotients under 2**10, int32.

    The half keeps the float32 quotient away from integers by far more than its rounding error.
    """
    quotient = (numerator.astype(jnp.float32) + 0.5) / denominator.astype(jnp.float32)
    return quotient.astype(jnp.int32)


def count_below(image):
    """Return int32 [C, 256]: how many pixels of each channel of uint8 [H, W, C] are below v."""
    channels = image.shape[-1]
    if jax.default_backend() == "cpu":  # A scatter is quickest here and slowest on accelerators.
        index = image.astype(jnp.int32) + 256 * jnp.arange(channels, dtype=jnp.int32)
        counts = jnp.zeros(256 * channels, jnp.int32).at[index.reshape(-1)].add(
            1, mode="promise_in_bounds").reshape(channels, 256)
        return jnp.cumsum(counts, axis=1) - counts
    values = jnp.moveaxis(image, -1, 0).reshape(channels, 1, -1)
    levels = jnp.arange(256, dtype=jnp.uint8)[:, None]
    return jnp.sum(values < levels, axis=-1, dtype=jnp.int32)


def equalize_table(below, count):
    """Return PIL.ImageOps.equalize's table, int32 [C, 256]; below: `count_below`; count: H * W."""
    under_maximum = jnp.max(jnp.where(below < count, below, 0), axis=1, keepdims=True)
    step = under_maximum // 255
    table = jnp.minimum(_divide(below + step // 2, jnp.maximum(step, 1)), 255)
    return jnp.where(step > 0, table, jnp.arange(256, dtype=jnp.int32))


# float64 255 / width, in units of 2**-52, modulo 2**32: all that its roundings depend on.
_SCALE_BITS = np.array(
    [0] + [int(255.0 / width * 2**52) % 2**32 for width in range(1, 256)], np.uint32)


def _float64_product(value, width):
    """Return the float64 `value * (255 / width)` in units of 2**-52, modulo 2**32, as uint32.

    value, width: int32 in 0..255. The product is rounded to 53 bits, that is to a multiple of
    2**k where 2**k <= product < 2**(k + 1), half to even: the low 32 bits are enough to do it.
    """
    low = value.astype(jnp.uint32) * jnp.asarray(_SCALE_BITS)[width]
    whole = jnp.maximum(255 * value // width, 1).astype(jnp.uint32)
    k = 31 - jax.lax.clz(whole)
    unit = jnp.uint32(1) << k
    half = (unit >> 1) + ((low >> k) & 1) - 1
    return jnp.where(k > 0, (low + half) & ~(unit - 1), low)


def autocontrast_table(below, count):
    """Return PIL.ImageOps.autocontrast's table, int32 [C, 256]; arguments as `equalize_table`.

    Pillow computes int(v * scale - low * scale) in float64, scale = 255 / (high - low). That is
    the floor of the exact value, except where the exact value is an integer n and the rounded
    one lies below n; whether it does is decided on the rounding errors, in integers.
    """
    ramp = jnp.arange(256, dtype=jnp.int32)
    low = jnp.sum(below[:, 1:] == 0, axis=1, keepdims=True, dtype=jnp.int32)
    high = jnp.sum(below < count, axis=1, keepdims=True, dtype=jnp.int32) - 1
    width = jnp.maximum(high - low, 1)
    numerator = 255 * jnp.clip(ramp - low, 0, width)
    value = _divide(numerator, width)
    error = _float64_product(jnp.broadcast_to(ramp, below.shape), width)
    error = (error - _float64_product(low, width)).astype(jnp.int32)
    # Half the spacing of float64 just below n, in units of 2**-53; a tie goes to n, which is even.
    spacing = jnp.int32(1) << (31 - jax.lax.clz(jnp.maximum(value - 1, 1)))
    falls_short = (value * width == numerator) & (value > 0) & (2 * error < -spacing)
    falls_short &= ramp <= high  # Above `high` the value is clipped to 255 in any case.
    return jnp.where(high > low, value - falls_short, ramp)


def look_up(image, table):
    """Return uint8 [H, W, C]: image with channel c replaced by table[c] (integers [C, 256])."""
    index = image.astype(jnp.int32) + 256 * jnp.arange(image.shape[-1], dtype=jnp.int32)
    return table.astype(jnp.uint8).reshape(-1).at[index].get(mode="promise_in_bounds")


def _hue_shortfall():
    """Return int32 [6, 86]: 1 where Pillow's float32 hue falls below an exact integer.

    Row: the case of `rgb_to_hsv`; column: 85 * (max - mid) / (max - min), an integer whenever
    the exact hue is one.
    """
    fraction = (np.arange(86, dtype=np.float32) / np.float32(85)).astype(np.float32)
    one, wide = np.float32(1), fraction.astype(np.float64)
    hue = np.stack([(one - fraction).astype(np.float64), 2 + wide - 1, 2 + 1.0 - wide,
                    4 + wide - 1, 4 + 1.0 - wide, (fraction - one).astype(np.float64)])
    hue = np.fmod(hue.astype(np.float32).astype(np.float64) / 6 + 1, 1).astype(np.float32)
    reached = np.floor(hue.astype(np.float64) * 255).astype(np.int32)
    base = np.array([1, 1, 3, 3, 5, 5])[:, None]
    sign = np.array([-1, 1, -1, 1, -1, 1])[:, None]
    doubled = 85 * base + sign * np.arange(86)
    return np.where(doubled % 2 == 0, doubled // 2 % 255 - reached, 0).astype(np.int32)


_HUE_SHORTFALL = _hue_shortfall()


def rgb_to_hsv(image):
    """Return Pillow's "HSV" of uint8 [H, W, 3] as three int32 [H, W]: hue, saturation, value."""
    red, green, blue = (image[..., c].astype(jnp.int32) for c in range(3))
    high = jnp.maximum(red, jnp.maximum(green, blue))
    low = jnp.minimum(red, jnp.minimum(green, blue))
    middle = red + green + blue - high - low
    by_red, by_green = red == high, green == high
    case = jnp.where(by_red, jnp.where(green >= blue, 0, 5),
                     jnp.where(by_green, jnp.where(red >= blue, 1, 2),
                               jnp.where(green >= red, 3, 4)))
    spread = jnp.maximum(high - low, 1)
    sixths = (case | 1) * spread + jnp.where(case % 2 == 1, 1, -1) * (high - middle)
    hue = _divide(85 * sixths, 2 * spread)
    column = _divide(85 * (high - middle), spread)
    shortfall = jnp.asarray(_HUE_SHORTFALL).reshape(-1)[case * 86 + column]
    hue -= jnp.where(85 * sixths == hue * 2 * spread, shortfall, 0)
    saturation = _divide(255 * (high - low), jnp.maximum(high, 1))
    return jnp.where(high == low, 0, hue % 255), saturation, high


def hsv_to_rgb(hue, saturation, value):
    """Return uint8 [H, W, 3] of Pillow's "HSV" (three int32 [H, W] in 0..255)."""
    hue, saturation, value = (x.astype(jnp.uint32) for x in (hue, saturation, value))
    sector = 6 * hue // 255
    remainder = 6 * hue - 255 * sector

    def darkened(weight, scale):  # round(value * (1 - weight / scale)); ties cannot occur.
        return (2 * value * (scale - weight) + scale) // (2 * scale)

    p = darkened(saturation, 255)
    q = darkened(saturation * remainder, 65025)
    t = darkened(saturation * (255 - remainder), 65025)
    first = sector % 6 == 0  # hue 255 is sector 6
    red = jnp.select([first | (sector == 5), sector == 1, sector == 4], [value, q, t], p)
    green = jnp.select([(sector == 1) | (sector == 2), first, sector == 3], [value, t, q], p)
    blue = jnp.select([(sector == 3) | (sector == 4), sector == 2, sector == 5], [value, t, q], p)
    return jnp.stack([red, green, blue], axis=-1).astype(jnp.uint8)
