"""Task: the functions of a run, built once from its configuration."""

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxcifar import augment, models, optim, partition, plateau, schedules, streams
from jaxcifar.config import IMAGE_SHAPE, default
from jaxcifar.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything of a run that never changes: pure functions and sizes.

    model: linen module, `apply(variables, images, train=...) -> logits`. tx: optimiser whose updates
    are multiplied by the learning rate outside of it. augment: (uint8 images, labels, keys, batch
    key) -> (images, targets). normalize: held-out uint8 images -> images. schedule: (base rate, step)
    -> rate; constant where the plateau's own rate rules. plateau: its initial state or None.
    frozen_norms: paths of the BatchNorms that keep their running statistics in training.
    """

    config: Any
    model: Any
    tx: Any
    augment: Callable
    normalize: Callable
    schedule: Callable
    plateau: Any
    num_classes: int
    num_train: int
    frozen_norms: frozenset = frozenset()

    @property
    def steps_per_epoch(self):
        """Number of batches in an epoch, the last, partial one included unless it is dropped.

        config.epoch_fraction of them, rounded, at least one.
        """
        full, rest = divmod(self.num_train, self.config.batch_size)
        batches = full + (1 if rest and not self.config.drop_last else 0)
        return max(round(batches * self.config.epoch_fraction), 1)

    @property
    def full_steps(self):
        """Number of full batches in an epoch."""
        return min(self.num_train // self.config.batch_size, self.steps_per_epoch)

    @property
    def tail_size(self):
        """Number of examples in the last, partial batch; 0 when there is none."""
        partial = self.steps_per_epoch > self.full_steps
        return self.num_train % self.config.batch_size if partial else 0

    @property
    def image_size(self):
        """Height of the model's inputs in pixels."""
        return self.augment.output_shape(IMAGE_SHAPE)[0]

    def init(self, seed):
        """Return the model's initial variables; only (seed, model) decide them. Traceable in seed."""
        images = jnp.zeros((1, *self.augment.output_shape(IMAGE_SHAPE)), self.model.dtype)
        return self.model.init({"params": streams.stream_key(seed, "init")}, images, train=False)

    def momentum(self, state):
        """Return the momentum, float32 [], of the coming step where the schedule sets it, else None."""
        return self.schedule.momentum(state.step, steps_per_epoch=self.steps_per_epoch,
                                      total_epochs=self.config.epochs)

    def learning_rate(self, state):
        """Return the learning rate, float32 [], of the step that the state is about to take."""
        return self.schedule(state.hparams["learning_rate"], state.step,
                             steps_per_epoch=self.steps_per_epoch,
                             total_epochs=self.config.epochs)


# What every model has and no configuration of a model sets.
_NO_OPTIONS = {"num_classes": "it is the data set's (config.dataset)", "dtype": "set config.dtype",
               "remat": "set config.remat"}


def create_task(config, num_train, num_classes):
    """Build the Task of a configuration.

    Args:
      config: validated configuration. num_train: training examples left after the split.
      num_classes: of the dataset.

    Raises:
      UserError: an unknown model, optimiser, schedule or augmentation, an option that the chosen
        one does not have, a pattern that matches no parameter, a batch larger than the training set,
        or too many parameters or steps.
    """
    if config.batch_size > num_train and config.drop_last:
        raise UserError(f"config.batch_size = {config.batch_size} is larger than the training set "
                        f"({num_train}) and config.drop_last drops the partial batch")
    dtype = jnp.dtype(config.dtype)
    options = dict(config.model)
    name = options.pop("name")
    for option, instead in _NO_OPTIONS.items():
        if option in options:
            raise UserError(f"config.model.{option} is no option of a model: {instead}")
    model = models.create(name, num_classes=num_classes, dtype=dtype,
                          remat=config.remat, **{k: _plain(v) for k, v in options.items()})
    mean, std = tuple(config.mean), tuple(config.std)
    augmentation = augment.build(config.augment, mean, std, num_classes, dtype)
    evaluation = augment.evaluation(config.eval_transform, config.augment, mean, std, dtype)
    shapes = _shapes(config, model, augmentation, evaluation)
    _check_params(config, shapes["params"])
    schedule, plateau_state = _schedule(config)
    tx = _optimizer(config)
    jax.eval_shape(tx.init, shapes["params"])  # where a pattern of its options matches nothing
    task = Task(
        config=config, model=model, tx=tx, schedule=schedule, plateau=plateau_state,
        augment=augmentation, normalize=evaluation, num_classes=num_classes, num_train=num_train,
        frozen_norms=_frozen_norms(config, shapes))
    if config.epochs * task.steps_per_epoch >= 2**31:  # steps are counted in int32
        raise UserError(f"config.epochs = {config.epochs:,} are {config.epochs * task.steps_per_epoch:,} "
                        "steps, of which there can be 2**31 - 1: give fewer epochs or larger batches")
    return task


