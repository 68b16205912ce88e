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

# Arithmetic of AutoAugment's space: (operation, probability, magnitude bin 0-9 or None) twice.
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
    """One row in words: torchvision's operation name and signed magnitude (0.0 where it has none)."""

    name: str
    magnitude: float


class Rows(NamedTuple):
    """The table of operations as numpy arrays; row 0 is the identity.

    operations: R `Operation`s; matrix int32 [R, 6]; table uint8 [T, 256]; table_index, table_kind
    int32 [R]; has_table bool [R] (False: all 256 entries stay); contrast, blend float32 [R] (1 = unchanged); smooth bool [R] (blend with the smoothed
    image instead of the gray one).
    """

    operations: tuple[Operation, ...]
    matrix: np.ndarray
    table: np.ndarray
    table_index: np.ndarray
    table_kind: np.ndarray
    has_table: np.ndarray
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
    """Return the magnitudes of operation `name`, float32 [bins]; float32 [1] of 0 where it has none.

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
    """Return the `Rows` of `operations` (a sequence of `Operation`) for images of (height, width)."""
    operations = (Operation("Identity", 0.0), *operations)
    table, table_index = np.unique(
        [_table(*operation) for operation in operations], axis=0, return_inverse=True)
    kinds = {"Contrast": CONTRAST, "AutoContrast": AUTOCONTRAST, "Equalize": EQUALIZE}

    def factors(*names):
        return np.array([1.0 + m if name in names else 1.0 for name, m in operations], np.float32)

    index = table_index.reshape(-1).astype(np.int32)
    kind = np.array([kinds.get(name, STATIC) for name, _ in operations], np.int32)
    return Rows(
        operations=operations,
        matrix=np.stack([_matrix(*operation, shape) for operation in operations]),
        table=table,
        table_index=index,
        table_kind=kind,
        has_table=(kind != STATIC) | (index != index[0]),
        contrast=factors("Contrast"),
        blend=factors("Color", "Sharpness"),
        smooth=np.array([name == "Sharpness" for name, _ in operations]))


class Draw(NamedTuple):
    """A policy made ready for one image size: its rows, and what to draw them from.

    For choice i (uniform) in slot j (one after the other): row numbers, int32 [choices, slots],
    for the magnitude taken negative and positive, and the probability, float32 [choices, slots].
    """

    rows: Rows
    negative: np.ndarray
    positive: np.ndarray
    probability: np.ndarray


def _draw(choices, shape):
    """Return the `Draw` of `choices`: each one slot or more of (name, magnitude, probability)."""
    operations, numbers = [], {Operation("Identity", 0.0): 0}

    def number(name, magnitude):
        operation = Operation(name, magnitude if magnitude else 0.0)
        if operation not in numbers:
            operations.append(operation)
            numbers[operation] = len(operations)
        return numbers[operation]

    positive = [[number(name, m) for name, m, _ in choice] for choice in choices]
    negative = [[number(name, -m if name in SIGNED else m) for name, m, _ in choice]
                for choice in choices]
    probability = [[p for _, _, p in choice] for choice in choices]
    return Draw(make_rows(operations, shape), np.array(negative, np.int32),
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
    """Draw the row numbers, int32 [slots], that one image gets; key: a typed PRNG key."""
    choices, slots = draw.probability.shape
    uniform = jax.random.uniform(key, (1 + 2 * slots,))
    choice = jnp.minimum((uniform[0] * choices).astype(jnp.int32), choices - 1)
    signed = jnp.where(uniform[1 + slots:] < 0.5, jnp.asarray(draw.negative)[choice],
                       jnp.asarray(draw.positive)[choice])
    return jnp.where(uniform[1:1 + slots] <= jnp.asarray(draw.probability)[choice], signed, 0)


def apply(rows, view, numbers):
    """Apply rows `numbers` (int32 [slots]) one after the other to a uint8 `View`; return a `View`.

    The conditions skip work where images are processed one by one, and are selects under vmap.
    """
    for slot in range(numbers.shape[0]):
        number = numbers[slot]
        matrix = jnp.asarray(rows.matrix)[number]
        image = view.through(geometry.affine_map(matrix, view.image.shape[:2])).read()
        image = _apply_table(rows, image, number)
        view = View(_apply_blend(rows, image, number))
    return view


def _apply_table(rows, image, number):
    """Apply the look-up table of one row to uint8 [H, W, 3]."""
    count = image.shape[0] * image.shape[1]
    ramp = jnp.arange(256, dtype=jnp.int32)

    def static():
        return jnp.asarray(rows.table)[jnp.asarray(rows.table_index)[number]]

    def contrast():
        mean = color.mean_luma(color.luma(image))
        return color.blend(mean, ramp, jnp.asarray(rows.contrast)[number])

    def of_counts(make_table):
        return lambda: make_table(color.count_below(image), count)

    def looked_up():
        kind = jnp.asarray(rows.table_kind)[number]
        makers = (static, contrast, of_counts(color.autocontrast_table),
                  of_counts(color.equalize_table))
        branches = [lambda make=make: jnp.broadcast_to(make(), (3, 256)).astype(jnp.uint8)
                    for make in makers]
        return color.look_up(image, jax.lax.switch(kind, branches))

    return jax.lax.cond(jnp.asarray(rows.has_table)[number], looked_up, lambda: image)


def _apply_blend(rows, image, number):
    """Blend uint8 [H, W, 3] with its gray or smoothed self as one row says."""

    def blended():
        base = jax.lax.cond(
            jnp.asarray(rows.smooth)[number], lambda: color.smooth(image),
            lambda: jnp.broadcast_to(color.luma(image), image.shape))
        return color.blend(base, image, jnp.asarray(rows.blend)[number])

    return jax.lax.cond(jnp.asarray(rows.blend)[number] != 1, blended, lambda: image)
