"""From the specification string of a config to one function of a batch.

    rotation(5) | flip | crop(2) | autoaugment
    crop(4, padding_mode='reflect') | flip | normalize | cutout(16)
    resize(256) | center_crop(224) | flip

Names separated by `|`, applied from left to right; arguments are literals, by position or by name.
`normalize` marks where uint8 becomes normalised floats: by default after everything that works
on one image, and always before mixup and cutmix, which work on the batch. resize and center_crop
draw nothing, and apply to held-out images too (`evaluation`).
"""

import ast
import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxcifar.augment import mixing, ops, transforms
from jaxcifar.augment.geometry import View
from jaxcifar.augment.resize import CenterCrop, Resize
from jaxcifar.errors import UserError, plain, unknown


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Mark the place of ToTensor and Normalize."""

    def describe(self):
        """Return one line for the run's header."""
        return "uint8 to float, normalised by mean and standard deviation per channel"


REGISTRY = {
    "rotation": transforms.Rotation,
    "flip": transforms.Flip,
    "crop": transforms.Crop,
    "autoaugment": transforms.AutoAugment,
    "randaugment": transforms.RandAugment,
    "trivialaugment": transforms.TrivialAugment,
    "color_jitter": transforms.ColorJitter,
    "random_erasing": transforms.RandomErasing,
    "cutout": transforms.Cutout,
    "resize": Resize,
    "center_crop": CenterCrop,
    "normalize": Normalize,
    "mixup": mixing.Mixup,
    "cutmix": mixing.Cutmix,
}
_NAMES = {op: name for name, op in REGISTRY.items()}
_MIXING = (mixing.Mixup, mixing.Cutmix)
_SIZING = (Resize, CenterCrop)  # without any randomness
_TORCHVISION = {"randomcrop": "crop", "randomhorizontalflip": "flip", "horizontalflip": "flip",
                "randomrotation": "rotation", "trivialaugmentwide": "trivialaugment"}


def signature(name):
    """Return how operation `name` is written, e.g. "crop(padding, padding_mode='constant')"."""
    parts = [field.name if field.default is dataclasses.MISSING
             else f"{field.name}={field.default!r}" for field in dataclasses.fields(REGISTRY[name])]
    return f"{name}({', '.join(parts)})"


def _terms(spec):
    """Return the expressions between the bars of `spec`, as syntax trees."""
    if not spec.strip():
        return []
    try:
        node = ast.parse(spec.strip(), mode="eval").body
    except SyntaxError as error:
        raise UserError(
            f"augmentation {spec!r} cannot be read ({error.msg}): expected names with optional "
            "arguments separated by |, such as 'flip|crop(4)'") from None
    terms = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]


def _literal(node):
    value = ast.literal_eval(node)
    return tuple(value) if isinstance(value, list) else value


def _make(node):
    """Return the operation that one term of the specification names."""
    text = ast.unparse(node)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise UserError(f"augmentation: {text!r} is not a name with optional arguments; "
                        "operations are separated by |, such as 'flip|crop(4)'")
    name = call.func.id
    if name not in REGISTRY:
        here = _TORCHVISION.get(plain(name))
        hint = f": torchvision's is {signature(here)} here" if here else ""
        raise UserError(unknown("augmentation", name, REGISTRY, hint))
    try:
        arguments = [_literal(argument) for argument in call.args]
        keywords = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
    except (ValueError, TypeError):  # no literal, an unhashable key
        raise UserError(f"augmentation {text}: arguments are literal numbers, strings or tuples; "
                        f"usage: {signature(name)}") from None
    try:
        return REGISTRY[name](*arguments, **keywords)
    except ValueError as error:
        raise UserError(f"augmentation {text}: {error}; usage: {signature(name)}") from None
    except TypeError as error:
        why = str(error).split("__init__() ")[-1]
        raise UserError(f"augmentation {text}: {why}; usage: {signature(name)}") from None


def _is_uint8(value):
    values = value if isinstance(value, tuple) else (value,)
    return all(isinstance(v, int) and 0 <= v <= 255 for v in values)


