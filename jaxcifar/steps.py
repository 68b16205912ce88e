"""One training step and one evaluation step: pure functions of (task, state, batch)."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxcifar import metrics, optim, partition
from jaxcifar.models import layers
from jaxcifar.state import NO_STEP


@flax.struct.dataclass
class Batch:
    """This device's slice of a global batch.

    images: [n, H, W, 3] in the compute dtype, normalised. targets: int32 [n], or float32
    [n, num_classes] after mixup or cutmix. mask: float32 [n], 0 where an example is padding, or
    None when all are real. count: number of real examples in the whole batch. key: of the dropout.
    """

    images: Any
    targets: Any
    mask: Any = None
    count: Any = None
    key: Any = None


def train_step(task, state, batch, *, axis_name=None):
    """Take one optimiser step.

    Args:
      task: Task. state: TrainState. batch: Batch. axis_name: the data axis, None on one device.

    Returns:
      (TrainState, sums of this global batch as `metrics.batch_sums` gives them).
    """
    trained, frozen = partition.split(state.params, task.config.trainable)

    def loss_of(trained):
        params = partition.merge(trained, frozen)
        logits, batch_stats = forward_train(task, params, state.batch_stats, batch, axis_name)
        sums = metrics.batch_sums(logits, batch.targets, batch.mask,
                                  label_smoothing=task.config.label_smoothing)
        return sums["loss_sum"] / batch.count, (sums, batch_stats)

    grads, (sums, batch_stats) = jax.grad(loss_of, has_aux=True)(trained)
    if axis_name is not None:
        grads, sums = lax.psum((grads, sums), axis_name)
    with jax.named_scope("optimizer"):
        learning_rate = task.learning_rate(state)
        updates, opt_state = task.tx.update(grads, state.opt_state, trained,
                                            weight_decay=state.hparams["weight_decay"],
                                            momentum=task.momentum(state))
        params = partition.merge(optim.apply_updates(trained, updates, learning_rate), frozen)
    ema = state.ema
    if task.config.ema_decay:
        ema = averaged(task, state, {"params": params, "batch_stats": batch_stats})
    state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats,
                          opt_state=opt_state, ema=ema)
    return state, sums


def averaged(task, state, variables):
    """Return the moving average of the weights after the step that gave `variables`.

    It moves when the optimiser does: once in `accumulate_steps` batches.
    """
    every = task.config.accumulate_steps
    updates, waiting = (state.step + 1) // every, (state.step + 1) % every
    moved = optim.ema_update(state.ema, variables, task.config.ema_decay, updates,
                             warmup=task.config.ema_warmup)
    return jax.tree.map(lambda new, old: jnp.where(waiting, old, new), moved, state.ema)


def forward_train(task, params, batch_stats, batch, axis_name):
    """Run the model in train mode; return float32 logits [n, num_classes] and the new batch_stats.

    With config.bn_sync = "replica" each device normalises by its own statistics and the running
    ones are the first device's, as torch's DistributedDataParallel keeps them (broadcast_buffers).
    """
    replica = task.config.bn_sync == "replica"
    context = layers.batch_context(axis_name=axis_name, mask=batch.mask,
                                   bn_axis_name=None if replica else axis_name,
                                   frozen_norms=task.frozen_norms)
    with context:
        logits, changed = task.model.apply(
            {"params": params, "batch_stats": batch_stats}, batch.images, train=True,
            rngs={"dropout": batch.key}, mutable=["batch_stats"])
    new_stats = changed.get("batch_stats", {})
    if replica and axis_name is not None:
        first = lax.axis_index(axis_name) == 0
        new_stats = jax.tree.map(lambda x: lax.psum(jnp.where(first, x, 0), axis_name), new_stats)
    return logits, new_stats


def add_step(total, sums, step):
    """Add one step's sums to an epoch's, and remember the first step whose loss is not finite."""
    bad = jnp.where(jnp.isfinite(sums["loss_sum"]), NO_STEP, step)
    return {**metrics.add({k: total[k] for k in sums}, sums),
            "bad_step": jnp.minimum(total["bad_step"], bad)}


def eval_step(task, variables, batch, *, axis_name=None):
    """Evaluate one batch; return (sums over the global batch, this device's logits float32).

    Each real example counts once, whatever the padding and the number of devices.
    """
    logits = task.model.apply(variables, batch.images, train=False)
    sums = metrics.batch_sums(logits, batch.targets, batch.mask)
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)
    return sums, logits
