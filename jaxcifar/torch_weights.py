"""PyTorch state_dicts to Flax variables and back, by one rule set for every model.

A Flax path joined with dots is the state_dict's key (see jaxcifar.models.layers); only leaves are
renamed:

    params       kernel [kh, kw, in, out] -> weight [out, in, kh, kw]
                 kernel [in, out]         -> weight [out, in]
                 scale  -> weight         any other leaf keeps its name and layout
    batch_stats  mean   -> running_mean   var -> running_var   (num_batches_tracked is not kept)
"""

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcifar import models
from jaxcifar.errors import UserError

_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
_COUNTER = "num_batches_tracked"
_MOST_LISTED = 20


def from_torch(name, state_dict, *, initial=None, num_classes=10, image_size=32, **options):
    """Return a model's variables that hold a state_dict's values.

    name, num_classes, options: as in `models.create`; image_size: of the model's inputs;
    state_dict: key -> torch tensor or numpy array; initial: the same, what stands in its place or
    beside it. Returns {"params", "batch_stats"} of float32
    numpy arrays. Raises UserError that lists the missing, unexpected and wrongly shaped keys.
    """
    template = _template(name, num_classes, image_size, options)
    given = {key: _array(value) for key, value in {**state_dict, **(initial or {})}.items()
             if not _is_counter(key)}
    wanted = {torch_key(path): (path, leaf) for path, leaf in template.items()}
    _refuse_prefix(name, state_dict, wanted)
    problems = [f"missing {key} {_torch_shape(path, leaf.shape)}"
                for key, (path, leaf) in wanted.items() if key not in given]
    problems += [f"unexpected {key} {value.shape}"
                 for key, value in given.items() if key not in wanted]
    problems += [f"{key} has shape {given[key].shape}, expected {_torch_shape(path, leaf.shape)}"
                 for key, (path, leaf) in wanted.items()
                 if key in given and given[key].shape != _torch_shape(path, leaf.shape)]
    if problems:
        raise UserError(f"state_dict does not fit model {name!r}: {_listed(problems)}")
    return unflatten_dict({
        path: np.ascontiguousarray(_to_flax_layout(path, given[key].astype(np.float32)))
        for key, (path, _) in wanted.items()})


def to_torch(name, variables, *, num_classes=10, image_size=32, num_batches_tracked=0, **options):
    """Return the state_dict, key -> numpy array, that the PyTorch original would load.

    variables: {"params", "batch_stats"} of the model. num_batches_tracked: the count written for
    every BatchNorm. Raises UserError where the variables are not those of `models.create(name,
    num_classes, **options)`.
    """
    template = {path: leaf.shape
                for path, leaf in _template(name, num_classes, image_size, options).items()}
    collections = {path[0] for path in template}
    given = {path: leaf for path, leaf in flatten_dict(variables).items() if path[0] in collections}
    problems = [f"missing {'/'.join(path)}" for path in template if path not in given]
    problems += [f"unexpected {'/'.join(path)}" for path in given if path not in template]
    problems += [f"{'/'.join(path)} has shape {given[path].shape}, expected {shape}"
                 for path, shape in template.items()
                 if path in given and given[path].shape != shape]
    if problems:
        raise UserError(f"variables are not those of model {name!r}: {_listed(problems)}")
    state_dict = {}
    for path in template:
        value = _to_torch_layout(path, np.asarray(given[path], np.float32))
        state_dict[torch_key(path)] = np.array(value, order="C")  # a copy, writable as torch wants
        if path[0] == "batch_stats" and path[-1] == "var":
            counter = ".".join((*path[1:-1], _COUNTER))
            state_dict[counter] = np.asarray(num_batches_tracked, np.int64)
    return state_dict


def _refuse_prefix(name, given, wanted):
    """Raise UserError where no key is the model's, but most of it is there behind a shared first part."""
    if any(key in wanted for key in given):
        return
    for prefix in dict.fromkeys(key.partition(".")[0] + "." for key in given):
        fit = [key.startswith(prefix) and key.removeprefix(prefix) in wanted for key in given]
        if sum(fit) > len(wanted) / 2:
            raise UserError(
                f"state_dict does not fit model {name!r}: its keys begin with {prefix!r}. Save it "
                f"without that: {{k.removeprefix({prefix!r}): v for k, v in state_dict.items() "
                f"if k.startswith({prefix!r})}}")


def _listed(problems):
    rest = len(problems) - _MOST_LISTED
    return "; ".join(problems[:_MOST_LISTED]) + (f"; and {rest} more" if rest > 0 else "")


def torch_key(path):
    """Return the state_dict key of a path such as ("params", "layer1.0", "conv1", "kernel")."""
    return ".".join((*path[1:-1], _LEAVES.get((path[0], path[-1]), path[-1])))


def _template(name, num_classes, image_size, options):
    model = models.create(name, num_classes, **options)
    return flatten_dict(models.shapes(model, (image_size, image_size, 3)))


def _to_torch_layout(path, value):
    """Turn a kernel [kh, kw, in, out] into [out, in, kh, kw], [in, out] into [out, in]."""
    if path[-1] != "kernel":
        return value
    return np.moveaxis(value, (-1, -2), (0, 1))


def _to_flax_layout(path, value):
    if path[-1] != "kernel":
        return value
    return np.moveaxis(value, (0, 1), (-1, -2))


def _torch_shape(path, shape):
    if path[-1] != "kernel":
        return tuple(shape)
    return (shape[-1], shape[-2], *shape[:-2])


def _is_counter(key):
    return key == _COUNTER or key.endswith("." + _COUNTER)


def _array(value):
    """Return a numpy array of an array or of a torch tensor, without importing torch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
    return np.asarray(value)
