"""fit: the training loop, read from top to bottom."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import environment, features, host, logs, models, parallel, selection, splits
from jaxcifar.errors import UserError
from jaxcifar.metrics import finalize
from jaxcifar.programs import Programs
from jaxcifar.report import published
from jaxcifar.report import run as run_report
from jaxcifar.run import Run
from jaxcifar.state import NO_STEP, empty_sums
from jaxcifar.task import create_task

# config.cuda_graphs: kinds of commands for graphs, beside those that XLA takes by itself ("+")
_GRAPHS = {"step": "+CONVOLUTION", "call": "+CONVOLUTION,+WHILE", "off": ""}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run leaves: its folder, its final state (numpy arrays) and the content of result.json."""

    workdir: pathlib.Path
    state: Any
    result: dict


class Interrupted(Exception):
    """A signal asked the run to stop; what it trained is saved. `signum` is the signal's number."""

    def __init__(self, signum):
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""

    exit_code = 1


def fit(config, workdir, *, stop=lambda: 0, stream=None, cache=None, after_epoch=lambda row: None):
    """Train a model as the configuration says, or go on with the run that `workdir` holds.

    Args:
      config: configuration, see jaxcifar.config. workdir: the run's folder. stop: called between
        compiled calls; returns the number of a signal that asks the run to stop, else 0.
      stream: where lines go; sys.stdout if None. cache: programs.Cache that runs of this process
        share, or None. after_epoch: called with each epoch's row of metrics.jsonl; what it raises
        ends the run, which `fit` can resume.

    Returns:
      Summary.

    Raises:
      UserError: a mistake in the configuration, the data or the folder. NonFiniteLoss. Interrupted.
    """
    check(config)
    configure_jax(config)
    watch = logs.Stopwatch()
    devices = parallel.create(config)
    arrays = splits.load(config)
    task = create_task(config, len(arrays.train["labels"]), arrays.num_classes)
    with Run(task, workdir, stream, arrays.digest) as run:  # closed whatever happens in it
        announce(run, Programs(task, devices), arrays)
        pictured = task, run.state, arrays, run.workdir
        if not features.obstacle(task):
            task, arrays = compute_features(run, task, arrays)
        state = run.state
        programs = cache.programs(task, devices) if cache else Programs(task, devices)
        train_data, held_out = devices.replicate((arrays.train, arrays.held_out))
        live = devices.replicate(state.on_device())
        epoch = int(state.epoch)
        over = selection.is_over(state.history, epoch, config)
        with watch.section("compile"):
            programs.compile(live, train_data, held_out,
                             int(state.step) - epoch * task.steps_per_epoch,
                             epochs_left=0 if over else config.epochs - epoch)
        run.log.print(f"compiled in {watch.sections['compile']:.1f} s")
        if parallel.is_primary():
            run.log.meanwhile("samples.png", run_report.samples, *pictured)

        while not selection.is_over(state.history, epoch, config):
            lap = logs.Stopwatch()
            first_step = int(state.step) - epoch * task.steps_per_epoch
            with run.log.progress(total_steps=task.steps_per_epoch, first_step=first_step,
                                  epoch=epoch + 1, epochs=config.epochs,
                                  batch_size=config.batch_size) as bar:
                live, signum = train_epoch(programs, live, train_data, first_step, bar, stop)
            check_finite(run, programs, live)
            if signum:
                save_trained(run, programs, live, state)
                run.close()  # which says whether that succeeded
                raise Interrupted(signum)
            epoch += 1
            row = train_row(programs, live, epoch, first_step, lap)
            for split in splits.measured(config):
                row |= finalize(programs.evaluate(live, held_out, arrays.spans[split])["sums"], split)
            row["seconds"] = lap.seconds()
            live, state = finish_epoch(programs, live, state, epoch, row)
            run.report(row, state.history)
            if run.is_due(state.history, epoch):
                save(run, programs, live, state)
            after_epoch(row)

        state = save(run, programs, live, state)
        result = measure_result(run, programs, live, state, held_out, arrays, watch)
        return Summary(run.workdir, state, result)


