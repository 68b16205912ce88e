"""Random transforms of one image: what each draws, and what it does with the draw.

Every transform is a frozen dataclass whose fields are the arguments of the specification string,
with the methods of `Transform`. Distributions are torchvision's; bad arguments raise ValueError
when the transform is made.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxcifar.augment import geometry, ops, policies
from jaxcifar.augment.geometry import View
from jaxcifar.errors import UserError


class Transform(Protocol):
    """What every transform of one image offers; `on_normalized`: works on floats too."""

    on_normalized: ClassVar[bool]

    def sample(self, key, shape) -> Any:
        """Draw parameters, a pytree of arrays, from one typed PRNG key, for shape (H, W, C)."""

    def apply(self, view, parameters) -> View:
        """Return `view` with the transform added (geometry) or carried out (colour, erasing)."""

    def describe(self) -> str:
        """Return one line for the run's header."""


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_range(value):
    return (isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))
            and value[0] <= value[1])


def _below(uniform, count):
    """Return int32 in 0..count-1 from uniform numbers in [0, 1)."""
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotate by a uniform angle: torchvision RandomRotation, nearest, zeros outside."""

    degrees: float | tuple[float, float]
    on_normalized: ClassVar[bool] = False

    def __post_init__(self):
        _require((_is_number(self.degrees) and self.degrees >= 0) or _is_range(self.degrees),
                 "degrees is a number >= 0, or (low, high)")

    def _range(self):
        return (-self.degrees, self.degrees) if _is_number(self.degrees) else self.degrees

    def sample(self, key, shape):
        low, high = self._range()
        return jax.random.uniform(key, (), jnp.float32, low, high)

    def apply(self, view, parameters):
        shape = view.shape[:2]
        matrix = geometry.rotation_matrix(parameters, shape)
        return view.through(geometry.affine_map(matrix, shape))

    def describe(self):
        low, high = self._range()
        return f"random rotation in [{low:g}, {high:g}] degrees, nearest, zeros outside"


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirror left to right with probability p: torchvision RandomHorizontalFlip."""

    p: float = 0.5
    on_normalized: ClassVar[bool] = True

    def __post_init__(self):
        _require(_is_number(self.p) and 0 <= self.p <= 1, "p is a probability, 0 to 1")

    def sample(self, key, shape):
        return jax.random.uniform(key) < self.p

    def apply(self, view, parameters):
        return view.through(geometry.flip_map(parameters, view.shape[1]))

    def describe(self):
        return f"random horizontal flip, p={self.p:g}"