def _optimizer(config):
    names = optim.option_names(config.optimizer.name, config.optimizer.muon_rest)
    general = ("name", "learning_rate", "weight_decay", "decay_exclude")
    return optim.create(
        config.optimizer.name, **_chosen(config, "optimizer", names, general),
        decay_exclude=config.optimizer.decay_exclude, max_grad_norm=config.max_grad_norm,
        max_grad_value=config.max_grad_value, accumulate_steps=config.accumulate_steps,
        trainable=config.trainable, lr_multipliers=config.lr_multipliers)


def _schedule(config):
    """Return (schedule of the step, initial plateau or None)."""
    name, monitor = config.schedule.name, config.schedule.monitor
    names = schedules.option_names(name)
    chosen = _chosen(config, "schedule", names, ("name", "monitor"))
    if config.schedule.cycle_momentum:
        rule = config.optimizer.name
        rule = config.optimizer.muon_rest if rule == "muon" else rule
        if rule == "sgd" and not config.optimizer.momentum:
            raise UserError("config.schedule.cycle_momentum = True needs an optimizer with momentum: "
                            "set config.optimizer.momentum, or adam")
    declared = default().schedule
    unread = () if name == "plateau" else ("monitor",)
    unread += () if config.schedule.cycle_momentum else ("base_momentum", "max_momentum")
    for key in unread:
        if config.schedule[key] != declared[key]:
            needs = 'schedule.name = "plateau"' if key == "monitor" else "schedule.cycle_momentum"
            raise UserError(f"config.schedule.{key} = {config.schedule[key]!r} has no effect without "
                            f"config.{needs}: leave it at {declared[key]!r}")
    if name != "plateau":
        return schedules.create(name, **chosen), None
    state = plateau.Plateau.create(config.optimizer.learning_rate, **chosen,
                                   mode="max" if monitor.endswith("accuracy") else "min")
    return schedules.create("constant"), state


def _chosen(config, field, names, general):
    """Keep the options in `names`; refuse one that was changed although nothing will read it."""
    options, declared = config[field], default()[field]
    for key, value in options.items():
        if key not in (*names, *general) and value != declared[key]:
            raise UserError(f"config.{field}.{key} = {value!r} has no effect on {field} "
                            f"'{options.name}', whose options are {', '.join(names) or 'none'}: "
                            f"leave it at {declared[key]!r}")
    return {key: _plain(options[key]) for key in names if key in options}


def _shapes(config, model, augmentation, evaluation):
    """Return the shapes of the model's variables; UserError where its options make no network."""
    seen = [transform.output_shape(IMAGE_SHAPE) for transform in (augmentation, evaluation)]
    if config.eval_transform == "auto" and seen[0] != seen[1]:
        example = augment.centered(config.augment, seen[0])
        raise UserError("config.augment gives images of {}x{} in training and of {}x{} in evaluation: "
                        "set config.eval_transform, for instance {!r}".format(
                            *seen[0][:2], *seen[1][:2], example))
    try:
        shapes = [models.shapes(model, size) for size in dict.fromkeys(seen)]
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # options of no network
        reason = first_line(error)
        if isinstance(error, ArithmeticError | LookupError):
            reason = f"{type(error).__name__}, {reason}: is an option of it 0, empty or unknown?"
        raise UserError(f"model '{config.model.name}' cannot be built: {reason}") from error
    if shapes[0] != shapes[-1]:
        raise UserError(f"model '{config.model.name}' has other parameters for training images of "
                        f"{seen[0][:2]} than for held-out ones of {seen[1][:2]}: give both one size "
                        "(config.augment, config.eval_transform)")
    return shapes[0]


def _check_params(config, params):
    """Raise UserError for too many parameters, or patterns that match none of them."""
    count = models.count_params(params)
    if config.max_params and count > config.max_params:
        raise UserError(f"model '{config.model.name}' has {count:,} parameters, more than "
                        f"config.max_params = {config.max_params:,}: make it smaller (channels, "
                        "blocks) or raise the limit")
    partition.check_trainable(params, config.trainable)
    partition.factors(partition.split(params, config.trainable)[0],
                      partition.multipliers(config.lr_multipliers))


def _frozen_norms(config, shapes):
    """Return the paths of the BatchNorms that keep their running statistics in training."""
    if config.frozen_batch_norm == "batch" or not config.trainable:
        return frozenset()
    trained = partition.pattern(config.trainable, "config.trainable").search
    norms = {path[:-1] for path in flatten_dict(shapes.get("batch_stats", {}))}
    return frozenset(norm for norm in norms if not trained("/".join((*norm, "scale"))))


def _plain(value):
    if isinstance(value, ConfigDict):
        return value.to_dict()
    return tuple(_plain(v) for v in value) if isinstance(value, (list, tuple)) else value
