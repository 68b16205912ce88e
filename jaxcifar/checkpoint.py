"""Checkpoints: the newest ones and the best one, written atomically by orbax."""

import contextlib
import os
import pathlib
import re
import shutil
import warnings
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jaxcifar import run_folder
from jaxcifar.errors import UserError, first_line

_KEPT = 2
_SHOWN = 3  # differences of a checkpoint from a model


class KeepLatestAndBest:
    """Preservation policy: the newest checkpoints, and that of `best_step`.

    orbax's `best_fn` with `max_to_keep` would delete the newest checkpoint when it is not among the
    best ones, and with it the possibility to resume.
    """

    best_step = None

    def should_preserve(self, checkpoints, *, context):
        """Return one bool per checkpoint (orbax's PreservationPolicy protocol)."""
        del context
        newest = len(checkpoints) - _KEPT
        return [i >= newest or info.step == self.best_step for i, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints/ folder of a run. Only the primary process has one; states are numpy trees."""

    def __init__(self, workdir, *, read_only=False):
        """Open the folder (and create it); remove what an interrupted write left.

        read_only: change nothing, since the run may be going on. Raises UserError when the folder
        cannot be written.
        """
        self._read_only, self._epochs = read_only, {}  # of the checkpoints read or written here
        self._folder = pathlib.Path(workdir).resolve() / "checkpoints"
        self._policy = KeepLatestAndBest()
        single = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()},
            barrier_sync_key_prefix="jaxcifar")
        try:
            if not read_only:
                self._folder.mkdir(parents=True, exist_ok=True)
            with _without_warnings() if read_only else contextlib.nullcontext():
                self._manager = ocp.CheckpointManager(
                    self._folder, options=ocp.CheckpointManagerOptions(
                        create=False, read_only=read_only, preservation_policy=self._policy,
                        cleanup_tmp_directories=not read_only, multiprocessing_options=single))
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self._folder}: "
                            f"{error.strerror or error}; choose another --workdir") from error

    def steps(self):
        """Return the steps of the checkpoints there are, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state, best_step):
        """Write a state in the background, unless one of its step and epoch is there.

        Args:
          state: TrainState of numpy arrays; its step names the checkpoint.
          best_step: step of the checkpoint to keep besides the newest, or None.
        """
        self._policy.best_step = best_step
        step, epoch = int(state.step), int(state.epoch)
        there = step in self._manager.all_steps()
        if there and self._epochs.get(step, epoch) == epoch:
            return
        self._epochs[step] = epoch
        tree = _leaves(state)
        with _writing(self._folder):
            if there:  # saved at the epoch's last step, before the epoch was counted
                self._manager.delete(step)
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                digest=ocp.args.JsonSave({"crc32": _digest(tree)})))

    def restore_latest(self, template):
        """Return the newest readable state in the form of `template`, or None when there is none.

        Newer checkpoints that cannot be read are set aside (damaged_checkpoint_STEP beside the
        folder) with a warning. Raises UserError when checkpoints exist and none can be read, or the
        newest readable one is of another model.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, template)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes orbax raise
                reason = first_line(error)
                warnings.warn(f"checkpoint {self._folder / str(step)} is damaged "
                              f"({reason[:120]}); trying the one before", stacklevel=2)
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return state
        if damaged:
            raise UserError(f"no checkpoint in {self._folder} can be read: remove the folder to "
                            "start afresh, or put back an intact copy")
        return None

    def restore(self, step, template):
        """Return the state of one step.

        Raises ValueError, or what orbax does, when it is damaged; UserError: its arrays are others.
        """
        tree = _leaves(template)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(tree), digest=ocp.args.JsonRestore()))
        except Exception:
            if there := self._arrays_of(step):
                self._refuse_other_arrays(tree, there.items())
            raise
        if _digest(restored.state) != restored.digest["crc32"]:
            raise ValueError("its content does not match its checksum")
        self._refuse_other_arrays(tree, restored.state.items())
        leaves = [restored.state[key] for key in tree]
        state = jax.tree.unflatten(jax.tree.structure(template), leaves)
        self._epochs[step] = int(state.epoch)
        return state

    def wait(self):
        """Return when everything is on the disk; UserError when it cannot be written."""
        with _writing(self._folder):
            self._manager.wait_until_finished()

    def close(self):
        """Finish writing and close; UserError when it cannot be written."""
        self.wait()
        self._manager.close()

    def _arrays_of(self, step):
        """Return {name: its shape and dtype} of a checkpoint, or None where it is damaged."""
        try:
            return self._manager.item_metadata(step).state
        except Exception:  # as in restore_latest
            return None

    def _refuse_other_arrays(self, tree, arrays):
        """Raise UserError where a checkpoint's (name, array) are of other names or shapes than `tree`."""
        there, here = ({name: tuple(array.shape) for name, array in of}
                       for of in (arrays, tree.items()))
        differences = [f"{name} is new" for name in here if name not in there]
        differences += [f"{name} is gone" for name in there if name not in here]
        differences += [f"{name} was {there[name]}, is {shape}" for name, shape in here.items()
                        if there.get(name, shape) != shape]
        differences.sort(key=lambda text: not text.startswith("params/"))  # the rest follows them
        if differences:
            more = len(differences) - _SHOWN
            raise UserError(
                f"the checkpoints in {self._folder} are of another model than this code builds "
                f"({'; '.join(differences[:_SHOWN])}{f'; {more} more' if more > 0 else ''}): take "
                "another folder, or go back to the code that wrote them")

    def _set_aside(self, steps):
        for step in [] if self._read_only else steps:
            target = self._folder.parent / f"damaged_checkpoint_{step}"
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(step)).rename(target)
        if steps and not self._read_only:
            self._manager.reload()


@contextlib.contextmanager
def _writing(folder):
    """As run_folder.writing; tensorstore's errors, of a full disk for instance, are ValueErrors."""
    try:
        with run_folder.writing(folder):
            yield
    except (ValueError, RuntimeError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if not code:
            raise
        raise UserError(f"cannot write {folder}: {os.strerror(int(code[1]))}; choose a place that is "
                        "writable and has space left") from error


@contextlib.contextmanager
def _without_warnings():
    """Keep orbax from saying that what is opened to be read is read-only."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _leaves(state):
    """Return {path: numpy array}: a flat tree, so that no class's name is part of the format."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf, copy=True)
            for path, leaf in paths}


def _digest(tree):
    total = 0
    for key in sorted(tree):
        total = zlib.crc32(np.ascontiguousarray(tree[key]).tobytes(), zlib.crc32(key.encode(), total))
    return total