@dataclasses.dataclass(frozen=True)
class Crop:
    """Pad every side, crop at a uniform place: torchvision RandomCrop; size 0 is the image's own."""

    padding: int
    padding_mode: str = "constant"
    size: int = 0
    on_normalized: ClassVar[bool] = True

    def __post_init__(self):
        _require(_is_count(self.padding) and self.padding >= 0, "padding is a whole number >= 0")
        _require(_is_count(self.size) and self.size >= 0, "size is a whole number >= 0")
        _require(self.padding_mode in geometry.PADDING_MODES,
                 f"padding_mode is one of {', '.join(geometry.PADDING_MODES)}")

    def sample(self, key, shape):
        uniform = jax.random.uniform(key, (2,))
        kept = self.output_shape(shape)
        places = [side + 2 * self.padding - size + 1 for side, size in zip(shape[:2], kept)]
        return _below(uniform, jnp.asarray(places))

    def output_shape(self, shape):
        """Return (H', W', C) of an image of shape (H, W, C); UserError where it is too small."""
        if self.padding > min(shape[:2]) // 2:
            raise UserError(f"crop: padding {self.padding} is more than half of an image of {shape[0]}x"
                            f"{shape[1]}; torchvision's RandomCrop(32, padding=4) is crop(4), its "
                            "RandomCrop(28) is crop(0, size=28)")
        if self.size > min(shape[:2]) + 2 * self.padding:
            raise UserError(f"crop: size {self.size} is larger than the padded image of {shape[0]}x"
                            f"{shape[1]}")
        return (self.size, self.size, shape[2]) if self.size else tuple(shape)

    def apply(self, view, parameters):
        kept = self.output_shape(view.shape)[:2]
        return view.through(geometry.crop_map(
            parameters[0], parameters[1], self.padding, view.shape[:2], self.padding_mode), kept)

    def describe(self):
        fill = "zeros" if self.padding_mode == "constant" else self.padding_mode
        of = f" of {self.size}x{self.size}" if self.size else ""
        return f"random crop{of}, padding {self.padding} ({fill})"


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """Apply one of 25 sub-policies of two operations: torchvision AutoAugment, CIFAR-10 policy."""

    on_normalized: ClassVar[bool] = False

    def sample(self, key, shape):
        return policies.sample(policies.autoaugment(shape[:2]), key)

    def apply(self, view, parameters):
        return policies.apply(policies.autoaugment(view.shape[:2]).rows, view, parameters)

    def describe(self):
        return "AutoAugment, CIFAR-10 policy (25 sub-policies of two operations)"


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Apply `num_ops` operations of one magnitude: torchvision RandAugment."""

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    on_normalized: ClassVar[bool] = False

    def __post_init__(self):
        _require(_is_count(self.num_ops) and self.num_ops >= 1, "num_ops is a whole number >= 1")
        _require(_is_count(self.num_magnitude_bins) and self.num_magnitude_bins >= 2,
                 "num_magnitude_bins is a whole number >= 2")
        _require(_is_count(self.magnitude) and 0 <= self.magnitude < self.num_magnitude_bins,
                 "magnitude is a whole number, 0 to num_magnitude_bins - 1")

    def _draw(self, shape):
        return policies.randaugment(self.magnitude, self.num_magnitude_bins, tuple(shape[:2]))

    def sample(self, key, shape):
        draw = self._draw(shape)
        keys = jax.random.split(key, self.num_ops)
        return jax.vmap(lambda k: policies.sample(draw, k)[0])(keys)

    def apply(self, view, parameters):
        return policies.apply(self._draw(view.shape).rows, view, parameters)

    def describe(self):
        return (f"RandAugment, {self.num_ops} operations of magnitude {self.magnitude} "
                f"of {self.num_magnitude_bins} bins")


@dataclasses.dataclass(frozen=True)
class TrivialAugment:
    """Apply one operation of a random magnitude: torchvision TrivialAugmentWide."""

    num_magnitude_bins: int = 31
    on_normalized: ClassVar[bool] = False

    def __post_init__(self):
        _require(_is_count(self.num_magnitude_bins) and self.num_magnitude_bins >= 2,
                 "num_magnitude_bins is a whole number >= 2")

    def _draw(self, shape):
        return policies.trivialaugment(self.num_magnitude_bins, tuple(shape[:2]))

    def sample(self, key, shape):
        return policies.sample(self._draw(shape), key)

    def apply(self, view, parameters):
        return policies.apply(self._draw(view.shape).rows, view, parameters)

    def describe(self):
        return f"TrivialAugment (wide), one operation, {self.num_magnitude_bins} magnitude bins"


class JitterParameters(NamedTuple):
    """order: int32 [n], a permutation of the n operations that are on (their order otherwise:
    brightness, contrast, saturation, hue); factor: float32 [3] of the first three; shift: int32,
    whole steps of the uint8 hue."""

    order: jax.Array
    factor: jax.Array
    shift: jax.Array


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue in random order: torchvision ColorJitter."""

    brightness: float | tuple[float, float] = 0
    contrast: float | tuple[float, float] = 0
    saturation: float | tuple[float, float] = 0
    hue: float | tuple[float, float] = 0
    on_normalized: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _require((_is_number(value) and value >= 0) or (_is_range(value) and value[0] >= 0),
                     f"{name} is a number >= 0, or (low, high) with low >= 0")
        _require((_is_number(self.hue) and 0 <= self.hue <= 0.5)
                 or (_is_range(self.hue) and -0.5 <= self.hue[0] and self.hue[1] <= 0.5),
                 "hue is a number in 0..0.5, or (low, high) within -0.5..0.5")

    def _ranges(self):
        """Return the four ranges of factors, brightness, contrast, saturation, hue."""
        factors = [value if isinstance(value, tuple) else (max(0.0, 1 - value), 1 + value)
                   for value in (self.brightness, self.contrast, self.saturation)]
        hue = self.hue if isinstance(self.hue, tuple) else (-self.hue, self.hue)
        return (*factors, hue)

    def _active(self):
        neutral = ((1, 1), (1, 1), (1, 1), (0, 0))
        return [i for i, value in enumerate(self._ranges()) if value != neutral[i]]

    def sample(self, key, shape):
        active = self._active()
        uniform = jax.random.uniform(key, (8,))
        low, high = jnp.asarray(self._ranges(), jnp.float32).T
        value = low + uniform[:4] * (high - low)
        # The order of the active ones within a permutation of four is itself a permutation.
        order = jnp.argsort(uniform[4:4 + len(active)]).astype(jnp.int32)
        return JitterParameters(order, value[:3], jnp.trunc(value[3] * 255).astype(jnp.int32))

    def apply(self, view, parameters):
        active = self._active()
        if not active:
            return view
        image = view.read()
        brightness, contrast, saturation = parameters.factor
        branches = (lambda x: ops.brightness(x, brightness), lambda x: ops.contrast(x, contrast),
                    lambda x: ops.saturation(x, saturation), lambda x: ops.hue(x, parameters.shift))
        for slot in range(len(active)):
            image = jax.lax.switch(parameters.order[slot], [branches[i] for i in active], image)
        return View(image)

    def describe(self):
        names = ("brightness", "contrast", "saturation", "hue")
        ranges = self._ranges()
        parts = [f"{names[i]} [{ranges[i][0]:g}, {ranges[i][1]:g}]" for i in self._active()]
        return "color jitter in random order: " + (", ".join(parts) or "nothing")


