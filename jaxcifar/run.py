"""A run's folder and state: opened or resumed, saved, and the best epoch found again."""

import json
import pathlib

from jaxcifar import config as config_lib
from jaxcifar import environment, init_from, logs, parallel, run_folder, saved, selection, splits
from jaxcifar.checkpoint import Checkpoints
from jaxcifar.errors import UserError


class Run:
    """The folder of a run; a context manager, which closes it.

    log: logs.RunLog. state: TrainState of numpy arrays to start from, new or restored. resumed:
    whether it was restored. origin: lines on the weights that it started from, where it is new and
    config.init_from names some. environments: where it was trained, from start to start, each as
    `environment.environment()` was then: the repository may be at another commit when the run ends.
    workdir: Path. Only the first process reads and writes; the others get what it read.
    """

    def __init__(self, task, workdir, stream=None, data_digest=""):
        """Open the folder, and restore the newest checkpoint that it holds.

        Args:
          task: Task. workdir: path. stream: see logs.RunLog. data_digest: of the training set, see
            splits.Arrays; "": not looked at.

        Raises:
          UserError: the folder cannot be written, another process trains there, or it belongs to
            several seeds, a search, another configuration (the fields that differ are named) or
            other data, or no checkpoint can be read, or those of a finished run are gone, or a new
            run cannot have the weights that config.init_from names, or processes have other data.
        """
        self._task, self._data_digest = task, data_digest
        self.workdir = pathlib.Path(workdir)
        self._template = saved.template(task)
        self.environments = [environment.environment()]
        self._checkpoints, self._held, self._closed = None, False, False
        if not parallel.is_same(int(data_digest or "0", 16) >> 1):  # 31 bits
            raise UserError("the processes have the data set in different orders (prepared from "
                            "different sources): copy one machine's folder to the others")
        try:
            begun = parallel.in_first(self._begin, "open the run folder")
            restored, first, self.origin = begun or (None, self._template, [])
            self.resumed = bool(parallel.agree_on(restored is not None))
            self.state = parallel.share(restored or first)
            log = parallel.in_first(lambda: self._open_log(stream), "open the run's log")
            self.log = log or self._open_log(stream, primary=False)
        except BaseException:
            self._leave_folder()
            raise

    def _open_log(self, stream, primary=True):
        """Return the run's RunLog, with the configuration written."""
        config = self._task.config
        log = logs.RunLog(
            self.workdir, primary=primary, tensorboard=config.tensorboard,
            resume_epoch=int(self.state.epoch) + 1 if self.resumed else None, stream=stream,
            progress=config.progress)
        log.write_config(config_lib.to_dict(config))
        return log

    def _begin(self):
        """Return (state of the newest checkpoint or None, state of a new run, its origin)."""
        restored = self._open()
        if restored is not None:
            return restored, self._template, []
        return None, *init_from.start(self._task, self._template)

    def _open(self):
        """Return the state of the newest checkpoint, or None; nothing of another run is touched."""
        run_folder.refuse_other_kind(self.workdir, "a single run")
        refuse_other_config(self._task.config, self.workdir)
        if run_folder.has_lost_checkpoints(self.workdir):
            raise UserError(f"{self.workdir} holds the result of a finished run, whose checkpoints "
                            "are gone: put them back, or choose another --workdir to train again")
        run_folder.hold(self.workdir)
        self._held = True
        self._checkpoints = Checkpoints(self.workdir)
        restored = self._checkpoints.restore_latest(self._template)
        if restored is not None and int(restored.step):
            splits.refuse_other_data(self._data_digest, self.workdir)
        elif self._data_digest:  # a run of step 0 has imported weights and saw no data yet
            splits.write_digest(self._data_digest, self.workdir)
        path, (here,) = self.workdir / "environments.json", self.environments
        earlier = run_folder.read_json(path, []) if restored is not None else []
        self.environments = earlier if earlier[-1:] == [here] else [*earlier, here]
        run_folder.write_json(path, self.environments)
        return restored

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
        parallel.in_first(
            lambda: self.log.epoch(row, epochs=config.epochs, note=", ".join(notes)),
            "write the epoch's row")

    def save(self, state):
        """Save a state of numpy arrays; the newest two and the best are kept."""
        best_step = self._step_of(self.best_epoch(state.history))
        parallel.in_first(lambda: self._checkpoints.save(state, best_step), "save a checkpoint")

    def wait(self):
        """Return when every checkpoint is on the disk; of the first process only."""
        self._checkpoints.wait()

    def measured_before(self, steps):
        """Return what result.json says of the training's time, memory and place, a dict.

        It is empty where the run has trained since that result, to other `steps`. Starting a
        finished run again must not replace what its training took by what its evaluation takes.
        """
        before = run_folder.read_json(self.workdir / "result.json", {"steps": None})
        kept = ("seconds", "peak_device_bytes", "peak_host_bytes", "devices", "environment",
                "earlier_environments")
        return {k: before[k] for k in kept if k in before} if before["steps"] == steps else {}

    def restore(self, epoch):
        """Return the state after `epoch` (from 1), which must be a kept one."""
        state = parallel.in_first(lambda: self._read(epoch), "read the selected epoch")
        return parallel.share(state or self._template)

    def _read(self, epoch):
        self._checkpoints.wait()
        try:
            return self._checkpoints.restore(self._step_of(epoch), self._template)
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file makes orbax raise
            raise UserError(
                f"the checkpoint of the selected epoch {epoch} (step {self._step_of(epoch)}) in "
                f"{self.workdir} cannot be read: put back an intact copy, or train it again in "
                "another --workdir") from error

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        try:
            self.close()
        except Exception as closing:
            if error is None:
                raise
            error.add_note(f"and, as the run was closed: {closing}")

    def close(self):
        """Finish writing, and let others train in the folder."""
        if self._closed:
            return
        self._closed = True
        try:
            self._leave_folder()
        finally:
            self.log.close()

    def _leave_folder(self):
        if self._held:
            try:
                if self._checkpoints:
                    self._checkpoints.close()
            finally:
                run_folder.release(self.workdir)

    def _step_of(self, epoch):
        return None if epoch is None else epoch * self._task.steps_per_epoch


def refuse_other_config(config, workdir):
    """Check that the run in a folder, if any, agrees with `config` in every field that matters.

    Where a training left neither checkpoint nor row nor result, as one does that diverges at once,
    there is none, whatever config.json says.

    Raises:
      UserError: names the fields that differ, with both values.
    """
    workdir = pathlib.Path(workdir)
    if not run_folder.holds_run(workdir):
        return
    path = workdir / "config.json"
    try:
        there = config_lib.flatten(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:  # no file, no JSON, no object
        raise UserError(f"{path} cannot be read ({error}), but the folder holds a run: put it back "
                        "or choose another --workdir") from error
    here = config_lib.flatten(config_lib.to_dict(config))
    lines = config_lib.differences(here, there)
    if lines:
        raise UserError(f"{workdir} holds a run of another configuration ({'; '.join(lines)}): "
                        "choose another --workdir, or the same configuration to resume; "
                        f"--config.init_from={workdir} starts another run from its weights")
