"""What a run says and writes. The only module that reads a clock.

    log = RunLog(workdir, primary=True, resume_epoch=None, tensorboard=True)
    log.header({"model": "resnet5m", "device": "cpu"})
    with log.progress(total_steps=704, epoch=1, epochs=150, batch_size=64) as bar:
        bar.update(1, lambda: {"loss": 2.1, "accuracy": 31.0})
    log.epoch({"epoch": 1, "step": 704, "train_loss": 1.787, "train_accuracy": 34.36}, epochs=150)

Accuracies are in percent, as in the published reports.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import shutil
import sys
import textwrap
import time

from jaxcifar import event_files, run_folder
from jaxcifar.errors import first_line

_REFRESH_SECONDS = 0.5  # how often the bar asks the device for a loss, at most
_TABLE_ROWS = 40
_LINE_LENGTH = 100


class RunLog:
    """config.json, metrics.jsonl, result.json and tensorboard/ of a run, and its lines."""

    def __init__(self, workdir, *, primary, resume_epoch, tensorboard, stream=None, progress=True):
        """Prepare `workdir` for a run.

        primary: False in every process but the first: nothing is written or printed.
        resume_epoch: the first epoch that will be trained now; rows of it and of later epochs, left
        by the interrupted start, are dropped. None starts afresh: no row is kept.
        tensorboard: write event files. stream: for lines and the bar; sys.stdout if None.
        progress: show a bar where `stream` is a terminal.
        Raises UserError if `workdir` cannot be written.
        """
        self.workdir = pathlib.Path(workdir)
        self._primary = primary
        self._stream = sys.stdout if stream is None else stream
        self._terminal = primary and progress and self._stream.isatty()
        self._events = None
        self._meanwhile = {}
        self._epoch_start = None
        self._epoch_seconds = None
        if not primary:
            return
        with run_folder.writing(self.workdir):
            self.workdir.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_epoch is not None:
            kept = [row for row in self.read_rows() if row["epoch"] < resume_epoch]
        run_folder.write_rows(self.workdir, kept)
        if tensorboard:
            folder = self.workdir / "tensorboard"
            with run_folder.writing(folder):
                self._events = event_files.EventFile(
                    folder, wall_time=time.time(), purge_step=kept[-1]["step"] + 1 if kept else 0)

    def read_rows(self):
        """Return the rows of metrics.jsonl, a list of dicts (see `run_folder.read_rows`)."""
        return run_folder.read_rows(self.workdir)

    def write_config(self, config):
        """Write the resolved configuration, a nested dict, to config.json, keys sorted."""
        if self._primary:
            run_folder.write_json(self.workdir / "config.json", config, sort_keys=True)

    def result(self, result):
        """Write the run's outcome, a nested dict, to result.json in the order given."""
        if self._primary:
            run_folder.write_json(self.workdir / "result.json", result)

    def print(self, text):
        """Print `text`, above the bar if there is one."""
        if self._terminal:
            from tqdm import tqdm
            tqdm.write(text, file=self._stream)
        elif self._primary:
            print(text, file=self._stream, flush=True)

    def header(self, fields):
        """Print `fields`, a mapping label -> value, in two columns; lists are joined by commas."""
        width = max(map(len, fields), default=0)
        for label, value in fields.items():
            self.print(textwrap.fill(
                _header_value(value), _LINE_LENGTH, initial_indent=f"{label:<{width}}  ",
                subsequent_indent=" " * (width + 2), break_long_words=False,
                break_on_hyphens=False))

    def parameter_table(self, variables):
        """Print `parameter_table(variables)`."""
        if self._primary:
            self.print(parameter_table(variables))

    def epoch(self, row, *, epochs, note=""):
        """Append one epoch's row to metrics.jsonl and TensorBoard, and print it as one line.

        row: dict with "epoch", "step" and any of learning_rate, train_loss, train_accuracy
        (percent), those of val_ and test_, images_per_second, seconds, resumed_at: scalars of
        Python, NumPy or JAX. What is not finite is written as null, since JSON has no NaN. epochs:
        how many the run has. note: ends the line, for instance "best". Raises UserError if the disk refuses.
        """
        if not self._primary:
            return
        row = run_folder.plain(row)
        run_folder.append_row(self.workdir, row)
        if self._events is not None:
            with run_folder.writing(self._events.path):
                self._events.scalars(row["step"], _scalars(row), wall_time=time.time())
        if self._epoch_start is not None and "resumed_at" not in row:  # else only a part of one
            self._epoch_seconds = time.perf_counter() - self._epoch_start
        self.print(_epoch_text(row, epochs, self._epoch_seconds, note))

    def progress(self, *, total_steps, epoch, epochs, batch_size, first_step=0):
        """Return one epoch's bar, a context manager whose `update(steps, metrics)` follows steps.

        batch_size: the global one; images per second are counted with it. first_step: of an epoch
        that was interrupted, how many were taken before. Without a terminal there is no bar and
        `metrics` is never evaluated.
        """
        self._epoch_start = time.perf_counter()
        return Progress(self._stream if self._terminal else None, total_steps=total_steps,
                        epoch=epoch, epochs=epochs, batch_size=batch_size, first_step=first_step,
                        epoch_seconds=self._epoch_seconds)

    def meanwhile(self, what, function, *args):
        """Call function(*args), which makes `what`, in a thread of its own; see `wait`."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self._meanwhile[what] = pool.submit(function, *args)
        pool.shutdown(wait=False)

    def wait(self):
        """Wait for what was begun `meanwhile`, and say what went wrong there."""
        for what, future in self._meanwhile.items():
            try:
                future.result()
            except Exception as error:  # whatever it is: the run goes on without it
                self.print(f"{what} is missing: {first_line(error)}")
        self._meanwhile.clear()

    def close(self):
        """Wait for what was begun `meanwhile`; close the event file."""
        try:
            self.wait()
        finally:
            if self._events is not None:
                self._events.close()


class Progress:
    """One epoch's bar: loss, accuracy, images per second, time left to the end of the run."""

    def __init__(self, stream, *, total_steps, epoch, epochs, batch_size, first_step, epoch_seconds):
        """Prepare the bar; `stream` None: no bar. epoch_seconds: of the last epoch, or None."""
        self._stream, self._total, self._batch_size = stream, total_steps, batch_size
        self._epoch, self._epochs, self._epoch_seconds = epoch, epochs, epoch_seconds
        self._bar = None
        self._first, self._steps = first_step, 0  # steps before, and since, the start

    def __enter__(self):
        if self._stream is not None:
            from tqdm import tqdm
            self._start = self._shown = time.perf_counter()
            self._bar = tqdm(
                total=self._total, initial=self._first, file=self._stream, leave=False, mininterval=0,
                ncols=min(shutil.get_terminal_size().columns, 110),
                desc=f"epoch {self._epoch}/{self._epochs}",
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}")
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def update(self, steps, metrics):
        """Count `steps` more steps as done, and redraw the bar if half a second has passed.

        metrics: a callable that returns {"loss", "accuracy" (percent)}; it is called only when the
        bar is redrawn, since reading a value waits for the device.
        """
        self._steps += steps
        if self._bar is None or time.perf_counter() - self._shown < _REFRESH_SECONDS:
            return
        values = metrics()
        parts = [f"loss {float(values['loss']):.4f}", f"acc {float(values['accuracy']):.2f}%"]
        now = self._shown = time.perf_counter()
        seconds = now - self._start  # programs are compiled before the epoch
        parts.append(f"{self._steps * self._batch_size / seconds:,.0f} images/s")
        parts.append(f"ETA {self._time_left(now, seconds / self._steps)}")
        self._bar.set_postfix_str("  ".join(parts), refresh=False)
        self._bar.update(self._first + self._steps - self._bar.n)

    def _time_left(self, now, step_seconds):
        """h:mm:ss left of the run: by the last epoch's time or, in the first, by the speed."""
        epochs_left = self._epochs - self._epoch + 1
        if self._epoch_seconds is not None:
            return _duration(self._epoch_seconds * epochs_left - (now - self._start))
        return _duration(step_seconds * (self._total * epochs_left - self._first - self._steps))


