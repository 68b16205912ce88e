"""The models: one literal registry of names, and `create`."""

import dataclasses
import difflib
import importlib
import math

import jax
import jax.numpy as jnp

from jaxcifar.errors import UserError

# name: (file under jaxcifar/models, class, options that differ from the class's defaults)
MODELS = {
    "resnet5m": ("resnet", "ResNet", {}),
    "resnet18": ("resnet", "ResNet", {
        "channels": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), "shortcut_kernel": 1,
        "stem_width": 64}),
    "cnn3": ("cnn", "CNN3", {}),
}


def names():
    """Return the registered model names, sorted."""
    return sorted(MODELS)


def options(name):
    """Return the model's options and their defaults; UserError where the name is unknown."""
    cls, preset = _lookup(name)
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    hidden = {"num_classes", "dtype", "parent", "name"}
    return {key: preset.get(key, value) for key, value in fields.items() if key not in hidden}


def create(name, num_classes=10, *, dtype=jnp.float32, **model_options):
    """Build the linen module of a registered model.

    `model.apply(variables, images, train, ...)` takes images float [N, H, W, 3] and returns logits
    float32 [N, num_classes]; dtype is the type of the computation, parameters stay float32. Raises
    UserError for an unknown name or option, with the nearest known one.
    """
    cls, preset = _lookup(name)
    known = options(name)
    for key in model_options:
        if key not in known:
            raise UserError(f"model {name!r} has no option {key!r}{_nearest(key, known)}; "
                            f"its options: {', '.join(known) or 'none'}")
    chosen = {key: _hashable(value) for key, value in (preset | model_options).items()}
    return cls(num_classes=num_classes, dtype=dtype, **chosen)


def count_params(params):
    """Return the number of scalars in a pytree of arrays or of shapes (jax.eval_shape's result)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _lookup(name):
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}{_nearest(name, MODELS)}; "
                        f"known: {', '.join(names())}")
    module, cls, preset = MODELS[name]
    return getattr(importlib.import_module(f"jaxcifar.models.{module}"), cls), preset


def _nearest(name, known):
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _hashable(value):
    """Return tuples for the lists that configurations hold: linen's fields are hashed by jit."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