def _check_order(operations):
    """Raise UserError where an operation stands on a side of `normalize` where it cannot work."""
    if sum(isinstance(op, Normalize) for op in operations) > 1:
        raise UserError("augmentation: normalize occurs more than once; keep one")
    normalized = mixed = False
    for op in operations:
        name = _NAMES[type(op)]
        if isinstance(op, Normalize):
            normalized = True
        elif isinstance(op, _MIXING):
            mixed = True
        elif normalized and not op.on_normalized:
            raise UserError(f"augmentation: {name} works on uint8 images; put it before normalize")
        if mixed and not isinstance(op, _MIXING):
            raise UserError(f"augmentation: {name} comes after mixup or cutmix, which work on the "
                            "normalised batch; put them last")
        if not normalized and isinstance(op, transforms.RandomErasing) and not _is_uint8(op.value):
            raise UserError(
                f"augmentation: random_erasing before normalize needs whole numbers 0..255, not "
                f"value={op.value!r}; put normalize before it for normalised values")


def parse(spec):
    """Return the operations of a specification string, a tuple of frozen, hashable dataclasses.

    The result holds `Normalize` exactly once, at its default place where `spec` has none.
    Raises UserError on unreadable text, an unknown name (nearest suggested), a bad argument or an
    impossible order.
    """
    operations = [_make(node) for node in _terms(spec)]
    if not any(isinstance(op, Normalize) for op in operations):
        images = next((i for i, op in enumerate(operations) if isinstance(op, _MIXING)),
                      len(operations))
        operations.insert(images, Normalize())
    _check_order(operations)
    return tuple(operations)


def describe(spec):
    """Return one readable line for each operation of `spec`, in order, for the run's header.

    Raises UserError as `parse`.
    """
    return [op.describe() for op in parse(spec)]


def centered(spec, shape):
    """Return the specification of the middle, of shape (H, W, C), of images that `spec` crops from.

    What held-out images are to random square crops of the training images: resized as those, uncut.
    """
    sizing = [ast.unparse(node) for node in _terms(spec) if isinstance(_make(node), _SIZING)]
    return "|".join([*sizing, f"center_crop({shape[0]})"])


@dataclasses.dataclass(frozen=True)
class Augment:
    """A parsed specification, ready to call inside jit: frozen and hashable.

    operations: as `parse` returns; mean, std: three floats on the scale 0..1; dtype: of the images.
    """

    operations: tuple
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    dtype: jnp.dtype

    def sample(self, keys, shape):
        """Draw the parameters of every per-image operation, without applying them.

        keys: typed PRNG keys [N]; shape: (H, W, C). Returns a tuple parallel to `operations`:
        parameters with a leading axis N, None for operations that draw nothing per image.
        """
        return jax.vmap(lambda key: self._sample(key, shape))(keys)

    def _sample(self, key, shape):
        return tuple(
            None if isinstance(op, (Normalize, *_MIXING))
            else op.sample(jax.random.fold_in(key, i), seen)
            for i, (op, seen) in enumerate(zip(self.operations, _shapes(self.operations, shape))))

    def output_shape(self, shape):
        """Return (H', W', C) of what becomes of images of shape (H, W, C)."""
        return _shapes(self.operations, shape)[-1]

    @property
    def is_random(self):
        """Whether anything is drawn: False where every epoch sees the same images."""
        return any(not isinstance(op, (Normalize, *_SIZING)) for op in self.operations)

    def _apply(self, image, parameters, operations):
        view = View(image)
        for i in operations:
            view = self.operations[i].apply(view, parameters[i])
        return view.read()

    def __call__(self, images, labels, keys, batch_key, *, axis_name=None, mask=None):
        """Return augmented, normalised images and their targets.

        images: uint8 [N, H, W, C]; labels: int32 [N]; keys: typed threefry keys [N], one for each
        example; batch_key: one typed key, the same on every device; axis_name: data axis under
        pmap/shard_map; mask: float32 [N], 1 = real example, 0 = padding, None = all real.
        Returns dtype [N, H', W', C] (`output_shape`) and int32 [N], or float32 [N, num_classes] after
        mixup or cutmix.
        """
        _check_keys(keys)
        shape = images.shape[1:]
        kinds = list(enumerate(self.operations))
        normalize_at = next(i for i, op in kinds if isinstance(op, Normalize))
        before = range(normalize_at)
        after = [i for i, op in kinds[normalize_at + 1:] if not isinstance(op, _MIXING)]
        parameters = self.sample(keys, shape)
        if before:
            images = _each(functools.partial(self._apply, operations=before), images, parameters)
        images = ops.normalize(images, self.mean, self.std)
        if after:
            images = _each(functools.partial(self._apply, operations=after), images, parameters)
        targets = labels
        for i, op in kinds:
            if isinstance(op, _MIXING):
                if targets.ndim == 1:
                    targets = jax.nn.one_hot(targets, self.num_classes, dtype=jnp.float32)
                drawn = op.sample(jax.random.fold_in(batch_key, i), images.shape[1:])
                images, targets = op.apply(images, targets, drawn, axis_name, mask)
        return images.astype(self.dtype), targets


