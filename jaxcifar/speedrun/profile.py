"""--profile of a speedrun: what the operations of its steps and of its evaluation take.

The traced steps are those after the first layer's bias was trained: most of a training. On a GPU
they are a rolled loop, as in the training; on CPU calls of one step. Where a proxy chooses the
examples, the first ones of every batch stand for what it would choose, and its own steps are not
traced.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp

from jaxcifar import logs, profiling
from jaxcifar.speedrun import driver, training
from jaxcifar.speedrun.trainer import logits_of


def run(config, workdir, num_steps, stream=None):
    """Profile a speedrun's training and evaluation; write the traces and print two tables.

    Args:
      config: configuration whose speedrun.epochs is above 0. workdir: folder that gets
        profile/train and profile/eval, in place of older ones. num_steps: training steps to trace.
        stream: for the lines; sys.stdout if None.

    Raises:
      UserError: as `driver.run`; num_steps is not positive.
    """
    training.check(config)
    config, folder = profiling.for_traces(config, num_steps), pathlib.Path(workdir) / "profile"
    trainer, train, test, _ = driver.prepare(config, logs.Stopwatch())
    where = f"{config.model.name} on {trainer.devices.devices[0].device_kind}"

    def show(name, what, call, calls, program):
        table = profiling.report(functools.partial(profiling.repeated, call), calls, folder / name,
                                 program.text())
        print(f"\n{calls.steps} {what}, {where}\n{table}", file=stream or sys.stdout, flush=True)

    show("train", f"training steps of {trainer.run.keep} images", *_steps(trainer, train, num_steps))
    show("eval", f"evaluation batches of {config.eval_batch_size} images in six views",
         *_views(trainer, train, test))
    print(profiling.where_traces_are(folder), file=stream or sys.stdout, flush=True)


def _steps(trainer, train, num_steps):
    """Return (a call of a program, the Calls to make, the program) of training steps."""
    run, seed = trainer.run, jnp.uint32(0)
    train_bias = run.bias_steps == run.total_steps
    first, count, function = 0 if train_bias else run.bias_steps, 1, training.step
    numbers = jnp.int32(first)
    if trainer.rolled:
        count = min(max(num_steps // profiling.FEWEST_CALLS, 1), run.total_steps - first)
        numbers, function = first + jnp.arange(count), training.steps
    prepared, state = trainer.program(training.start)(seed, *train)
    prepared = prepared.replace(kept=training.first_places(run))
    program = trainer.program(lambda run, *args: function(run, train_bias, *args), donate=(0,))
    program.compile(state, prepared, seed, numbers)

    def call():
        nonlocal state
        state = jax.block_until_ready(program(state, prepared, seed, numbers))

    calls = max(-(-num_steps // count), profiling.FEWEST_CALLS)
    return call, profiling.Calls(calls, count, count * run.keep), program


def _views(trainer, train, test):
    """Return the same of evaluation batches."""
    size = trainer.run.config.eval_batch_size
    state = trainer.program(training.initial)(jnp.uint32(0), train[0])
    program = trainer.program(functools.partial(logits_of, kind="all views"))
    args = training.result(state), test[0], jnp.arange(size)
    program.compile(*args)
    return (lambda: jax.block_until_ready(program(*args)),
            profiling.Calls(profiling.FEWEST_CALLS, 1, size), program)
