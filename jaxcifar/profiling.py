"""--profile: trace some training steps and two evaluation batches, and say what took the time.

    python -m jaxcifar.main --config=configs/quickstart.py --profile --profile_steps=10

On a GPU the kernels are started one by one, without CUDA graphs, which training uses: a little slower.
WORKDIR/profile/train and WORKDIR/profile/eval get the traces: `*.trace.json.gz` opens in
https://ui.perfetto.dev, the folders in TensorBoard with its profile plugin (pip install xprof).
No checkpoint, no metrics and no other file of a run is read or written.
"""

import collections
import copy
import dataclasses
import math
import pathlib
import shutil
import sys
from typing import Any

import jax
import numpy as np

from jaxcifar import epoch, features, logs, parallel, run_folder, saved, splits, trace, train
from jaxcifar.errors import UserError
from jaxcifar.programs import Programs
from jaxcifar.task import create_task

_ROWS = 10
_WARM_UP = 2  # calls before anything is timed
FEWEST_CALLS = 2  # so that the time between calls is seen
_CALL = "profiled call"


@dataclasses.dataclass
class Subject:
    """What is profiled: the programs, device state and data that a run would train with.

    live: device state, consumed by every training call. num_eval: examples in an evaluation batch.
    """

    programs: Programs
    live: Any
    train_data: Any
    held_out: Any
    permutation: Any
    num_eval: int

    def train(self, calls):
        """Take `calls` calls from an epoch's start as the training loop does; return the seconds."""
        devices, step = self.programs.devices, 0
        self.live = self.live.replace(step=devices.replicate(np.int32(0)))

        def call():
            nonlocal step
            self.live = self.programs.train(self.live, self.train_data, self.permutation, step)
            step += self.programs.steps_at(step)[0]
            devices.fetch(self.live.sums["bad_step"])  # waits for the device

        return repeated(call, calls)

    def evaluate(self, calls):
        """Evaluate a batch `calls` times; return the seconds."""
        return repeated(lambda: self.programs.evaluate(
            self.live, self.held_out, (0, self.num_eval)), calls)


def repeated(call, calls):
    """Call `call()`, which waits for the device, so many times; return the seconds.

    The trace shows where each began.
    """
    watch = logs.Stopwatch()
    for _ in range(calls):
        with jax.profiler.TraceAnnotation(_CALL):
            call()
    return watch.seconds()


