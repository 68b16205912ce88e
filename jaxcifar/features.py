"""Features of a frozen backbone: computed once, then trained on in the place of the images.

That is possible where every epoch would compute the same ones: only the last layer is trained, the
backbone's BatchNorms keep their running statistics, and nothing before it is random.
"""

import dataclasses
import inspect
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxcifar import augment, epoch, models, partition
from jaxcifar.config import IMAGE_SHAPE
from jaxcifar.models import layers


@dataclasses.dataclass(frozen=True)
class Head:
    """The last layer of a model, on features instead of images; takes the whole model's variables."""

    model: Any

    def apply(self, variables, features, train, **options):
        """Return what `model.apply` of images with these features would."""
        return self.model.apply(variables, features, train, part="head", **options)


def on_features(task, variables, arrays):
    """Return a Task and Arrays that train the head on features.

    task, arrays: of the images, with no `obstacle`. variables: the model's, with the frozen backbone.
    The Task's steps take and return the whole model's state.
    """
    train_transform = augment.evaluation(task.config.augment, "", task.config.mean,
                                         task.config.std, task.model.dtype)
    sources = {"train": (train_transform, arrays.train), "held_out": (task.normalize, arrays.held_out)}
    arrays = dataclasses.replace(arrays, **{
        name: {**data, "images": compute(task, transform, variables, data["images"])}
        for name, (transform, data) in sources.items()})
    return dataclasses.replace(task, model=Head(task.model), augment=_as_they_are,
                               normalize=lambda features: features), arrays


def compute(task, transform, variables, images):
    """Return the features, numpy [n, C] in the compute dtype, of uint8 images [n, H, W, 3].

    transform: uint8 images -> the model's inputs.
    """
    @jax.jit
    def of_batch(variables, images):
        return task.model.apply(variables, transform(images), train=False, part="features")

    size, count = epoch.eval_batch_size(task.config, 1), len(images)
    variables = jax.device_put(variables)
    batches = [np.asarray(of_batch(variables, images[np.arange(first, first + size) % count]))
               for first in range(0, count, size)]
    return np.concatenate(batches)[:count]


def obstacle(task):
    """Return why the features of a run must be computed in every step, or "" where once is enough."""
    config, model = task.config, task.model
    if not config.trainable:
        return "nothing is frozen"
    if not config.cache_features:
        return "config.cache_features = False"
    if "part" not in inspect.signature(type(model).__call__).parameters:
        return f"model {config.model.name!r} has no separate head"
    if task.augment.is_random:
        return "the augmentation is random"
    variables, features, is_random = _backbone(task)
    head = models.shapes(model, features.shape[1:], part="head")
    trained, _ = partition.split(variables["params"], config.trainable)
    if not flatten_dict(trained).keys() <= flatten_dict(head["params"]).keys():
        return "more than the last layer is trained"
    norms = {path[:-1] for path in flatten_dict(variables.get("batch_stats", {}))}
    if not norms <= task.frozen_norms:
        return "frozen BatchNorms use batch statistics (config.frozen_batch_norm)"
    return "the backbone has dropout or stochastic depth" if is_random else ""


def _backbone(task):
    """Return the shapes of the variables and of the features, and whether training needs dropout keys."""
    images = jax.ShapeDtypeStruct((1, *task.augment.output_shape(IMAGE_SHAPE)), jnp.float32)
    variables = models.shapes(task.model, images.shape[1:])

    def features(train):
        with layers.batch_context(frozen_norms=task.frozen_norms):
            return jax.eval_shape(lambda v, x: task.model.apply(
                v, x, train=train, part="features", mutable=["batch_stats"])[0], variables, images)

    try:
        features(train=True)
    except flax.errors.InvalidRngError:
        return variables, features(train=False), True
    return variables, features(train=False), False


def _as_they_are(features, labels, keys, batch_key, *, axis_name=None, mask=None):
    """Stand in for `augment.Augment`."""
    del keys, batch_key, axis_name, mask
    return features, labels
