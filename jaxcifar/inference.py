"""A trained run, opened to be read: its configuration, one epoch's weights, and their logits."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcifar import config as config_lib
from jaxcifar import command, errors, host, parallel, saved, splits, train
from jaxcifar.epoch import eval_batch_size
from jaxcifar.errors import UserError

SPLITS = ("test", "val", "train")


@dataclasses.dataclass(frozen=True)
class Trained:
    """One epoch of a run.

    config: the run's, with devices that this machine has. run_hash: config.config_hash of the run's
    own. variables: numpy arrays. epoch, step: int, how long the weights were trained. result:
    content of result.json, or None while the run is not finished. description: which epoch this is
    and why, for a person.
    """

    workdir: pathlib.Path
    config: Any
    run_hash: str
    task: Any
    devices: parallel.Parallel
    variables: Any
    epoch: int
    step: int
    result: dict | None
    description: str


def load(workdir, which="selected"):
    """Load the weights of a run; nothing in its folder is changed, and it may be going on.

    Args:
      workdir: the run's folder. which: see `saved.load_state`.

    Returns:
      Trained. The weights are the average where the run keeps one (config.ema_decay).

    Raises:
      UserError: no run, or none of its checkpoints that is `which`.
    """
    host.share_device_memory()  # with the run
    workdir = pathlib.Path(workdir)
    config = saved.read_config(workdir)
    train.configure_jax(config)
    run_hash, config = config_lib.config_hash(config), _for_this_machine(config)
    task = saved.task_of(config)
    state, reason, result = saved.load_state(workdir, task, which)
    epoch, step = int(state.epoch), int(state.step)
    description = f"{workdir}: epoch {epoch} of {config.epochs}, step {step:,} ({reason})"
    return Trained(workdir, config, run_hash, task, _devices(config), state.variables(), epoch, step,
                   result, description)


def split_arrays(trained, split):
    """Return (images uint8 [n, 32, 32, 3], labels int32 [n]) of a split as the run divided its data.

    split: "train" (what the run trains on, not augmented), "val" or "test". Raises UserError: an
    unknown name, a dataset that is not prepared, or a run without validation set.
    """
    if split not in SPLITS:
        raise UserError(errors.unknown("split", split, SPLITS))
    if split == "val" and not trained.config.val_size:
        raise UserError(f"{trained.workdir} has no validation set (val_size = 0): choose test or "
                        "train")
    arrays = splits.load(trained.config)
    if split != "test":
        splits.refuse_other_data(arrays.digest, trained.workdir)
    if split == "train":
        return arrays.train["images"], arrays.train["labels"]
    first, stop = arrays.spans[split]
    return arrays.held_out["images"][first:stop], arrays.held_out["labels"][first:stop]


def batches_of(trained, images):
    """Return an iterator of the consecutive batches of an array, each example once."""
    size = trained.config.eval_batch_size
    return (images[first:first + size] for first in range(0, len(images), size))


def logits(trained, batches, *, flip=False):
    """Compute the logits of batches of images, on all devices of the run.

    Args:
      trained: Trained. batches: iterable of uint8 [n, 32, 32, 3], n <= config.eval_batch_size.
      flip: return the mean of the logits of an image and of its mirror image. Of logits, not of
        probabilities: the mean is again logits, and as the cross entropy is convex in them its loss
        is never above the mean of the two losses.

    Yields:
      float32 [n, num_classes] for each batch, in order. While a result is awaited, the next batch
      is already computed. Raises UserError where a logit is not finite.
    """
    program = trained.devices.program(functools.partial(_logits, trained.task, flip))
    variables = trained.devices.replicate(trained.variables)
    size, done, pending = trained.config.eval_batch_size, 0, None

    def fetch(count, output):
        values = trained.devices.fetch(output)[:count]
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise UserError(f"the logits of image {done + int(np.argmax(bad)) + 1} are not finite: "
                            "the run's weights are broken; choose another --checkpoint")
        return values

    for batch in batches:
        padded = np.zeros((size, *batch.shape[1:]), np.uint8)
        padded[:len(batch)] = batch
        started = len(batch), program(variables, trained.devices.replicate(padded))
        if pending:
            yield fetch(*pending)
            done += pending[0]
        pending = started
    if pending:
        yield fetch(*pending)


def _logits(task, flip, variables, images, *, axis_name, num_devices):
    """Return the logits of replicated images, float32 [n, C]; each device computes its slice."""
    if axis_name is not None:
        local = images.shape[0] // num_devices
        images = lax.dynamic_slice_in_dim(images, lax.axis_index(axis_name) * local, local)

    def of(views):
        return task.model.apply(variables, task.normalize(views), train=False).astype(jnp.float32)

    values = of(images)
    if flip:
        values = (values + of(images[:, :, ::-1])) / 2
    return values if axis_name is None else lax.all_gather(values, axis_name, tiled=True)


def _for_this_machine(config):
    """Return the configuration on the run's number of devices, or on all where there are fewer."""
    config = config.copy_and_resolve_references()
    available = jax.device_count()
    if not 0 < config.num_devices <= available:
        config.num_devices = available
    if config.parallel == "jit" and config.num_devices > 1:
        config.parallel = "auto"
    count = config.num_devices
    config.eval_batch_size = _multiple(eval_batch_size(config, count), count)
    return config


def _devices(config):
    config = config.copy_and_resolve_references()
    config.batch_size = _multiple(config.batch_size, config.num_devices)  # nothing is trained here
    return parallel.create(config)


def _multiple(size, count):
    return -(-size // count) * count


class Parser(command.Parser):
    """A command line with --workdir, --checkpoint and --flip."""

    def __init__(self, prog, description):
        """Declare the arguments that every reader of a run has."""
        super().__init__(description, prog)
        self.add_argument("--workdir", required=True, help="the run's folder")
        self.add_argument("--checkpoint", default="selected",
                          help=f"which epoch: {', '.join(saved.WHICH)}; default selected")
        self.add_argument("--flip", action="store_true",
                          help="mean of the logits of each image and its mirror image")
