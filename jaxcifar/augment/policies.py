"""AutoAugment, RandAugment and TrivialAugment, without computing fourteen operations per image.

Every (operation, magnitude, sign) of a policy is one row of a table made at trace time: an affine
matrix, a 256-entry look-up table and two blend factors, the identity where the operation has no
such part. An image draws row numbers, then every image runs the same program: one gather, one
table, one blend. Sources: torchvision.transforms.{AutoAugment, RandAugment, TrivialAugmentWide};
arXiv:1805.09501, 1909.13719, 2103.10158.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcifar.augment import color, geometry
from jaxcifar.augment.geometry import View

# 25 sub-policies of two operations: (name, probability, magnitude bin 0-9 or None).
CIFAR10_POLICY = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)

SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
          "Brightness", "Color", "Contrast", "Sharpness")
UNSIGNED = ("Posterize", "Solarize")
PLAIN = ("AutoContrast", "Equalize")  # no magnitude; AutoAugment adds Invert, the others Identity
STATIC, CONTRAST, AUTOCONTRAST, EQUALIZE = range(4)  # how a row's look-up table comes about


class Operation(NamedTuple):
    """An operation by torchvision's name, and its signed magnitude (0.0 where it has none)."""

    name: str
    magnitude: float


class Rows(NamedTuple):
    """What operations do to pixels: arrays [R] in the table, scalars once a row is chosen.

    matrix: int32 [R, 6]; has_table: bool, False where all 256 entries stay; table_kind: int32, how
    the table comes about; table: uint8 [R, 256], used where the kind is STATIC; contrast, blend:
    float32 factors, 1 = unchanged; smooth: bool, blend with the smoothed image, else the gray one.
    """

    matrix: np.ndarray
    has_table: np.ndarray
    table_kind: np.ndarray
    table: np.ndarray
    contrast: np.ndarray
    blend: np.ndarray
    smooth: np.ndarray