class EraseParameters(NamedTuple):
    """top, left, height, width: int32 scalars (height 0 = nothing); value: fills the rectangle."""

    top: jax.Array
    left: jax.Array
    height: jax.Array
    width: jax.Array
    value: jax.Array


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Erase a rectangle with probability p: torchvision RandomErasing (arXiv:1708.04896).

    value: a number, three numbers, or "random" (standard normal pixels, after normalize only);
    in the units of the image at that place: 0..255 before normalize, normalised after it.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: float | tuple[float, float, float] | str = 0
    on_normalized: ClassVar[bool] = True

    def __post_init__(self):
        _require(_is_number(self.p) and 0 <= self.p <= 1, "p is a probability, 0 to 1")
        _require(_is_range(self.scale) and self.scale[0] >= 0 and self.scale[1] <= 1,
                 "scale is (low, high) within 0..1, the erased share of the area")
        _require(_is_range(self.ratio) and self.ratio[0] > 0, "ratio is (low, high), low > 0")
        _require(self.value == "random" or _is_number(self.value)
                 or (isinstance(self.value, tuple) and len(self.value) == 3
                     and all(map(_is_number, self.value))),
                 'value is a number, three numbers or "random"')

    def sample(self, key, shape):
        key, noise_key = jax.random.split(key)
        uniform = jax.random.uniform(key, (41,))
        tries = uniform[1:].reshape(10, 4)
        low, high = self.scale
        area = shape[0] * shape[1] * (low + tries[:, 0] * (high - low))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = jnp.exp(low + tries[:, 1] * (high - low))
        height = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
        width = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
        fits = (height < shape[0]) & (width < shape[1])
        first = jnp.argmax(fits)
        erased = (uniform[0] < self.p) & fits[first]
        height, width = height[first], width[first]
        value = (jax.random.normal(noise_key, shape) if self.value == "random"
                 else jnp.asarray(self.value, jnp.float32))
        return EraseParameters(_below(tries[first, 2], shape[0] - height + 1),
                               _below(tries[first, 3], shape[1] - width + 1),
                               jnp.where(erased, height, 0), width, value)

    def apply(self, view, parameters):
        return View(ops.erase(view.read(), *parameters))

    def describe(self):
        return (f"random erasing, p={self.p:g}, area {self.scale[0]:g} to {self.scale[1]:g}, "
                f"ratio {self.ratio[0]:g} to {self.ratio[1]:g}, value {self.value}")


@dataclasses.dataclass(frozen=True)
class Cutout:
    """Set a square, clipped at the border, to zero: cutout (arXiv:1708.04552).

    The centre is uniform over the pixels; an odd length erases length - 1, as the authors' code.
    """

    length: int
    on_normalized: ClassVar[bool] = True

    def __post_init__(self):
        _require(_is_count(self.length) and self.length >= 2, "length is a whole number >= 2")

    def sample(self, key, shape):
        uniform = jax.random.uniform(key, (2,))
        half, side = self.length // 2, jnp.int32(self.length // 2 * 2)
        return EraseParameters(_below(uniform[0], shape[0]) - half,
                               _below(uniform[1], shape[1]) - half, side, side, jnp.float32(0))

    def apply(self, view, parameters):
        return View(ops.erase(view.read(), *parameters))

    def describe(self):
        side = self.length // 2 * 2
        return f"cutout, {side}x{side} pixels set to 0 (black; after normalize: the mean)"