def _shapes(operations, shape):
    """Return the shape (H, W, C) that each operation sees, and the last one's result."""
    shapes = [tuple(shape)]
    for op in operations:
        changes = hasattr(op, "output_shape")
        shapes.append(op.output_shape(shapes[-1]) if changes else shapes[-1])
    return shapes


def _each(function, *arguments):
    """Apply `function` of one image's arguments to each of the batch.

    On CPU one image after the other, so that conditions skip what an image does not need
    (measured: 17 ms -> 1.7 ms for 64 images of AutoAugment); elsewhere all at once.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda both: function(*both), arguments)
    return jax.vmap(function)(*arguments)


def _check_keys(keys):
    """Refuse keys whose numbers under vmap depend on the position in the batch."""
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed or "threefry2x32" not in str(jax.random.key_impl(keys)):
        raise UserError(
            f"augmentation keys have dtype {keys.dtype}: expected typed threefry keys from "
            "jax.random.key; other generators make the result depend on the place in the batch")


def build(spec, mean, std, num_classes, dtype=jnp.float32):
    """Return the `Augment` of specification string `spec`.

    mean, std: one float per channel on the scale 0..1; num_classes: width of mixed targets;
    dtype: of the returned images. Raises UserError as `parse`.
    """
    return Augment(parse(spec), tuple(map(float, mean)), tuple(map(float, std)), num_classes,
                   jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What becomes of held-out images: resize and center crop, then normalisation; frozen, hashable.

    operations: Resize and CenterCrop; mean, std: three floats on the scale 0..1; dtype: of the result.
    """

    operations: tuple
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: jnp.dtype

    def __call__(self, images):
        """Return dtype [N, H', W', C] of uint8 [N, H, W, C]."""
        if self.operations:
            images = jax.vmap(self._apply)(images)
        return ops.normalize(images, self.mean, self.std, self.dtype)

    def _apply(self, image):
        return functools.reduce(lambda view, op: op.apply(view, ()), self.operations,
                                View(image)).read()

    def output_shape(self, shape):
        """Return (H', W', C) of what becomes of images of shape (H, W, C)."""
        return _shapes(self.operations, shape)[-1]

    def describe(self):
        """Return one readable line for each operation."""
        return [op.describe() for op in self.operations]


def evaluation(spec, augmentation, mean, std, dtype=jnp.float32):
    """Return the `Evaluation` of held-out images.

    spec: a specification string of resize and center_crop; "auto": those of `augmentation`, the
    specification of the training images. mean, std, dtype: as in `build`. Raises UserError as
    `parse`, or where `spec` has another operation.
    """
    operations = parse(augmentation if spec == "auto" else spec)
    chosen = tuple(op for op in operations if isinstance(op, _SIZING))
    others = [_NAMES[type(op)] for op in operations if not isinstance(op, (Normalize, *_SIZING))]
    if spec != "auto" and others:
        raise UserError(f"evaluation {spec!r}: {others[0]} is random; held-out images take resize "
                        "and center_crop only")
    return Evaluation(chosen, tuple(map(float, mean)), tuple(map(float, std)), jnp.dtype(dtype))
