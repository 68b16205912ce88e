"""Task: the functions of a run, built once from its configuration."""

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxcifar import augment, models, optim, plateau, schedules, streams
from ml_collections import ConfigDict

from jaxcifar.config import default
from jaxcifar.errors import UserError


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything of a run that never changes: pure functions and sizes.

    model: linen module, `apply(variables, images, train=...) -> logits`. tx: optimiser whose updates
    are multiplied by the learning rate outside of it. augment: (uint8 images, labels, keys, batch
    key) -> (images, targets). normalize: uint8 images -> images. schedule: (base rate, step) ->
    rate, or None where the plateau's own rate rules. plateau: its initial state or None.
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

    @property
    def steps_per_epoch(self):
        """Number of batches in an epoch, the last, partial one included unless it is dropped."""
        full, rest = divmod(self.num_train, self.config.batch_size)
        return full + (1 if rest and not self.config.drop_last else 0)

    @property
    def tail_size(self):
        """Number of examples in the last, partial batch; 0 when there is none."""
        return 0 if self.config.drop_last else self.num_train % self.config.batch_size

    def init(self, seed):
        """Return the model's initial variables; only (seed, model) decide them."""
        images = jnp.zeros((1, 32, 32, 3), self.model.dtype)
        init = jax.jit(lambda key: self.model.init({"params": key}, images, train=False))
        # Dozens of random tensors compile for longer than they run: on CPU, do not optimise them.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
        key = streams.stream_key(seed, "init")
        return init.lower(key).compile(compiler_options=options)(key)

    def momentum(self, state):
        """Return the momentum, float32 [], of the coming step where the schedule sets it, else None."""
        return self.schedule.momentum(state.step, steps_per_epoch=self.steps_per_epoch,
                                      total_epochs=self.config.epochs)

    def learning_rate(self, state):
        """Return the learning rate, float32 [], of the step that the state is about to take."""
        return self.schedule(state.hparams["learning_rate"], state.step,
                             steps_per_epoch=self.steps_per_epoch,
                             total_epochs=self.config.epochs)


def create_task(config, num_train, num_classes):
    """Build the Task of a configuration.

    Args:
      config: validated configuration. num_train: training examples left after the split.
      num_classes: of the dataset.

    Raises:
      UserError: an unknown model, optimiser, schedule or augmentation, an option that the chosen
        one does not have, a batch larger than the training set, or too many parameters.
    """
    if config.batch_size > num_train and config.drop_last:
        raise UserError(f"config.batch_size = {config.batch_size} is larger than the training set "
                        f"({num_train}) and config.drop_last drops the partial batch")
    dtype = jnp.dtype(config.dtype)
    options = dict(config.model)
    name = options.pop("name")
    model = models.create(name, num_classes=num_classes, dtype=dtype,
                          **{k: _plain(v) for k, v in options.items()})
    _check_params(config, model)
    schedule, plateau_state = _schedule(config)
    mean, std = tuple(config.mean), tuple(config.std)
    return Task(
        config=config, model=model, tx=_optimizer(config), schedule=schedule, plateau=plateau_state,
        augment=augment.build(config.augment, mean, std, num_classes, dtype),
        normalize=lambda images: augment.normalize(images, mean, std, dtype),
        num_classes=num_classes, num_train=num_train)


def _optimizer(config):
    names = optim.option_names(config.optimizer.name)
    general = ("name", "learning_rate", "weight_decay", "decay_exclude")
    return optim.create(
        config.optimizer.name, **_chosen(config, "optimizer", names, general),
        decay_exclude=config.optimizer.decay_exclude, max_grad_norm=config.max_grad_norm,
        max_grad_value=config.max_grad_value, accumulate_steps=config.accumulate_steps)


def _schedule(config):
    """Return (schedule of the step, initial plateau or None)."""
    name, monitor = config.schedule.name, config.schedule.monitor
    names = schedules.option_names(name)
    chosen = _chosen(config, "schedule", names, ("name", "monitor"))
    if config.schedule.cycle_momentum and config.optimizer.name == "sgd":
        if not config.optimizer.momentum:
            raise UserError("config.schedule.cycle_momentum = True needs an optimizer with momentum: "
                            "set config.optimizer.momentum, or adam")
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
                            f"'{options.name}', whose options are {', '.join(names) or 'none'}")
    return {key: _plain(options[key]) for key in names if key in options}


def _check_params(config, model):
    try:
        shapes = jax.eval_shape(lambda: model.init(
            {"params": jax.random.key(0)}, jnp.zeros((1, 32, 32, 3), model.dtype), train=False))
    except (ValueError, TypeError) as error:  # options that make no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model '{config.model.name}' cannot be built: {reason}") from error
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes["params"]))
    if config.max_params and count > config.max_params:
        raise UserError(f"model '{config.model.name}' has {count:,} parameters, more than "
                        f"config.max_params = {config.max_params:,}: make it smaller (channels, "
                        "blocks) or raise the limit")


def _plain(value):
    if isinstance(value, ConfigDict):
        return value.to_dict()
    return tuple(_plain(v) for v in value) if isinstance(value, (list, tuple)) else value
