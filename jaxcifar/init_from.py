"""config.init_from: the weights that a run starts from.

A file (weight_files.READABLE), a run folder, or the name of torchvision's ImageNet weights, which
are looked for where torch keeps its downloads, and fetched from torchvision's address.
"""

import contextlib
import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxcifar import config as config_lib
from jaxcifar import models, saved, torch_weights, weight_files
from jaxcifar.errors import UserError, unknown

ADDRESS = "https://download.pytorch.org/models/"
# torchvision's name: its file, whose last part is the beginning of the file's sha256
TORCHVISION = {
    "ResNet18_Weights.IMAGENET1K_V1": "resnet18-f37072fd.pth",
    "MobileNet_V3_Small_Weights.IMAGENET1K_V1": "mobilenet_v3_small-047dcff4.pth",
    "EfficientNet_V2_S_Weights.IMAGENET1K_V1": "efficientnet_v2_s-dd5fe13b.pth",
}
_TIMEOUT_S = 60.0
_BLOCK = 1 << 20


def start(task, state):
    """Return a new run's state with the weights that its configuration names, and lines for the log.

    task: Task. state: TrainState of numpy arrays, fresh. Where the weights are of other classes, or
    have none, the classifier keeps its initial values. Returns (TrainState, list of str), ([] where
    config.init_from is ""). Raises UserError: no such weights, or they are of another model.
    """
    config = task.config
    if not config.init_from:
        return state, []
    name, options = saved.model_of(config)
    for model, (weights, *_) in config_lib.IMAGENET.items():  # before anything is fetched
        if weights == config.init_from and name in models.MODELS and (
                models.MODELS[name][:2] != models.MODELS[model][:2]):
            raise UserError(f"config.init_from = {weights!r}: they are the weights of model "
                            f"{model!r}, and config.model is {name!r}")
    path, given = _read(config.init_from)
    own = torch_weights.to_torch(name, {"params": state.params, "batch_stats": state.batch_stats},
                                 num_classes=task.num_classes, image_size=task.image_size,
                                 **options)
    new = _new_keys(given, own, classifier_keys(name, task.num_classes, task.image_size, options))
    with _naming(config.init_from):
        variables = torch_weights.from_torch(
            name, given, initial={key: own[key] for key in new}, num_classes=task.num_classes,
            image_size=task.image_size, **options)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    ema = {"params": params, "batch_stats": batch_stats} if config.ema_decay else {}
    state = state.replace(params=params, batch_stats=batch_stats,
                          ema=jax.tree.map(np.copy, ema))
    loaded = sum(key in own and key not in new and not key.endswith("num_batches_tracked")
                 for key in given)
    return state, [f"{loaded} tensors of {path}",
                   f"new: {', '.join(sorted(new)) or 'none'}"]


def classifier_keys(name, num_classes, image_size, options):
    """Return the state_dict keys of a model whose shapes depend on the number of classes."""
    shapes = []
    for count in (num_classes, num_classes + 1):
        variables = models.shapes(models.create(name, count, **options), (image_size, image_size, 3))
        shapes.append({torch_weights.torch_key(path): leaf.shape
                       for path, leaf in flatten_dict(variables).items()})
    return {key for key, shape in shapes[0].items() if shape != shapes[1][key]}


def _new_keys(given, own, classifier):
    """Return the classifier's keys, unless the weights have all of them in the model's shapes."""
    fits = all(key in given and tuple(given[key].shape) == own[key].shape for key in classifier)
    return set() if fits else classifier


def _read(source):
    """Return (where the weights were, state_dict) of config.init_from."""
    path = pathlib.Path(source).expanduser()
    if source.partition(".")[0].endswith("_Weights") and path.suffix not in weight_files.READABLE:
        path = torchvision_file(source)
    else:
        if path.is_dir():
            with _naming(source):
                given, description = saved.state_dict(path)
                return f"{path}, {description}", given
        if path.suffix not in weight_files.READABLE and not path.is_file():
            raise UserError(f"config.init_from = {source!r}: there is no such run folder; give one, a "
                            f"{', '.join(weight_files.READABLE)} file, or one of "
                            f"{', '.join(TORCHVISION)}")
    with _naming(source):
        return path, weight_files.load_file(path)


@contextlib.contextmanager
def _naming(source):
    """Name config.init_from in a UserError of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"config.init_from = {source!r}: {error}") from error


def torchvision_file(name):
    """Return the path of torchvision's weights `name`, downloaded if they are not there.

    They are where torch.hub keeps them: $TORCH_HOME/hub/checkpoints, TORCH_HOME being
    $XDG_CACHE_HOME/torch or ~/.cache/torch by default. Raises UserError: an unknown name, a file
    whose sha256 is not the one in its name, or no way to fetch it.
    """
    if name not in TORCHVISION:
        raise UserError(unknown("torchvision weights", name, TORCHVISION))
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    home = os.environ.get("TORCH_HOME") or pathlib.Path(cache) / "torch"
    path = pathlib.Path(home).expanduser() / "hub" / "checkpoints" / TORCHVISION[name]
    if not path.exists():
        _download(ADDRESS + path.name, path)
    elif not _is_whole(path, path.name):
        raise UserError(f"{path} is damaged (its sha256 is not the one in its name): remove it, and "
                        f"it is fetched again from {ADDRESS}{path.name}")
    return path


def _download(address, path):
    """Fetch a file to `path`; it gets its name only when its sha256 is right."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # others may fetch it at the same time
    advice = f"fetch {address} on a machine with a network, and put it at {path}"
    print(f"downloading {address} to {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as reply, part.open("wb") as file:
            while block := reply.read(_BLOCK):
                file.write(block)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, (OSError, http.client.HTTPException)):  # URLError is an OSError
            raise
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {path.name} ({reason}): {advice}") from error
    if not _is_whole(part, path.name):
        part.unlink()
        raise UserError(f"{address} came damaged (its sha256 is not the one in its name): try again, "
                        f"or {advice}")
    part.replace(path)


def _is_whole(path, name):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest().startswith(name.rpartition("-")[2].partition(".")[0])
