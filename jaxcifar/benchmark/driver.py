"""Start the contenders of each work, let them take turns, and collect what they measured."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

from jaxcifar import host, run_folder
from jaxcifar.benchmark import plot, table
from jaxcifar.benchmark import work as work_lib
from jaxcifar.errors import UserError, unknown

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PAUSE_SECONDS = 0.3  # between turns: waiting threads of the last one go to sleep


class Process:
    """A contender's process; its standard error goes to a temporary file."""

    def __init__(self, contender, spec):
        """Start the process and wait until it has compiled and warmed up. Raises UserError."""
        self.contender = contender
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        text = json.dumps({**spec, "contender": contender})
        environ = dict(os.environ, PYTHONPATH=os.pathsep.join(
            filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))))
        if not spec.get("caches", True):
            environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        # Contenders share a GPU: none may take most of its memory in advance.
        environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxcifar.benchmark.child", text], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1, env=environ)
        self._read()

    def measure(self, kind):
        """Return one measurement of a kind of work, see child.measure."""
        return self._ask(f"go {kind}")

    def finish(self):
        """Return the contender's report and end the process."""
        report = self._ask("finish")
        self.close()
        return report

    def close(self):
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                file.close()

    def _ask(self, line):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self):
        line = self._process.stdout.readline()
        message = json.loads(line) if line else {"error": self._last_words()}
        if "error" in message:
            self.close()
            raise UserError(f"{self.contender}: {message['error']}")
        return message

    def _last_words(self):
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        return f"its process ended (exit code {self._process.returncode}): {lines[-1]}"


def measure(work, contenders, repeats, *, threads, caches, on_cpu, say):
    """Measure one Work with every contender; they take turns within each repeat.

    Returns:
      (turns, reports): {kind: [{contender: measurement} for each repeat]}, {contender: report or
      {"error": text}}. A contender that fails is left out of the turns.
    """
    spec = {**dataclasses.asdict(work), "threads": threads, "caches": caches, "on_cpu": on_cpu}
    processes, reports = {}, {}
    try:
        for contender in contenders:
            say(f"{work.model}@{work.batch}: {contender} prepares")
            with _failing(contender, reports, processes, say):
                processes[contender] = Process(contender, spec)
        turns = {kind: [_turn(processes, kind, reports, say) for _ in range(repeats)]
                 for kind in (*work.kinds, "peak")}
        for contender, process in list(processes.items()):
            with _failing(contender, reports, processes, say):
                reports[contender] = process.finish()
    finally:
        for process in processes.values():
            process.close()
    return {kind: [{c: m for c, m in turn.items() if c in processes} for turn in of_kind]
            for kind, of_kind in turns.items()}, reports


def _turn(processes, kind, reports, say):
    measured = {}
    for contender, process in list(processes.items()):
        threading.Event().wait(_PAUSE_SECONDS)
        with _failing(contender, reports, processes, say):
            measured[contender] = process.measure(kind)
    return measured


@contextlib.contextmanager
def _failing(contender, reports, processes, say):
    """Report a UserError of the block and leave the contender out from there on."""
    try:
        yield
    except UserError as error:
        say(f"  {error}")
        reports[contender] = {"error": str(error)}
        processes.pop(contender, None)


def run(*, work, contenders, repeats, batch, quick, epoch_steps, threads, compiled, seconds,
        name, out):
    """Measure, print the table and write the files: all that scripts/benchmark.py does.

    Args:
      work: selection (see work.parse), "" for the standard list. contenders: names with commas, ""
        for all that suit the device. repeats: 0 for 5 (quick: 3). batch: for work without a batch
        size of its own; 0: the model's. quick: see work.select. epoch_steps: None, or steps from
        which epochs are extrapolated (0: whole epochs). threads: CPU cores for each contender, 0:
        all. compiled: "auto", "yes" or "no", whether torch_best may use torch.compile. seconds:
        that one measurement should take, 0: 2 (quick: 1). name: of the result files, after the
        device's; with a selection and no name nothing is written. out: folder that gets results/
        and docs/figures/; the files are written anew after each work.

    Raises:
      UserError: an unknown model, kind of work or contender; nothing could be measured.
    """
    on_cpu = host.runs_on_cpu()
    contenders = _contenders(contenders, on_cpu)
    works = work_lib.select(work, batch=batch, quick=quick, on_cpu=on_cpu,
                            epoch_steps=epoch_steps, seconds=seconds)
    if compiled != "auto":
        works = [dataclasses.replace(w, compile=compiled == "yes") for w in works]
    repeats = repeats or (3 if quick else 5)
    rows, written = [], ()
    for entry in works:
        turns, reports = measure(entry, contenders, repeats, threads=threads, on_cpu=on_cpu,
                                 caches=quick or bool(work),
                                 say=lambda line: print(line, file=sys.stderr))
        new = table.rows(entry, turns, reports)
        rows += new
        print(table.text(new, header=len(rows) == len(new)), flush=True)
        if any("ratio" in row for row in rows) and (name or not work):
            written = write(rows, on_cpu, name, pathlib.Path(out),
                            {"quick": quick, "repeats": repeats, "threads": threads})
    if not any("ratio" in row for row in rows):
        raise UserError("nothing could be measured: see the messages above")
    print("\n".join((table.LEGEND, table.summary(rows), *(f"wrote {path}" for path in written))))


def write(rows, on_cpu, name, folder, settings):
    """Write results/benchmark_DEVICE[_NAME].json and its figure; return the paths of both."""
    device = next(row["environment"]["device"] for row in rows if "environment" in row)
    slug = "cpu" if on_cpu else "-".join(device.lower().split())
    stem = "_".join(filter(None, ("benchmark", slug, name)))
    json_path, figure_path = folder / f"results/{stem}.json", folder / f"docs/figures/{stem}.png"
    for path in (json_path, figure_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_atomic(json_path, json.dumps({**settings, "rows": rows}, indent=1) + "\n")
    plot.bars(rows, figure_path, title=f"Images per second, jaxcifar over PyTorch ({device})")
    return json_path, figure_path


def _contenders(text, on_cpu):
    if not text:
        return [c for c in work_lib.CONTENDERS if not (on_cpu and c == "jaxcifar_bf16")]
    names = text.replace(" ", "").split(",")
    for name in names:
        if name not in work_lib.CONTENDERS:
            raise UserError(unknown("contender", name, work_lib.CONTENDERS))
    return list(dict.fromkeys(names))
