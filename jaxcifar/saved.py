"""A run that lies in a folder: its configuration, its newest or its best state, its weights."""

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
    """Return (a run's weights as the state_dict of the original, the epochs that they were trained).

    workdir: the run's folder. which: "selected", the epoch by the rule config.selection, which
    result.json measures (the newest while there is none); "best", the one that the run keeps as its
    best (the last where it compares none); or "last". raw: the weights themselves where the run
    averages them (config.ema_decay); else their average, which is what the run evaluates.

    Raises UserError: no such run, or nothing readable in it.
    """
    if which not in WHICH:
        raise UserError(unknown("choice of weights", which, WHICH))
    config = read_config(workdir)
    task = task_of(config)
    state = _state(workdir, task, which)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    if not raw:
        variables = state.variables()
    name, options = model_of(config)
    return torch_weights.to_torch(
        name, variables, num_classes=task.num_classes, image_size=task.image_size,
        num_batches_tracked=int(state.step), **options), int(state.epoch)


def _state(workdir, task, which):
    """Return the newest state, or that of the epoch that the run keeps as its best: see state_dict."""
    form, rule = template(task), selection.kept_rule(task.config)
    if which == "selected":
        finished = pathlib.Path(workdir, "result.json").exists()
        which = "best" if finished and task.config.selection != "last" else "last"
    folder = pathlib.Path(workdir) / "checkpoints"
    run_folder.refuse_without_checkpoints(workdir)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        state = checkpoints.restore_latest(form)
        if state is None:
            raise UserError(f"{folder} holds no finished checkpoint")
        best = selection.best_epoch(state.history, rule) if rule and which == "best" else None
        if best is None or (step := run_folder.step_of(workdir, best)) == int(state.step):
            return state
        if step not in checkpoints.steps():
            raise UserError(f"the best epoch, {best}, is not among the checkpoints in {folder}: "
                            "jaxcifar.convert --which=last takes the last one")
        return checkpoints.restore(step, form)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes orbax raise
        raise UserError(f"the checkpoint of the best epoch in {folder} is damaged "
                        f"({first_line(error)}): put back an intact copy; jaxcifar.convert "
                        "--which=last takes the last epoch") from error
    finally:
        checkpoints.close()


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
