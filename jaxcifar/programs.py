"""The compiled programs of a run: one for the order, one or two for training, one for evaluation."""

import functools

import jax
import numpy as np

from jaxcifar import epoch


class Programs:
    """A task's pure functions, compiled for a run's devices and called with the right step counts.

    task: Task. devices: parallel.Parallel.
    """

    def __init__(self, task, devices):
        """Prepare the programs; nothing is compiled before the first use."""
        self.task, self.devices = task, devices
        self._on_cpu = runs_on_cpu(devices)
        self._steps_per_call = steps_per_call(task, self._on_cpu)
        self._order = devices.program(functools.partial(epoch.order, task))
        self._eval = devices.program(
            functools.partial(epoch.eval_steps, task, not self._on_cpu))
        self._train = {}

    def permutation(self, state):
        """Return the order of the epoch that a device state is in, replicated int32 [num_train]."""
        return self._order(state)

    def steps_at(self, step_in_epoch):
        """Return (number of steps, global batch size) of the next call; (0, 0) at the epoch's end."""
        full = self.task.num_train // self.task.config.batch_size
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
          arrays; see `epoch.eval_steps`.
        """
        first, stop = span
        if not self._on_cpu:
            return self.devices.fetch(self._eval_call(state, data, first, stop))
        parts = [self.devices.fetch(self._eval_call(state, data, start, stop))
                 for start in range(first, stop, self.task.config.eval_batch_size)]
        return {"sums": jax.tree.map(lambda *leaves: np.stack(leaves), *[p["sums"] for p in parts]),
                "confusion": np.sum([p["confusion"] for p in parts], axis=0)}

    def compile(self, state, data, held_out, step_in_epoch=0):
        """Compile every program that the first epoch needs from its step `step_in_epoch` on."""
        permutation = self.permutation(state)
        step = step_in_epoch
        while (call := self.steps_at(step))[0]:
            self._train_program(*call).compile(state, data, permutation)
            step += call[0]
        self._eval.compile(state.variables(), held_out, *self._span(0, 1))

    def _eval_call(self, state, data, first, stop):
        return self._eval(state.variables(), data, *self._span(first, stop))

    def _span(self, first, stop):
        return self.devices.replicate((np.int32(first), np.int32(stop)))

    def _train_program(self, num_steps, size):
        key = (num_steps, size)
        if key not in self._train:
            self._train[key] = self.devices.program(
                functools.partial(epoch.train_steps, self.task, num_steps, size,
                                  self._on_cpu and self.task.config.steps_per_call != "epoch"),
                donate=(0,))
        return self._train[key]


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
    return max(task.num_train // task.config.batch_size, 1) if asked == "epoch" else int(asked)