class Stopwatch:
    """Wall-clock seconds: since the start, and of named sections."""

    def __init__(self):
        """Start the watch."""
        self._start = time.perf_counter()
        self.sections = {}

    def seconds(self):
        """Return the seconds since the start, a float."""
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def section(self, name):
        """Add the seconds of a `with` block to `sections[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.sections[name] = self.sections.get(name, 0.0) + time.perf_counter() - start


def parameter_table(variables):
    """Return a table of the parameters of `variables` ({"params": ...}), by clu.parameter_overview.

    One line per array; where that takes more than 40 lines, one per module, at the finest depth
    that fits.
    """
    from clu import parameter_overview
    params = variables["params"]
    arrays = parameter_overview.flatten_dict(params)
    if len(arrays) <= _TABLE_ROWS:
        return parameter_overview.get_parameter_overview(params, include_stats=False)
    for depth in range(max(name.count("/") for name in arrays), 0, -1):
        modules = {}
        for name, array in arrays.items():
            modules.setdefault("/".join(name.split("/")[:depth]), []).append(array)
        if len(modules) <= _TABLE_ROWS:
            break
    rows = [_ModuleRow(name, len(group), sum(math.prod(array.shape) for array in group))
            for name, group in modules.items()]
    return (f"{parameter_overview.make_table(rows)}\n"
            f"Total: {sum(row.parameters for row in rows):,} in {len(arrays)} arrays")


@dataclasses.dataclass
class _ModuleRow:
    module: str
    arrays: int
    parameters: int


def _scalars(row):
    """TensorBoard's tags and values: train_loss is the scalar loss of the group train."""
    return {key.replace("_", "/", 1) if key.startswith(("train_", "val_", "test_")) else key: value
            for key, value in row.items()
            if key not in ("step", "resumed_at") and isinstance(value, (int, float))}


def _header_value(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_header_value, value)) or "none"
    return "none" if value is None else str(value)


def _epoch_text(row, epochs, epoch_seconds, note):
    """epoch 3/150  step 2,112  lr 0.001  train 1.0420 63.34%  val 0.7940 72.05%  ..."""
    def text(template, value):
        return "nan" if value is None else template.format(value)

    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"step {row['step']:,}"]
    if "learning_rate" in row:
        parts.append(text("lr {:.3g}", row["learning_rate"]))
    for split in ("train", "val", "test"):
        measured = [text(template, row[f"{split}_{name}"])
                    for name, template in (("loss", "{:.4f}"), ("accuracy", "{:.2f}%"))
                    if f"{split}_{name}" in row]
        if measured:
            parts.append(" ".join((split, *measured)))
    for key, template in (("images_per_second", "{:,.0f} images/s"), ("seconds", "{:.1f} s")):
        if key in row:
            parts.append(text(template, row[key]))
    if epoch_seconds is not None and row["epoch"] < epochs:
        parts.append(f"ETA {_duration(epoch_seconds * (epochs - row['epoch']))}")
    return "  ".join((*parts, note) if note else parts)


def _duration(seconds):
    """h:mm:ss."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
