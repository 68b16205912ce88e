"""A run that lies in a folder: its configuration, one epoch's state, its weights."""

import json
import pathlib

import jax
import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import run_folder, selection, torch_weights
from jaxcifar.checkpoint import Checkpoints
from jaxcifar.data import specs
from jaxcifar.errors import UserError, first_line, unknown
from jaxcifar.state import create_state
from jaxcifar.task import create_task

WHICH = ("selected", "last", "best")


def read_config(workdir):
    """Return the configuration of a run folder, from its config.json.

    Raises UserError: there is none, or it is not one of this version of jaxcifar.
    """
    path = pathlib.Path(workdir) / "config.json"
    config = config_lib.default()
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        config.model = config_lib.model(**_tuples(fields.pop("model")))
        _fill(config, _tuples(fields))
    except OSError as error:
        seeds = run_folder.names_of_seeds(workdir)
        raise UserError(
            f"{workdir} holds several seeds ({seeds}), each a run of its own: give one of them, "
            f"such as {pathlib.Path(workdir, seeds.partition(',')[0])}" if seeds else
            f"{workdir} is not a run folder: it has no readable config.json; give the --workdir of "
            "a run") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\\n")[0].partition("\n")[0].strip("\"'")
        raise UserError(f"{path} is not a configuration of this version: {reason}") from error
    config_lib.validate(config)
    return config


def model_of(config):
    """Return the registered name of a configuration's model and its options, a dict."""
    options = config_lib.to_dict(config)["model"]
    return options.pop("name"), options


def task_of(config):
    """Return the Task of a run's configuration, whose data need not be there."""
    spec = specs.get_spec(config.dataset)
    return create_task(config, spec.count("train") - config.val_size, spec.num_classes)


def template(task):
    """Return a new run's TrainState of numpy arrays: the form of every checkpoint."""
    return jax.tree.map(np.asarray, create_state(task, task.config.seed))


def state_dict(workdir, which="selected", *, raw=False):
    """Return (a run's weights as the state_dict of the original, how long they were trained and why
    this epoch: a str such as "epoch 4 of 10: the newest checkpoint; the run is not finished").

    workdir: the run's folder. which: see `load_state`. raw: the weights themselves where the run
    averages them (config.ema_decay); else their average, which is what the run evaluates.

    Raises UserError: no such run, or nothing readable in it.
    """
    config = read_config(workdir)
    task = task_of(config)
    state, reason, _ = load_state(workdir, task, which)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    if not raw:
        variables = state.variables()
    name, options = model_of(config)
    return torch_weights.to_torch(
        name, variables, num_classes=task.num_classes, image_size=task.image_size,
        num_batches_tracked=int(state.step), **options), (
            f"epoch {int(state.epoch)} of {config.epochs}: {reason}")


def load_state(workdir, task, which):
    """Load the state of one epoch of a run; nothing in its folder is changed.

    Args:
      workdir: the run's folder. task: see `task_of`. which: "selected", the epoch that result.json
        was measured at, or the newest while there is no result.json; "last", the newest checkpoint;
        "best", the epoch that the run keeps as its best so far.

    Returns:
      (TrainState, why this one: a str, the run's result: a dict of its selection, steps, test_loss
      and test_accuracy, or None while it is not finished).

    Raises:
      UserError: no checkpoint yet, a damaged one, one of another model, or a run that compares no
        epochs and `which` = "best".
    """
    if which not in WHICH:
        raise UserError(unknown("choice of checkpoint", which, WHICH))
    run_folder.refuse_without_checkpoints(workdir)
    result, form = _read_result(workdir), template(task)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        if which == "selected" and result:
            rule, epoch = result["selection"]["rule"], result["selection"]["epoch"]
            step = result["steps"] if rule == "last" else run_folder.step_of(workdir, epoch)
            return (_restore(checkpoints, step, form, workdir),
                    f"selected by the rule {rule.replace('_', ' ')}", result)
        newest = checkpoints.restore_latest(form)
        if newest is None:
            raise UserError(f"{workdir}/checkpoints holds no finished checkpoint")
        if which == "best":
            rule, epoch = _best(task.config, newest, workdir)
            return (_restore(checkpoints, run_folder.step_of(workdir, epoch), form, workdir),
                    f"the {rule.replace('_', ' ')} so far", result)
        reason = "the newest checkpoint"
        if int(newest.step) != checkpoints.steps()[-1]:
            reason = "the newest that can be read; newer checkpoints are damaged"
        return newest, reason if result else f"{reason}; the run is not finished", result
    finally:
        checkpoints.close()


def _read_result(workdir):
    path = pathlib.Path(workdir) / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {key: result[key] for key in ("selection", "steps", "test_loss", "test_accuracy")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): remove it, and the training "
                        "command writes it again from the checkpoints") from error


def _best(config, newest, workdir):
    """Return (rule, epoch) of the best epoch that the newest state knows of."""
    rule = selection.kept_rule(config)
    epoch = selection.best_epoch(newest.history, rule) if rule else None
    if epoch is None:
        raise UserError(f"{workdir} compares no epochs (val_size = {config.val_size}, selection = "
                        f"{config.selection!r}), or has finished none: use {run_folder.LAST}")
    return rule, epoch


def _restore(checkpoints, step, form, workdir):
    folder = pathlib.Path(workdir) / "checkpoints"
    if step not in checkpoints.steps():
        raise UserError(f"the checkpoint of step {step} is not in {folder} (there are "
                        f"{', '.join(map(str, checkpoints.steps()))}): use {run_folder.LAST}")
    try:
        return checkpoints.restore(step, form)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes orbax raise
        raise UserError(f"the checkpoint {folder / str(step)} cannot be read ({first_line(error)}): "
                        f"put back an intact copy, or use {run_folder.LAST}") from error


def _fill(config, fields):
    for key, value in fields.items():
        if isinstance(value, dict):
            _fill(config[key], value)
        else:
            config[key] = value


def _tuples(value):
    """Return JSON's lists as the tuples that a configuration holds."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
