"""A speedrun's start, its step, and all of its steps: pure functions.

Source: arXiv 2404.00498 and Muon's write-up (see jaxcifar.muon). The network computes in
config.dtype, bfloat16 where the originals have float16, but for its first layer, whose images and
product are float32 (models.speedrun_net.Whitening); parameters and updates are float32 here.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxcifar import config as config_lib
from jaxcifar import augment, metrics, muon, optim, partition, streams
from jaxcifar.augment import ops
from jaxcifar.config import IMAGE_SHAPE
from jaxcifar.errors import UserError
from jaxcifar.models import speedrun_net
from jaxcifar.speedrun import images as images_lib
from jaxcifar.task import Task, create_task

# What jaxcifar.main reads and a speedrun does not, but for config.epochs: what to do instead.
_UNREAD = dict.fromkeys((
    "split_seed", "selection", "test_every_epoch", "early_stopping.min_epochs",
    "early_stopping.window", "save_every_epochs", "reference_curve", "tensorboard", "progress",
    "steps_per_call", "cache_features", "frozen_batch_norm", "bn_sync", "init_from"),
    "leave it as it is")
_UNREAD |= {
    "seed": "--runs=N takes the seeds 0 to N - 1",
    "augment": "set config.speedrun.translate and config.speedrun.cutout",
    "val_size": "it trains on all training images",
    "drop_last": "it drops the partial batch",
    "epoch_fraction": "set config.speedrun.epochs",
    "ema_decay": "set config.speedrun.lookahead_every and config.speedrun.lookahead_decay"}
_FIXED = {"augment": "", "val_size": 0, "drop_last": True}  # as its data are; else the default


@dataclasses.dataclass(frozen=True)
class Speedrun:
    """What never changes in a speedrun.

    total_steps: of the training. bias_steps: how many of them train the first layer's bias. proxy:
    the Speedrun of the network that chooses `keep` examples of every batch, or None: all are taken.
    """

    task: Task
    total_steps: int
    bias_steps: int
    proxy: Any = None

    @property
    def keep(self):
        """Number of examples of a batch that are trained on."""
        return round(self.config.speedrun.keep_share * self.config.batch_size)

    @property
    def config(self):
        """The configuration."""
        return self.task.config


@flax.struct.dataclass
class State:
    """What changes: trained weights, and `slow`, their moving average ({} without lookahead)."""

    params: Any
    batch_stats: Any
    opt_state: Any
    slow: Any


@flax.struct.dataclass
class Prepared:
    """What a training reads: order [steps, batch], flips bool [N], padded images uint8, labels.

    kept: int32 [steps, keep], places in the batches of the examples that are trained on; None: all.
    """

    order: Any
    flips: Any
    images: Any
    labels: Any
    kept: Any = None


def check(config):
    """Raise UserError unless the configuration is valid, and that of a speedrun."""
    config_lib.validate(config)
    if config.speedrun.epochs <= 0:
        raise UserError("config.speedrun.epochs = 0: this configuration is no speedrun; take "
                        "--config=configs/speedrun.py:94, or train it by jaxcifar.main")
    if not config.model.name.startswith("speedrun"):
        raise UserError(f"config.model.name = {config.model.name!r}: a speedrun starts by "
                        "whitening, which the models speedrun94 and speedrun96 are made for")
    if config.num_devices != 1 or config.parallel not in ("auto", "jit"):
        raise UserError(f"config.num_devices = {config.num_devices}, config.parallel = "
                        f"{config.parallel!r}: a speedrun is one program on one device; set 1 and "
                        "auto")
    if not config.eval_batch_size:
        raise UserError("config.eval_batch_size = 0: must be at least 1 in a speedrun")
    options = config.speedrun
    if not 0 < options.keep_share <= 1:
        raise UserError(f"config.speedrun.keep_share = {options.keep_share}: must be above 0 and "
                        "at most 1 (all examples)")
    if options.proxy_every < 1:
        raise UserError(f"config.speedrun.proxy_every = {options.proxy_every}: must be at least 1")
    fields = config_lib.flatten(config_lib.to_dict(config))
    usual = config_lib.flatten(config_lib.to_dict(config_lib.default())) | _FIXED
    for path, advice in _UNREAD.items():
        if fields[path] != usual[path]:
            raise UserError(f"config.{path} = {fields[path]!r}: a speedrun does not read it, and it "
                            f"must be {usual[path]!r}; {advice}")


def create(config, num_train, num_classes):
    """Build the Speedrun of a configuration; raises UserError as `check` and `create_task`."""
    check(config)
    task = create_task(config, num_train, num_classes)
    task = dataclasses.replace(task, normalize=augment.evaluation(  # in float32, as in `batch`
        config.eval_transform, config.augment, tuple(config.mean), tuple(config.std)))
    per_epoch = num_train // config.batch_size
    total = math.ceil(config.speedrun.epochs * per_epoch)
    bias = min(math.ceil(config.speedrun.whiten_bias_epochs * per_epoch), total)
    proxy = None
    if config.speedrun.keep_share < 1:
        proxy = create(proxy_config(config), num_train, num_classes)
    return Speedrun(task, total, bias, proxy)


def proxy_config(config):
    """Return the configuration of a configuration's proxy; see jaxcifar.speedrun.proxy."""
    small = config.copy_and_resolve_references()
    small.model.update(channels=config.speedrun.proxy_channels, depth=2)
    small.speedrun.update(keep_share=1.0, lookahead_every=0, whiten_bias_epochs=0.0)
    return small