def check(config):
    """Raise UserError unless the configuration is valid, and one that this loop trains."""
    config_lib.validate(config)
    if config.early_stopping.window == 1:
        raise UserError("config.early_stopping.window = 1: must be 0 (off) or at least 2, since an "
                        "epoch is always the best of itself")
    if config.speedrun.epochs:
        raise UserError("this configuration is a speedrun, which has a loop of its own: "
                        "python -m jaxcifar.speedrun --config=... --runs=N, or --profile")
    for field, value in config_lib.SPEEDRUN.items():
        if config.speedrun[field] != value:
            instead = " (config.augment has a cutout)" if field == "cutout" else ""
            raise UserError(f"config.speedrun.{field} = {config.speedrun[field]!r} has no effect on "
                            f"this training, only on a speedrun: leave it at {value!r}{instead}")


def save(run, programs, live, state):
    """Save the state, unless its parameters are not finite.

    Returns:
      TrainState of numpy arrays. Raises NonFiniteLoss: the last update went wrong (its loss came
      before it), and what was saved so far stays as it is.
    """
    state = programs.devices.fetch(live).with_host(state)
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise non_finite(run, f"the parameters are not finite after step {int(state.step)}")
    run.save(state)
    return state


def save_trained(run, programs, live, state):
    """Save the state of a run that a signal ends, unless nothing is trained: then its folder stays free.

    Another configuration may have it, such as one that mends what the signal came for.
    """
    if run.resumed or int(programs.devices.fetch(live.step)):
        state = save(run, programs, live, state)
    return state


def check_finite(run, programs, live):
    """Raise NonFiniteLoss where a loss of the epoch under way is not finite."""
    bad_step = int(programs.devices.fetch(live.sums["bad_step"]))
    if bad_step != NO_STEP:
        raise non_finite(run, f"the loss is not finite at step {bad_step} of the run")


def non_finite(run, what):
    """Return the NonFiniteLoss that says `what` went wrong and what to do."""
    last = run.last_saved_step
    kept = "" if last is None else f" (the last good checkpoint is of step {last})"
    return NonFiniteLoss(f"{what}{kept}: lower config.optimizer.learning_rate, or set "
                         "config.max_grad_norm")


def configure_jax(config):
    """Set what JAX reads before it starts: XLA's flags, precision, host memory, compilation cache."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if config.deterministic and not any("xla_gpu_deterministic_ops" in flag for flag in flags):
        flags.append("--xla_gpu_deterministic_ops=true")
    if config.deterministic:  # the kernels that other runs found fastest may not be deterministic
        jax.config.update("jax_persistent_cache_enable_xla_caches", "")
    if config.cuda_graphs in _GRAPHS:
        graphs = f"--xla_gpu_enable_command_buffer={_GRAPHS[config.cuda_graphs]}"
        flags += [graphs] if graphs not in flags else []
    os.environ["XLA_FLAGS"] = " ".join(flags)
    host.configure()
    jax.config.update("jax_default_matmul_precision",
                      None if config.precision == "default" else config.precision)
    folder = config.compilation_cache
    if folder == "auto" and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    elif folder == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = str(pathlib.Path(base) / "jaxcifar" / "xla")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder) or None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def announce(run, programs, arrays):
    """Print the parameter table and the header.

    Raises UserError when config.reference_curve names no published curve.
    """
    if programs.task.config.reference_curve:
        published.reported_curve(programs.task.config.reference_curve)
    run.log.parameter_table({"params": run.state.params})
    run.log.header(run_report.header(run, programs, arrays))


def compute_features(run, task, arrays):
    """Return the Task and Arrays of training on the frozen backbone's features; print what it took."""
    lap = logs.Stopwatch()
    variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}
    task, arrays = features.on_features(task, variables, arrays)
    count = len(arrays.train["labels"]) + len(arrays.held_out["labels"])
    run.log.print(f"features of {count:,} images computed in {lap.seconds():.1f} s")
    return task, arrays


def train_epoch(programs, live, train_data, step_in_epoch, bar, stop):
    """Train to the end of the epoch, or until a loss is not finite or a signal asks to stop.

    A signal that comes with the last step is left to the next epoch: this one is counted first.

    Returns:
      (device state, number of the signal or 0).
    """
    devices, permutation = programs.devices, programs.permutation(live)
    while (num_steps := programs.steps_at(step_in_epoch)[0]):
        signum = parallel.agree_on(stop())
        if signum:
            return live, signum
        live = programs.train(live, train_data, permutation, step_in_epoch)
        step_in_epoch += num_steps
        bad_step = devices.fetch(live.sums["bad_step"])  # waits for the device
        if (bad_step != NO_STEP).any():
            return live, 0
        bar.update(num_steps, lambda: _bar_metrics(devices.fetch(live.sums)))
    return live, 0