def _linspace(start, end, count):
    """Return torch.linspace(start, end, count) in float32: from both ends, products unrounded."""
    start, end = np.float32(start), np.float32(end)
    step = np.float64((end - start) / np.float32(count - 1))
    index = np.arange(count)
    values = np.where(index < count // 2, start + step * index, end - step * (count - 1 - index))
    return values.astype(np.float32)


def magnitudes(name, bins, shape, wide=False):
    """Return the magnitudes of operation `name`, float32 [bins], or [1] of 0 where it has none.

    shape: (height, width) of the images; wide: TrivialAugmentWide's ranges.
    """
    if name in UNSIGNED:
        if name == "Solarize":
            return _linspace(255, 0, bins)
        per_bit = np.float32((bins - 1) / (6 if wide else 4))
        return 8 - np.round(np.arange(bins, dtype=np.float32) / per_bit).astype(np.float32)
    height, width = shape
    limits = {
        "ShearX": (0.3, 0.99), "ShearY": (0.3, 0.99), "Rotate": (30, 135),
        "TranslateX": (150 / 331 * width, 32), "TranslateY": (150 / 331 * height, 32),
        "Brightness": (0.9, 0.99), "Color": (0.9, 0.99), "Contrast": (0.9, 0.99),
        "Sharpness": (0.9, 0.99)}
    return _linspace(0, limits[name][wide], bins) if name in limits else np.zeros(1, np.float32)


def _matrix(name, magnitude, shape):
    if name == "ShearX":
        return geometry.fixed_point(geometry.shear_x(magnitude))
    if name == "ShearY":
        return geometry.fixed_point(geometry.shear_y(magnitude))
    if name == "TranslateX":
        return geometry.fixed_point(geometry.translate(math.trunc(magnitude), 0))
    if name == "TranslateY":
        return geometry.fixed_point(geometry.translate(0, math.trunc(magnitude)))
    if name == "Rotate":
        return geometry.fixed_point(geometry.rotate(magnitude, shape))
    return np.array(geometry.IDENTITY_MATRIX, np.int32)


def _table(name, magnitude):
    ramp = np.arange(256)
    if name == "Brightness":
        product = ramp.astype(np.float32) * np.float32(1.0 + magnitude)
        ramp = np.clip(product, 0, 255)
    elif name == "Posterize":
        ramp = ramp & (256 - 2 ** (8 - int(magnitude)))
    elif name == "Solarize":
        ramp = np.where(ramp < magnitude, ramp, 255 - ramp)
    elif name == "Invert":
        ramp = 255 - ramp
    return ramp.astype(np.uint8)


def make_rows(operations, shape):
    """Return the `Rows` (numpy) of `operations` (`Operation`s) for images of (height, width)."""
    kinds = {"Contrast": CONTRAST, "AutoContrast": AUTOCONTRAST, "Equalize": EQUALIZE}
    table = np.stack([_table(*operation) for operation in operations])
    kind = np.array([kinds.get(name, STATIC) for name, _ in operations], np.int32)

    def factors(*names):
        return np.array([1.0 + m if name in names else 1.0 for name, m in operations], np.float32)

    return Rows(
        matrix=np.stack([_matrix(*operation, shape) for operation in operations]),
        has_table=(kind != STATIC) | (table != np.arange(256)).any(axis=1),
        table_kind=kind,
        table=table,
        contrast=factors("Contrast"),
        blend=factors("Color", "Sharpness"),
        smooth=np.array([name == "Sharpness" for name, _ in operations]))


class Draw(NamedTuple):
    """A policy made ready for one image size: its operations, and how they are drawn.

    operations: number 0 is the identity; rows: theirs. For choice i (uniform) in slot j (one after
    the other): operation numbers, int32 [choices, slots], for the magnitude taken negative and
    positive, and the probability, float32 [choices, slots].
    """

    operations: tuple[Operation, ...]
    rows: Rows
    negative: np.ndarray
    positive: np.ndarray
    probability: np.ndarray


def _draw(choices, shape):
    """Return the `Draw` of `choices`: each one slot or more of (name, magnitude, probability)."""
    numbers = {Operation("Identity", 0.0): 0}

    def number(name, magnitude):
        return numbers.setdefault(Operation(name, magnitude if magnitude else 0.0), len(numbers))

    positive = [[number(name, m) for name, m, _ in choice] for choice in choices]
    negative = [[number(name, -m if name in SIGNED else m) for name, m, _ in choice]
                for choice in choices]
    probability = [[p for _, _, p in choice] for choice in choices]
    operations = tuple(numbers)
    return Draw(operations, make_rows(operations, shape), np.array(negative, np.int32),
                np.array(positive, np.int32), np.array(probability, np.float32))


@functools.lru_cache
def autoaugment(shape):
    """Return the `Draw` of AutoAugment's CIFAR-10 policy: 25 choices of two slots."""

    def slot(name, probability, level):
        magnitude = float(magnitudes(name, 10, shape)[level or 0])
        return name, magnitude, probability

    return _draw([[slot(*operation) for operation in pair] for pair in CIFAR10_POLICY], shape)


@functools.lru_cache
def randaugment(magnitude, bins, shape):
    """Return the `Draw` of RandAugment: 14 choices, drawn anew for each of its operations."""
    names = ("Identity", *SIGNED, *UNSIGNED, *PLAIN)
    values = [magnitudes(name, bins, shape) for name in names]
    return _draw([[(name, float(value[magnitude if len(value) > 1 else 0]), 1.0)]
                  for name, value in zip(names, values, strict=True)], shape)


@functools.lru_cache
def trivialaugment(bins, shape):
    """Return the `Draw` of TrivialAugmentWide: 14 operations times `bins` equally likely bins."""
    names = ("Identity", *SIGNED, *UNSIGNED, *PLAIN)
    choices = []
    for name in names:
        values = magnitudes(name, bins, shape, wide=True)
        choices += [[(name, float(values[i % len(values)]), 1.0)] for i in range(bins)]
    return _draw(choices, shape)


def sample(draw, key):
    """Draw the operation numbers, int32 [slots], that one image gets; key: a typed PRNG key."""
    choices, slots = draw.probability.shape
    uniform = jax.random.uniform(key, (1 + 2 * slots,))
    choice = jnp.minimum((uniform[0] * choices).astype(jnp.int32), choices - 1)
    signed = jnp.where(uniform[1 + slots:] < 0.5, jnp.asarray(draw.negative)[choice],
                       jnp.asarray(draw.positive)[choice])
    return jnp.where(uniform[1:1 + slots] <= jnp.asarray(draw.probability)[choice], signed, 0)


def apply(rows, view, numbers):
    """Apply operations `numbers` (int32 [slots]) in turn to a uint8 `View`; return a `View`.

    The conditions skip work where images are processed one by one, and are selects under vmap.
    """
    chosen = jax.tree.map(lambda values: jnp.asarray(values)[numbers], rows)
    for slot in range(numbers.shape[0]):
        row = jax.tree.map(lambda values: values[slot], chosen)  # noqa: B023
        image = view.through(geometry.affine_map(row.matrix, view.shape[:2])).read()
        image = jax.lax.cond(row.has_table, _apply_table, lambda _, x: x, row, image)
        view = View(jax.lax.cond(row.blend != 1, _apply_blend, lambda _, x: x, row, image))
    return view


def _apply_table(row, image):
    """Replace the values of uint8 [H, W, 3] by the look-up table of one row."""
    count = image.shape[0] * image.shape[1]

    def contrast():
        mean = color.mean_luma(color.luma(image))
        return color.blend(mean, jnp.arange(256, dtype=jnp.int32), row.contrast)

    def autocontrast():
        return color.autocontrast_table(color.count_below(image), count)

    def equalize():
        return color.equalize_table(color.count_below(image), count)

    makers = (lambda: row.table, contrast, autocontrast, equalize)  # in the order of the kinds
    tables = [lambda make=make: jnp.broadcast_to(make(), (3, 256)).astype(jnp.uint8)
              for make in makers]
    return color.look_up(image, jax.lax.switch(row.table_kind, tables))


def _apply_blend(row, image):
    """Blend uint8 [H, W, 3] with its smoothed or its gray self."""
    base = jax.lax.cond(
        row.smooth, color.smooth, lambda x: jnp.broadcast_to(color.luma(x), x.shape), image)
    return color.blend(base, image, row.blend)