def start(run, seed, images, labels):
    """Return the Prepared and the State before step 0.

    seed: uint32 []. images: uint8 [N, 32, 32, 3]. labels: int32 [N].
    """
    config, count = run.config, len(labels)
    prepared = Prepared(
        images_lib.order(seed, count, config.batch_size, run.total_steps),
        images_lib.first_flips(seed, count), images_lib.pad(images, config.speedrun.translate),
        labels)
    return prepared, initial(run, seed, images)


def first_places(run):
    """Return Prepared.kept to compile and to measure with: the first places of every batch, or None."""
    if run.proxy is None:
        return None
    return jnp.tile(jnp.arange(run.keep, dtype=jnp.int32), (run.total_steps, 1))


def initial(run, seed, images):
    """Return the State before step 0; the first layer's kernel is that of the training images."""
    config = run.config
    zeros = jnp.zeros((1, *IMAGE_SHAPE))
    key = streams.stream_key(seed, "init")
    variables = run.task.model.init({"params": key}, zeros, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    seen = ops.normalize(images[:config.speedrun.whiten_images], config.mean, config.std)
    kernel = speedrun_net.whitening_kernel(seen, config.speedrun.whiten_eps)
    params = params | {"whiten": params["whiten"] | {"kernel": kernel}}
    slow = {"params": params, "batch_stats": stats} if config.speedrun.lookahead_every else {}
    return State(params, stats, run.task.tx.init(params), slow)


def batch(run, prepared, seed, number):
    """Return the images, float32 [batch, 32, 32, 3], and labels of step `number`.

    Where examples are chosen they are [keep, ...], augmented as the whole batch's are.
    """
    config, options = run.config, run.config.speedrun
    index = prepared.order[number]
    key = jax.random.fold_in(streams.stream_key(seed, "augment"), number)
    moves, squares = jax.random.split(key)
    shift = jax.random.randint(moves, (len(index), 2), 0, 2 * options.translate + 1)
    if options.cutout:
        corners = images_lib.squares(squares, len(index), IMAGE_SHAPE[:2], options.cutout)
    if prepared.kept is not None:
        kept = prepared.kept[number]
        index, shift = index[kept], shift[kept]
        corners = corners[:, kept] if options.cutout else None
    images = images_lib.translated(prepared.images, index, shift, IMAGE_SHAPE[:2])
    epoch = number // (len(prepared.labels) // config.batch_size)
    flips = images_lib.mirrored(prepared.flips[index], epoch)
    images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    images = ops.normalize(images, config.mean, config.std)
    if options.cutout:
        images = images_lib.cut_out(images, corners, options.cutout)
    return images, prepared.labels[index]


def step(run, train_bias, state, prepared, seed, number):
    """Take step `number` (int32 []); see `update`. Returns the State."""
    images, labels = batch(run, prepared, seed, number)
    return update(run, train_bias, state, images, labels, number)[0]


def losses(run, params, state, images, labels):
    """Return the losses of training examples, float32 [n], and the new running statistics."""
    logits, changed = run.task.model.apply(
        {"params": params, "batch_stats": state.batch_stats}, images, train=True,
        mutable=["batch_stats"])
    return (metrics.cross_entropy(logits, labels, run.config.label_smoothing),
            changed["batch_stats"])


def update(run, train_bias, state, images, labels, number, keep=0):
    """Take step `number` (int32 []) on images [n, 32, 32, 3] and labels [n].

    train_bias: whether the first layer's bias is trained; where it is not, nothing is computed for
    its gradient. Gradients are those of the sum of the examples' losses; of the `keep` largest,
    unless that is 0. Returns the State, and the places of these, int32 [keep], or None.
    """
    config, task = run.config, run.task
    trained, frozen = partition.split(state.params, config.trainable)

    def loss_of(trained):
        params = partition.merge(trained, frozen)
        if not train_bias:
            params = params | {"whiten": lax.stop_gradient(params["whiten"])}
        each, stats = losses(run, params, state, images, labels)
        each, kept = lax.top_k(each, keep) if keep else (each, None)
        return each.sum(), (stats, kept)

    grads, (stats, kept) = jax.grad(loss_of, has_aux=True)(trained)
    grads = _decayed(config, grads, trained)
    rate = learning_rate(run, number)
    updates, opt_state = task.tx.update(grads, state.opt_state, state.params, weight_decay=0.0)
    share = bias_share(run, number) if train_bias else 0.0
    updates = updates | {"whiten": {"bias": share * updates["whiten"]["bias"]}}
    if config.speedrun.unit_filters:
        trained = muon.unit_filters(trained, config.optimizer.muon_exclude)
    params = partition.merge(optim.apply_updates(trained, updates, rate), frozen)
    state = State(params, stats, opt_state, state.slow)
    return (_looked_ahead(run, state, number) if state.slow else state), kept


def learning_rate(run, number):
    """Return the learning rate of step `number`, float32 []: the schedule over all the steps."""
    return run.task.schedule(run.config.optimizer.learning_rate, number,
                             steps_per_epoch=run.total_steps, total_epochs=1)


def all_steps(run, seed, images, labels, select=None):
    """Train from the first step to the last; return {"params", "batch_stats"}: one program.

    select: proxy.select where the configuration has a proxy.
    """
    prepared, state = start(run, seed, images, labels)
    if run.proxy is not None:
        prepared = prepared.replace(kept=select(run, prepared, seed, images))

    state = steps(run, True, state, prepared, seed, jnp.arange(run.bias_steps))
    return result(steps(run, False, state, prepared, seed,
                        jnp.arange(run.bias_steps, run.total_steps)))


def steps(run, train_bias, state, prepared, seed, numbers):
    """Take the steps `numbers` (int32 [count]) in a rolled loop; see `step`. Returns the State."""
    def body(state, number):
        return step(run, train_bias, state, prepared, seed, number), None

    return lax.scan(body, state, numbers)[0]


def result(state):
    """Return the variables to evaluate, {"params", "batch_stats"}: the average under lookahead."""
    return state.slow or {"params": state.params, "batch_stats": state.batch_stats}


def bias_share(run, number):
    """Return what turns the schedule's rate into that of the first layer's bias, float32 [].

    Without config.speedrun.whiten_bias_linear that is 1, as in airbench94 and airbench96. With it
    its own rate falls linearly from the base rate to 0 over the steps that train it, as in
    airbench94_muon.
    """
    if not run.config.speedrun.whiten_bias_linear:
        return jnp.float32(1)
    own = run.config.optimizer.learning_rate * (1 - number / run.bias_steps)
    return own / learning_rate(run, number)


def _decayed(config, grads, params):
    """Add weight decay to the gradients, the less of it the more a parameter's rate is multiplied.

    So every parameter loses the same share of itself in a step: the optimiser multiplies it again.
    """
    pairs = partition.multipliers(config.lr_multipliers)
    kept = config.optimizer.decay_exclude
    search = partition.pattern(kept, "decay_exclude").search if kept else lambda name: None

    def add(path, grad, p, factor):
        decays = not search(partition.path_name(path))
        return grad + config.optimizer.weight_decay / factor * p if decays else grad

    return jax.tree_util.tree_map_with_path(add, grads, params, partition.factors(params, pairs))


def _looked_ahead(run, state, number):
    """Every few steps move the slow weights towards the fast ones, and set these to them.

    Source: section 3.4; Zhang et al. 2019, Lookahead Optimizer.
    """
    options, taken = run.config.speedrun, number + 1
    every = options.lookahead_every
    decay = options.lookahead_decay**every * (taken / run.total_steps)**3
    fast = {"params": state.params, "batch_stats": state.batch_stats}
    moved = optim.ema_update(state.slow, fast, decay)
    now = taken % every == 0
    slow, fast = (jax.tree.map(lambda a, b: jnp.where(now, a, b), moved, other)
                  for other in (state.slow, fast))
    return State(fast["params"], fast["batch_stats"], state.opt_state, slow)