def _bar_metrics(sums):
    means = finalize(sums, "train")
    return {"loss": means["train_loss"], "accuracy": means["train_accuracy"]}


def train_row(programs, live, epoch, first_step, lap):
    """Return the training part of an epoch's row; the learning rate is that of its first step."""
    task, devices = programs.task, programs.devices
    seen = min(task.steps_per_epoch * task.config.batch_size, task.num_train)
    images = max(seen - first_step * task.config.batch_size, 0)
    hparams, step = devices.fetch((live.hparams, live.step))
    first = live.replace(hparams=hparams, step=step - task.steps_per_epoch)
    return {"epoch": epoch, "step": int(step),
            "learning_rate": float(f"{float(task.learning_rate(first)):.7g}"),  # float32's digits
            **finalize(devices.fetch(live.sums), "train"),
            "images_per_second": images / lap.seconds(),
            **({"resumed_at": first_step} if first_step else {})}  # the time is that of the rest


def finish_epoch(programs, live, state, epoch, row):
    """Count the epoch, let the plateau see its metric, and clear the sums.

    Returns:
      (device state, host state): both of the new epoch; the host's arrays of the device part are
      those of an older one, since only `history`, `plateau`, `step` and `epoch` are read from it.
    """
    devices, plateau, hparams = programs.devices, state.plateau, live.hparams
    if plateau is not None:
        plateau = plateau.update(row[programs.task.config.schedule.monitor])
        hparams = {**hparams, "learning_rate": devices.replicate(
            np.float32(plateau.learning_rate))}
    live = live.replace(epoch=devices.replicate(np.int32(epoch)), hparams=hparams,
                        sums=devices.replicate(empty_sums()))
    state = state.replace(epoch=np.int32(epoch), step=np.int32(row["step"]), plateau=plateau,
                          history=selection.record(state.history, epoch, row))
    return live, state


def uses_test_set(config):
    """Return whether the test set has a say in which epoch counts, or in the learning rate."""
    return config.selection.startswith("best_test") or (
        config.schedule.name == "plateau" and config.schedule.monitor.startswith("test"))


def best_on_validation(config, history, rows):
    """Return the row of the best epoch on validation by the run's rule, or None without validation."""
    rule = config.selection if config.selection.startswith("best_val") else "best_val_accuracy"
    epoch = selection.best_epoch(history, rule)
    return next(({"rule": rule, **row} for row in rows if row["epoch"] == epoch), None)


def measure_result(run, programs, live, state, held_out, arrays, watch):
    """Select an epoch by the configured rule, measure it on the test set, write result.json and plots.

    Returns:
      The content of result.json, a dict.
    """
    config, rows = programs.task.config, run.log.read_rows()
    last = programs.evaluate(live, held_out, arrays.spans["test"])
    chosen, chosen_epoch = last, int(state.epoch)
    best_epoch = run.best_epoch(state.history)
    if config.selection != "last" and best_epoch:
        chosen_epoch = best_epoch
        best = programs.devices.replicate(run.restore(chosen_epoch).on_device())
        chosen = programs.evaluate(best, held_out, arrays.spans["test"])
    result = {
        "name": run.workdir.name, "dataset": config.dataset, "model": config.model.name,
        "params": models.count_params(state.params), "seed": config.seed,
        "config_hash": config_lib.config_hash(config),
        "epochs": int(state.epoch), "steps": int(state.step),
        "devices": {"kind": programs.devices.kind, "count": programs.devices.num_devices},
        "dtype": config.dtype,
        "selection": {"rule": config.selection, "epoch": chosen_epoch,
                      "uses_test_set": uses_test_set(config)},
        **finalize(chosen["sums"], "test"),
        "last": {**(rows[-1] if rows else {}), **finalize(last["sums"], "test")},
        "best_on_validation": best_on_validation(config, state.history, rows),
        "seconds": {"compile": watch.sections["compile"], "total": watch.seconds(),
                    "epochs": sum(r["seconds"] for r in rows)},
        **environment.memory(), "environment": run.environments[-1],
        "earlier_environments": run.environments[:-1],
    }

    def write():
        run.wait()
        result.update(run.measured_before(result["steps"]))
        run.log.result(result)
        run.log.wait()  # for samples.png: two threads cannot import matplotlib at the same time
        run_report.write_plots(run.workdir, config, rows, chosen["confusion"], arrays.class_names)
        run.log.print(run_report.closing_line(result, run.workdir))

    parallel.in_first(write, "write the result")
    return result
