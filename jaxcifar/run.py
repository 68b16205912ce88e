"""A run's folder and state: opened or resumed, saved, and the best epoch found again."""

import json
import pathlib

import jax
import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import logs, parallel, selection
from jaxcifar.checkpoint import Checkpoints
from jaxcifar.errors import UserError
from jaxcifar.state import create_state


class Run:
    """The folder of a run.

    log: logs.RunLog. state: TrainState of numpy arrays to start from, new or restored. resumed:
    whether it was restored. workdir: Path. Only the first process reads and writes; the others get what it read.
    """

    def __init__(self, task, workdir, stream=None):
        """Open the folder, and restore the newest checkpoint that it holds.

        Args:
          task: Task. workdir: path. stream: see logs.RunLog.

        Raises:
          UserError: the folder cannot be written, or it belongs to another configuration (the
            fields that differ are named), or no checkpoint can be read.
        """
        self._task = task
        self.workdir = pathlib.Path(workdir)
        self._template = jax.tree.map(np.asarray, create_state(task, task.config.seed))
        self._checkpoints = Checkpoints(workdir) if parallel.is_primary() else None
        restored = None
        if self._checkpoints and self._checkpoints.steps():
            refuse_other_config(task.config, workdir)
            restored = self._checkpoints.restore_latest(self._template)
        self.resumed = bool(parallel.agree_on(restored is not None))
        self.state = parallel.share(restored or self._template)
        self.log = logs.RunLog(
            workdir, primary=parallel.is_primary(), tensorboard=task.config.tensorboard,
            resume_epoch=int(self.state.epoch) + 1 if self.resumed else None, stream=stream)
        self.log.write_config(config_lib.to_dict(task.config))

    @property
    def last_saved_step(self):
        """The newest checkpoint's step, or None."""
        steps = self._checkpoints.steps() if self._checkpoints else []
        return steps[-1] if steps else None

    def best_epoch(self, history):
        """Return the epoch (from 1) that the run keeps as its best so far, or None."""
        rule = selection.kept_rule(self._task.config)
        return selection.best_epoch(history, rule) if rule else None

    def is_due(self, history, epoch):
        """Return whether the state after `epoch` (from 1) is to be saved."""
        config = self._task.config
        return (epoch % config.save_every_epochs == 0 or epoch == config.epochs
                or epoch == self.best_epoch(history))

    def report(self, row, history):
        """Append an epoch's row to the log; say so when it is the best, or the last by early stopping."""
        config, epoch = self._task.config, row["epoch"]
        notes = ["best"] if epoch == self.best_epoch(history) else []
        if epoch < config.epochs and selection.should_stop(history, epoch, config):
            notes.append("early stopping")
        self.log.epoch(row, epochs=config.epochs, note=", ".join(notes))

    def save(self, state):
        """Save a state of numpy arrays; the newest two and the best are kept."""
        if self._checkpoints:
            self._checkpoints.save(state, self._step_of(self.best_epoch(state.history)))

    def restore(self, epoch):
        """Return the state after `epoch` (from 1), which must be a kept one."""
        state = self._template
        if self._checkpoints:
            self._checkpoints.wait()
            state = self._checkpoints.restore(self._step_of(epoch), self._template)
        return parallel.share(state)

    def close(self):
        """Finish writing."""
        if self._checkpoints:
            self._checkpoints.close()
        self.log.close()

    def _step_of(self, epoch):
        return None if epoch is None else epoch * self._task.steps_per_epoch


def refuse_other_config(config, workdir):
    """Check that a run folder's config.json agrees with `config` in every field that matters.

    Raises:
      UserError: names the fields that differ, with both values.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        there = config_lib.flatten(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}), but the folder holds checkpoints: "
                        "put it back or choose another --workdir") from error
    here = config_lib.flatten(config_lib.to_dict(config))
    lines = config_lib.differences(here, there)
    if lines:
        raise UserError(f"{workdir} holds a run of another configuration ({'; '.join(lines)}): "
                        "choose another --workdir, or the same configuration to resume")
