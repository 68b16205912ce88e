"""The compiled programs of a run: one for the order, one or two for training, one for evaluation."""

import copy
import functools
import json

import jax
import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import epoch, parallel

# Fields that the state carries as values: what is compiled serves any of them.
_VALUES = ("seed", "optimizer.learning_rate", "optimizer.weight_decay")


class Programs:
    """A task's pure functions, compiled for a run's devices and called with the right step counts.

    task: Task. devices: parallel.Parallel. over_seeds: every state (and permutation, and what is
    returned of them) has a leading axis of seeds, which train at once; the data have none.
    """

    def __init__(self, task, devices, *, over_seeds=False):
        """Prepare the programs; nothing is compiled before the first use."""
        self.task, self.devices, self._over_seeds = task, devices, over_seeds
        self._on_cpu = runs_on_cpu(devices)
        self._steps_per_call = steps_per_call(task, self._on_cpu)
        self._order = self._program("order", functools.partial(epoch.order, task), (0,))
        self._eval = self._program(
            "eval_steps", functools.partial(epoch.eval_steps, task, not self._on_cpu),
            (0, None, None, None))
        self._train = {}

    def for_seed_of(self, task):
        """Return these programs under another task, whose configuration differs in _VALUES only."""
        programs = copy.copy(self)  # what is compiled stays shared
        programs.task = task
        return programs

    def permutation(self, state):
        """Return the order of the epoch that a device state is in, replicated int32 [num_train]."""
        return self._order(state)

    def steps_at(self, step_in_epoch):
        """Return (number of steps, global batch size) of the next call; (0, 0) at the epoch's end."""
        full = self.task.full_steps
        if step_in_epoch < full:
            return min(self._steps_per_call, full - step_in_epoch), self.task.config.batch_size
        if step_in_epoch < self.task.steps_per_epoch:
            return 1, self.task.tail_size
        return 0, 0

    def train(self, state, data, permutation, step_in_epoch):
        """Take the next call's steps; the device state given is consumed (its buffers are reused)."""
        return self._train_program(*self.steps_at(step_in_epoch))(state, data, permutation)

    def evaluate(self, state, data, span):
        """Evaluate examples span[0] to span[1] of replicated data.

        Returns:
          {"sums": for metrics.finalize, "confusion": int32 [num_classes, num_classes]}: numpy
          arrays (first axis: seeds, if over seeds); see `epoch.eval_steps`.
        """
        first, stop = span
        if not self._on_cpu:
            return self.devices.fetch(self._eval_call(state, data, first, stop))
        size = epoch.eval_batch_size(self.task.config, self.devices.num_devices)
        parts = [self.devices.fetch(self._eval_call(state, data, start, stop))
                 for start in range(first, stop, size)]
        sums = jax.tree.map(lambda *leaves: np.stack(leaves, axis=-1), *[p["sums"] for p in parts])
        return {"sums": sums,
                "confusion": np.sum([p["confusion"] for p in parts], axis=0)}

    def compile(self, state, data, held_out, step_in_epoch=0, *, whole_epoch=True, epochs_left=2):
        """Compile every program that training from step `step_in_epoch` of an epoch on needs.

        epochs_left: with the one under way; 0: evaluation's only. With whole_epoch=False: those of
        the epoch's next call, and of evaluation.
        """
        starts = (step_in_epoch, 0)[:min(epochs_left, 2 if whole_epoch else 1)]
        permutation, wanted = self.permutation(state) if starts else None, {}
        for step in starts:
            while (call := self.steps_at(step))[0]:
                wanted[self._train_program(*call)] = (state, data, permutation)
                if not whole_epoch:
                    break
                step += call[0]
        wanted[self._eval] = (state.variables(), held_out, *self._span(0, 1))
        parallel.compile_all(wanted)

    def texts(self):
        """Return the optimised HLO of an epoch's first call and of evaluation, both compiled.

        Returns:
          {"train": str, "eval": str}.
        """
        return {"train": self._train_program(*self.steps_at(0)).text(), "eval": self._eval.text()}

    def _eval_call(self, state, data, first, stop):
        return self._eval(state.variables(), data, *self._span(first, stop))

    def _span(self, first, stop):
        return self.devices.replicate((np.int32(first), np.int32(stop)))

    def _train_program(self, num_steps, size):
        key = (num_steps, size)
        if key not in self._train:
            self._train[key] = self._program(
                "train_steps",
                functools.partial(epoch.train_steps, self.task, num_steps, size,
                                  self._on_cpu and self.task.config.steps_per_call != "epoch"),
                (0, None, 0), donate=(0,))
        return self._train[key]

    def _program(self, name, function, seed_axes, donate=()):
        if self._over_seeds:
            function = epoch.over_seeds(function, seed_axes)
        return self.devices.program(function, donate, name)


class Cache:
    """The compiled programs of the last few shapes, for runs of one process that share them.

    Configurations that differ in seed, learning rate and weight decay only are of one shape.
    """

    def __init__(self, shapes):
        """Keep the programs of `shapes` (int) shapes, those used last."""
        self._shapes, self._kept = shapes, {}

    def programs(self, task, devices):
        """Return Programs of a task, compiled already where its shape was seen before."""
        fields = config_lib.flatten(config_lib.to_dict(task.config))
        shape = json.dumps([(k, v) for k, v in sorted(fields.items()) if k not in _VALUES])
        kept = self._kept.pop(shape, None) or Programs(task, devices)
        self._kept[shape] = kept  # the last one used is the last one in the dict
        while len(self._kept) > self._shapes:
            del self._kept[next(iter(self._kept))]
        return kept.for_seed_of(task)

    def clear(self):
        """Forget all programs and free their memory."""
        self._kept.clear()


def runs_on_cpu(devices):
    """Return whether programs take the CPU's form: loops over steps in Python, not on the device."""
    return devices.devices[0].platform == "cpu"


def steps_per_call(task, on_cpu):
    """Return the number of training steps in one compiled call that the configuration means.

    "auto" is a whole epoch on accelerators and one step on CPU, where XLA runs convolutions inside
    a rolled loop 25-55 times slower.
    """
    asked = task.config.steps_per_call
    if asked == "auto":
        asked = 1 if on_cpu else "epoch"
    return max(task.full_steps, 1) if asked == "epoch" else int(asked)
