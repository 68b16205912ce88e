"""An epoch on the device: permutation, gather, augmentation and a loop over steps."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxcifar import metrics, steps, streams
from jaxcifar.models import conv
from jaxcifar.state import zero_sums
from jaxcifar.steps import Batch

EVAL_BATCH = {True: 100, False: 1000}  # {on CPU: examples}, see eval_batch_size


def order(task, state, *, axis_name=None, num_devices=1):
    """Return the epoch's permutation of the training set, int32 [num_train], same on every device."""
    del axis_name, num_devices
    key = streams.stream_key(state.seed, "order", state.epoch)
    return jax.random.permutation(key, task.num_train).astype(jnp.int32)


def train_steps(task, num_steps, size, unroll, state, data, permutation, *, axis_name, num_devices):
    """Take `num_steps` steps from where the state stands.

    Args:
      task: Task. num_steps: int. size: examples in each global batch (the batch size, or what is
        left for the last, partial batch). unroll: a Python loop instead of lax.scan (XLA:CPU runs
        convolutions inside a rolled loop 25-55 times slower).
      state: TrainState on the device. data: {"images" uint8 [n, 32, 32, 3], "labels" int32 [n]}.
      permutation: int32 [n] from `order`.

    Returns:
      TrainState with its `sums` advanced.
    """
    def body(state, _):
        batch = train_batch(task, size, state, data, permutation, axis_name, num_devices)
        step = state.step
        state, sums = steps.train_step(task, state, batch, axis_name=axis_name)
        return state.replace(sums=steps.add_step(state.sums, sums, step)), None

    if unroll or num_steps == 1:
        for _ in range(num_steps):
            state, _ = body(state, None)
        return state
    return lax.scan(body, state, length=num_steps)[0]


def over_seeds(function, seed_axes):
    """Return `function`, an order, train_steps or eval_steps of one run, for several seeds at once.

    seed_axes: for each argument 0, where its arrays have a leading axis of seeds, or None, where
    all seeds share it. Every result has that axis.
    """
    def of_all(*args, axis_name, num_devices):
        of_one = functools.partial(function, axis_name=axis_name, num_devices=num_devices)
        with conv.seeds_apart():
            return jax.vmap(of_one, in_axes=seed_axes)(*args)

    return of_all


def train_batch(task, size, state, data, permutation, axis_name, num_devices):
    """Gather and augment this device's slice of the global batch that the state is about to see.

    The random keys of an example depend on (seed, stream, epoch, its position in the epoch) only.
    Padding makes `size` divisible by the number of devices; padded examples carry mask 0.
    """
    local, offset = _local(size, axis_name, num_devices)
    step_in_epoch = state.step - state.epoch * task.steps_per_epoch
    first = step_in_epoch * task.config.batch_size
    slot = offset + jnp.arange(local)
    position = first + slot
    mask = None if local * num_devices == size else (slot < size).astype(jnp.float32)
    index = permutation[jnp.minimum(position, task.num_train - 1)]

    def key(stream):
        return streams.stream_key(state.seed, stream, state.epoch)

    with jax.named_scope("augment"):
        keys = streams.example_keys(key("augment"), position)
        images, targets = task.augment(
            data["images"][index], data["labels"][index], keys,
            jax.random.fold_in(key("mix"), step_in_epoch), axis_name=axis_name, mask=mask)
    return Batch(images, targets, mask, size, jax.random.fold_in(key("dropout"), step_in_epoch))


def eval_steps(task, whole, variables, data, first, stop, *, axis_name, num_devices):
    """Evaluate examples `first` to `stop` of data, in their own order.

    Args:
      task: Task. whole: every batch in one call, by a loop on the device; else one batch at `first`.
      variables: of the model. data: {"images", "labels"}. first, stop: int32 [], traced, so that one
        program serves every split.

    Returns:
      {"sums": totals, "confusion": int32 [num_classes, num_classes] (row: label)}; every example
      counts once.
    """
    size = eval_batch_size(task.config, num_devices)

    def add_batch(number, total):
        batch = eval_batch(task, data, first + number * size, stop, axis_name, num_devices)
        sums, logits = steps.eval_step(task, variables, batch, axis_name=axis_name)
        confusion = metrics.confusion(batch.targets, jnp.argmax(logits, -1), task.num_classes,
                                      batch.mask)
        if axis_name is not None:
            confusion = lax.psum(confusion, axis_name)
        return {"sums": metrics.add(total["sums"], sums),
                "confusion": total["confusion"] + confusion}

    zero = {"sums": zero_sums(),
            "confusion": jnp.zeros((task.num_classes, task.num_classes), jnp.int32)}
    if not whole:
        return add_batch(0, zero)
    return lax.fori_loop(0, (stop - first + size - 1) // size, add_batch, zero)


def eval_batch_size(config, num_devices):
    """Return the examples in a global evaluation batch: the configuration's, or where it says 0 ours.

    Ours is small on CPU: there XLA's libraries take memory of their own for an operation, and glibc
    maps it anew each time where it is more than 64 MB, so that 1,000 images a batch can take four
    times as long.
    """
    ours = EVAL_BATCH[jax.default_backend() == "cpu"]
    return config.eval_batch_size or -(-ours // num_devices) * num_devices


def eval_batch(task, data, first, stop, axis_name, num_devices):
    """Take this device's slice of the evaluation batch that starts at `first`; mask what is past `stop`."""
    local, offset = _local(eval_batch_size(task.config, num_devices), axis_name, num_devices)
    position = first + offset + jnp.arange(local)
    index = jnp.minimum(position, stop - 1)
    return Batch(task.normalize(data["images"][index]), data["labels"][index],
                 (position < stop).astype(jnp.float32))


def _local(size, axis_name, num_devices):
    """Return (examples per device after padding, this device's first position in the batch)."""
    local = -(-size // num_devices)
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * local
    return local, offset