def run(config, workdir, num_steps, stream=None):
    """Profile a configuration's training and evaluation; write the traces and print two tables.

    Args:
      config: configuration. workdir: folder that gets profile/train and profile/eval, in place of
        older ones. num_steps: training steps to trace, at most an epoch's full batches. stream: for
        the lines; sys.stdout if None.

    Raises:
      UserError: as `train.fit`; num_steps is not positive.
    """
    train.check(config)
    config = for_traces(config, num_steps)
    train.configure_jax(config)

    def say(text):
        if parallel.is_primary():
            print(text, file=stream or sys.stdout, flush=True)

    subject = prepare(config, num_steps, say)
    programs, folder = subject.programs, pathlib.Path(workdir) / "profile"
    (steps, size), full = programs.steps_at(0), programs.task.full_steps
    calls = min(max(math.ceil(num_steps / steps), FEWEST_CALLS), max(full // steps, 1))
    texts = programs.texts()
    where = f"{config.model.name} on {programs.devices.devices[0].device_kind}"
    say(f"\n{calls * steps} training steps of {size} images, {where}")
    say(report(subject.train, Calls(calls, steps, steps * size), folder / "train", texts["train"]))
    say(f"\n{FEWEST_CALLS} evaluation batches of {subject.num_eval} images, {where}")
    say(report(subject.evaluate, Calls(FEWEST_CALLS, 1, subject.num_eval), folder / "eval",
               texts["eval"]))
    say(where_traces_are(folder))


def for_traces(config, num_steps):
    """Return the configuration to trace; UserError for a number of steps that is not positive."""
    if num_steps < 1:
        raise UserError(f"--profile_steps={num_steps}: give a number of steps from 1 up")
    config = config.copy_and_resolve_references()
    config.cuda_graphs = "off"  # the trace of a CUDA graph does not say which kernel is whose
    return config


def where_traces_are(folder):
    """Return the lines that end a profile."""
    graphs = ("\nall this without CUDA graphs: training itself may be faster, and the device less idle"
              if jax.default_backend() == "gpu" else "")
    return (f"{graphs}\ntraces: {folder}/**/*.trace.json.gz, for https://ui.perfetto.dev, or "
            f"tensorboard --logdir {folder} (pip install xprof)")


@dataclasses.dataclass(frozen=True)
class Calls:
    """Calls of a compiled program: how many, the steps (or batches) and the images of each."""

    count: int
    steps_each: int
    images_each: int

    @property
    def steps(self):
        """Steps of all calls."""
        return self.count * self.steps_each


def report(work, calls, folder, text):
    """Warm up, time and trace `work`; return the table and summary of what it took.

    Args:
      work: takes a number of calls, returns their seconds. calls: Calls. folder: of the trace.
      text: the program's optimised HLO.

    Raises:
      UserError: the folder cannot be written, or the trace has no operation.
    """
    work(min(_WARM_UP, calls.count))
    seconds = work(calls.count)
    profile = record(folder, lambda: work(calls.count), text)
    return f"{table(profile, calls.steps)}\n{summary(profile, calls, seconds)}"


def prepare(config, num_steps, say):
    """Return the Subject of a configuration, as `train.fit` prepares a new run; write no file.

    The weights are the initial ones even where config.init_from names others: as fast as those.
    A call of more than half of `num_steps` steps (a whole epoch, on accelerators) takes that half.
    """
    devices, arrays = parallel.create(config), splits.load(config)
    task = create_task(config, len(arrays.train["labels"]), arrays.num_classes)
    state = saved.template(task)
    if not features.obstacle(task):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        task, arrays = features.on_features(task, variables, arrays)
    programs, most = Programs(task, devices), max(num_steps // FEWEST_CALLS, 1)
    if programs.steps_at(0)[0] > most:
        config = copy.deepcopy(config)
        config.steps_per_call = str(most)
        programs = Programs(dataclasses.replace(task, config=config), devices)
    train_data, held_out = devices.replicate((arrays.train, arrays.held_out))
    live = devices.replicate(state.on_device())
    watch = logs.Stopwatch()
    programs.compile(live, train_data, held_out, whole_epoch=False)
    say(f"compiled in {watch.seconds():.1f} s")
    size = epoch.eval_batch_size(config, devices.num_devices)
    num_eval = min(size, len(arrays.held_out["labels"]))
    return Subject(programs, live, train_data, held_out, programs.permutation(live), num_eval)


def record(folder, work, text):
    """Call `work()` under the profiler; return the trace.Profile of what it wrote below `folder`.

    text: the program's optimised HLO. Raises UserError if the folder cannot be written.
    """
    options = jax.profiler.ProfileOptions()
    if jax.process_count() > 1:  # each its own: they may see one disk
        if parallel.is_primary():
            shutil.rmtree(folder / "plugins", ignore_errors=True)  # of a single process
        folder = folder / f"process{jax.process_index()}"
    options.python_tracer_level = 0  # every Python call, at several times the cost of a small step
    with run_folder.writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with jax.profiler.trace(str(folder), profiler_options=options):
        work()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return trace.read(jax.profiler.ProfileData.from_file(str(newest)).planes, text, _CALL,
                      jax.default_backend())


def table(profile, steps):
    """Return the most expensive operations as a table, per step (or batch) of `steps`."""
    rows = [(f"{op.ns / steps / 1e6:.3f}", f"{100 * op.ns / profile.busy_ns:.1f}%",
             f"{op.count / steps:.4g}", op.name[:40], trace.place(op.op_name))
            for op in profile.operations[:_ROWS]]
    rest = profile.operations[_ROWS:]
    if rest:
        ns = sum(op.ns for op in rest)
        rows.append((f"{ns / steps / 1e6:.3f}", f"{100 * ns / profile.busy_ns:.1f}%", "",
                     f"the other {len(rest):,}", ""))
    rows.insert(0, ("ms", "share", "count", "operation", "from"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(f"{a:>{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:<{widths[3]}}  "
                     f"{e}".rstrip() for a, b, c, d, e in rows)


def summary(profile, calls, seconds):
    """Return lines on the speed, the parts of a step, and the device's idle time.

    calls: Calls. seconds: of all of them, when they were not traced.
    """
    idle = profile.total_ns - profile.busy_ns
    lines = [f"{1e3 * seconds / calls.steps:.4g} ms, "
             f"{calls.count * calls.images_each / seconds:,.0f} images/s "
             f"(traced: {profile.total_ns / calls.steps / 1e6:.4g} ms); the device was idle for "
             f"{100 * idle / profile.total_ns:.1f}% of the traced time"]
    if profile.between_ns:
        mean = sum(profile.between_ns) / len(profile.between_ns)
        lines.append(f"between calls it waited {mean / 1e6:.3g} ms for the host")
    if profile.num_devices > 1:
        lines.append(f"all of this is the mean of {profile.num_devices} devices")
    phases = collections.Counter()
    for op in profile.operations:
        phases[trace.phase(op.op_name)] += 100 * op.ns / profile.busy_ns
    if phases["backward"]:
        lines.append(f"forward {phases['forward']:.0f}%, backward {phases['backward']:.0f}%, the "
                     f"rest (data, augmentation, optimizer, metrics) {phases['other']:.0f}%")
    return "\n".join(lines)
