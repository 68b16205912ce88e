"""shapes32: ten shapes, drawn by vectorised numpy, for a first run that needs no download.

A picture is a smooth random background, a few small distractors, one large shape and pixel noise.
Position, size, rotation, colours and contrast (lighter or darker than the background) are random,
so that pixels correlate with no class and a linear classifier stays below 60%, while a small ResNet
solves the task. Shapes are signed distance functions: negative inside, in units of the shape's
radius.
"""

import numpy as np

from jaxcifar.data.specs import SPLITS, DatasetSpec, SplitArrays

_SEED = 20240
_SIZE = 32
_NOISE = 8.0  # standard deviation, grey levels
_NUM_DISTRACTORS = 2
_CHUNK = 100  # images drawn at once: the working set fits the cache


def generate(spec: DatasetSpec, split: str) -> SplitArrays:
    """Draw one split of shapes32.

    Returns images uint8 [N, 32, 32, 3] and labels int32 [N] in random order, N = spec.count(split).
    The same spec and split give the same arrays always: the stream is numpy's frozen RandomState.
    """
    rng = np.random.RandomState(_SEED + SPLITS.index(split))
    count = spec.count(split)
    labels = rng.permutation(np.repeat(np.arange(spec.num_classes), spec.per_class(split)))
    images = np.empty((count, _SIZE, _SIZE, 3), np.uint8)
    for start in range(0, count, _CHUNK):
        part = labels[start : start + _CHUNK]
        images[start : start + _CHUNK] = draw(rng, [spec.class_names[i] for i in part])
    return SplitArrays(images, labels.astype(np.int32))


def draw(rng: np.random.RandomState, shapes: list[str]) -> np.ndarray:
    """Draw one image per shape name: uint8 [N, 32, 32, 3]. KeyError for an unknown shape."""
    count = len(shapes)
    canvas = _backgrounds(rng, count)
    ground = canvas.mean(axis=(1, 2))
    for _ in range(_NUM_DISTRACTORS):
        colour = rng.uniform(20, 235, (count, 3))
        cover = _cover(_distractor_distance, rng, count, radius=(1.0, 2.2), reach=15.0)
        _paint(canvas, cover * rng.uniform(0, 1, (count, 1, 1)), colour)
    names = np.asarray(shapes)
    cover = np.empty((count, _SIZE, _SIZE))
    for name in np.unique(names):
        chosen = np.flatnonzero(names == name)
        cover[chosen] = _cover(_DISTANCES[name], rng, len(chosen), radius=(9.0, 13.0), reach=3.5)
    _paint(canvas, cover, _contrasting_colours(rng, ground))
    canvas += rng.normal(0, _NOISE, canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _backgrounds(rng, count):
    """Return [count, 32, 32, 3]: a colour, a linear gradient and a wave of random direction."""
    axis = np.linspace(-1, 1, _SIZE)
    y, x = axis[None, :, None, None], axis[None, None, :, None]
    base = rng.uniform(40, 215, (count, 1, 1, 3))
    slope_y, slope_x = rng.uniform(-30, 30, (2, count, 1, 1, 3))
    angle, period, phase = rng.uniform(0, 1, (3, count, 1, 1, 1))
    along = np.cos(2 * np.pi * angle) * x + np.sin(2 * np.pi * angle) * y
    wave = np.sin((3 + 9 * period) * along + 2 * np.pi * phase)
    return base + slope_y * y + slope_x * x + rng.uniform(0, 18, (count, 1, 1, 3)) * wave


def _contrasting_colours(rng, ground):
    """Return [N, 3]: `ground` [N, 3] moved by 70 to 120 levels per channel, up or down."""
    step = rng.uniform(70, 120, ground.shape) * rng.choice([-1.0, 1.0], ground.shape)
    outside = (ground + step < 5) | (ground + step > 250)
    return ground + np.where(outside, -step, step)


def _cover(distance, rng, count, radius, reach):
    """Place a shape at random; return the share of each pixel it covers, [count, 32, 32]."""
    size = rng.uniform(*radius, (count, 1, 1))
    centre_y, centre_x = rng.uniform(-reach, reach, (2, count, 1, 1))
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    axis = np.arange(_SIZE) - (_SIZE - 1) / 2
    y = (axis[None, :, None] - centre_y) / size
    x = (axis[None, None, :] - centre_x) / size
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return np.clip(0.5 - distance(u, v) * size, 0, 1)


def _paint(canvas, cover, colour):
    """Blend `colour` [N, 3] into `canvas` [N, 32, 32, 3] in place, by `cover` [N, 32, 32]."""
    canvas += cover[..., None] * (colour[:, None, None, :] - canvas)


def _box(u, v, half_width, half_height):
    du, dv = np.abs(u) - half_width, np.abs(v) - half_height
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0)


def _distractor_distance(u, v):
    return _box(u, v, 1.0, 0.8)


def _circle(u, v):
    return np.hypot(u, v) - 0.85


def _ring(u, v):
    return np.abs(np.hypot(u, v) - 0.75) - 0.2


def _square(u, v):
    return _box(u, v, 0.75, 0.75)


def _frame(u, v):
    return np.maximum(_box(u, v, 0.85, 0.85), -_box(u, v, 0.47, 0.47))


def _triangle(u, v):
    corner = np.pi / 3
    sides = [np.cos(2 * corner * i) * u + np.sin(2 * corner * i) * v for i in range(3)]
    return np.maximum.reduce(sides) - 0.5


def _star(u, v):
    """Five points: fold the angle into one half point, then the distance to its edge."""
    half = np.pi / 5
    angle = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle) - 1.0, radius * np.sin(angle)
    edge_x, edge_y = 0.42 * np.cos(half) - 1.0, 0.42 * np.sin(half)
    return (edge_y * x - edge_x * y) / np.hypot(edge_x, edge_y)


def _cross(u, v):
    return np.minimum(_box(u, v, 1.0, 0.28), _box(u, v, 0.28, 1.0))


def _crescent(u, v):
    return np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v))


def _bar(u, v):
    return _box(u, v, 1.0, 0.3)


def _corner(u, v):
    return np.minimum(_box(u + 0.55, v, 0.25, 0.8), _box(u, v + 0.55, 0.8, 0.25))


_DISTANCES = {
    "circle": _circle, "ring": _ring, "square": _square, "frame": _frame, "triangle": _triangle,
    "star": _star, "cross": _cross, "crescent": _crescent, "bar": _bar, "corner": _corner,
}
