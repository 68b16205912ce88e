"""Start the contenders of each work, let them take turns, and collect what they measured."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import threading

from jaxcifar import environment, host, run_folder
from jaxcifar.benchmark import children, plot, table
from jaxcifar.benchmark import work as work_lib
from jaxcifar.errors import UserError, unknown

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FOLDERS = ("results", "docs/figures")
_PACKAGES = ("jax", "jaxlib", "torch")  # on which a speed depends most
_PAUSE_SECONDS = 0.3  # between turns: waiting threads of the last one go to sleep
_LIMIT_SECONDS = 300  # for a contender's preparation, and for each of its measurements, on a GPU
# Of the limit, for torch_best's search for its fastest form: deep networks compile for minutes, what
# the search began in time has to end, and evaluation compiles after it.
_SEARCH_SHARE = {"quick": 0.2, "whole": 0.4}


class Process(children.Child):
    """A contender's process.

    limit: seconds for its preparation, and for each of its measurements; 0: none.
    """

    def __init__(self, contender, spec, limit=0):
        """Start the process and wait until it has compiled and warmed up. Raises UserError."""
        self._limit = limit
        environment = {} if spec.get("caches", True) else {
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        host.share_device_memory()  # among contenders, which inherit this
        super().__init__(contender, "jaxcifar.benchmark.child",
                         json.dumps({**spec, "contender": contender}), **environment)
        self.receive(limit)

    def measure(self, kind):
        """Return one measurement of a kind of work, see child.measure."""
        return self._ask(f"go {kind}")

    def finish(self):
        """Return the contender's report and end the process."""
        report = self._ask("finish")
        self.close()
        return report

    def _ask(self, line):
        self.send(line)
        return self.receive(self._limit)


def measure(work, contenders, repeats, *, threads, caches, on_cpu, say, limit=0, search=0.0):
    """Measure one Work with every contender; they take turns within each repeat.

    limit, search: seconds for a preparation, and in it for torch_best's search; 0: no limit.

    Returns:
      (turns, reports): {kind: [{contender: measurement} for each repeat]}, {contender: report or
      {"error": text, "timed_out": bool}}. A contender that fails is left out of the turns.
    """
    spec = {**dataclasses.asdict(work), "threads": threads, "caches": caches, "on_cpu": on_cpu,
            "choose_seconds": search}
    processes, reports = {}, {}
    try:
        for contender in contenders:
            say(f"{work.model}@{work.batch}: {contender} prepares")
            with _failing(contender, reports, processes, say):
                processes[contender] = _prepared(contender, spec, limit, say)
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


def _prepared(contender, spec, limit, say):
    """Start a contender; torch_best anew without torch.compile, where that was too slow."""
    try:
        return Process(contender, spec, limit)
    except children.TimedOut as error:
        if contender != "torch_best" or not spec["compile"]:
            raise
        say(f"  {error}; once more, without torch.compile")
        note = f"torch.compile not ready within {limit} s"
        return Process(contender, {**spec, "compile": False, "note": note}, limit)


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
        reports[contender] = {"error": str(error), "timed_out": isinstance(error, children.TimedOut)}
        processes.pop(contender, None)


def run(*, work, contenders, repeats, batch, quick, epoch_steps, threads, compiled, seconds,
        name, out, resume=False, limit=None):
    """Measure, print the table and write the files: all that scripts/benchmark.py does.

    On CPU the contenders of a work take turns, since other work on the machine slows now this one,
    now that one. On a GPU each has the device for itself, one after the other.

    Args:
      work: selection (see work.parse), "" for the standard list. contenders: names with commas, ""
        for all that suit the device and the work. repeats: 0 for 5 (quick: 3, on a GPU 2). batch:
        for work without a batch size of its own; 0: the model's. quick: see work.select.
        epoch_steps: None, or steps from which epochs are extrapolated (0: whole epochs), see
        work.select. threads: CPU cores for each contender, 0: all. compiled: "auto", "yes" or
        "no", whether torch_best may use torch.compile. seconds: that one measurement should take,
        0: 2 (quick: 1). name: of the result files, after the device's; with a selection and no name
        nothing is written. out: folder that gets results/ and docs/figures/; the files are written
        anew after each contender (on CPU: each work).
        resume: keep what the file has of this source, these versions and settings. limit: seconds for a
        contender's preparation and for each measurement, 0: none; None: 300 on a GPU, else none.

    Raises:
      UserError: an unknown model, kind of work or contender; nothing could be measured.
    """
    on_cpu = host.runs_on_cpu()
    asked = _contenders(contenders, on_cpu)
    works = work_lib.select(work, batch=batch, quick=quick, on_cpu=on_cpu,
                            epoch_steps=epoch_steps, seconds=seconds)
    if compiled != "auto":
        works = [dataclasses.replace(w, compile=compiled == "yes") for w in works]
    limit = (0 if on_cpu else _LIMIT_SECONDS) if limit is None else limit
    repeats = repeats or ((3 if on_cpu else 2) if quick else 5)
    settings = {"quick": quick, "repeats": repeats, "threads": threads, "source": source(),
                "versions": {name: environment.version(name) for name in _PACKAGES}}
    common = {"threads": threads, "on_cpu": on_cpu, "caches": quick or bool(work), "limit": limit,
              "search": limit * _SEARCH_SHARE["quick" if quick else "whole"]}
    writes, folder = bool(name or not work), pathlib.Path(out)
    if resume and not writes:
        raise UserError("--resume goes on from a file, and --work without --name writes none")
    for sub in _FOLDERS if writes else ():  # before the work, not after it
        run_folder.make(folder / sub)
    rows = previous(folder, name, on_cpu, settings) if resume else []
    written = ()
    for number, entry in enumerate(works):
        chosen = asked if contenders else [c for c in asked if c in entry.contenders]
        for group in _groups(entry, chosen, rows, on_cpu):
            turns, reports = measure(entry, group, repeats, **common,
                                     say=lambda line: print(line, file=sys.stderr))
            new = [row | {"settings": describe(entry), "caches": common["caches"]}
                   for row in table.rows(entry, turns, reports)]
            rows = _kept(rows, new) + new
            table.compare(_rows_of(entry, rows, chosen))
            if writes and any("images_per_second" in row for row in rows):
                written = write(rows, on_cpu, name, folder, settings)
        print(table.text(_rows_of(entry, rows, chosen), header=number == 0), flush=True)
    if not any("images_per_second" in row for row in rows):
        raise UserError("nothing could be measured: see the messages above")
    print("\n".join((table.LEGEND, table.summary(rows), *(f"wrote {path}" for path in written))))


def source():
    """Return 12 hexadecimal digits that differ when a source file, or a PyTorch network, does."""
    digest = hashlib.sha256()
    for path in sorted([*(_ROOT / "jaxcifar").rglob("*.py"), *(_ROOT / "tests").glob("*twins*.py")]):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def describe(entry):
    """Return what two measurements of a Work must share to stand side by side, fit for JSON."""
    fields = dataclasses.asdict(entry)
    return {key: fields[key] for key in ("augment", "num_train", "optimizer", "epoch_steps",
                                         "seconds", "compile", "eval_batch")}


def previous(folder, name, on_cpu, settings):
    """Return the rows of this device's result file of this source, versions and settings, else [].

    A row without a result is left out, to be tried again, unless it ran into the limit.
    """
    here = () if on_cpu else tuple(host.of_gpus("name"))  # of a part of one, the first words
    for path in sorted(folder.glob(f"{_FOLDERS[0]}/benchmark_*.json")):
        if not path.stem.endswith(name) or path.stem.startswith("benchmark_cpu") != on_cpu:
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if path != _paths(content["rows"], on_cpu, name, folder)[0]:
            continue
        if here and not _device(content["rows"]).startswith(here):
            continue
        if all(content.get(key) == value for key, value in settings.items()):
            return [row for row in content["rows"] if "error" not in row or row["timed_out"]]
    return []


def _groups(entry, contenders, rows, on_cpu):
    """Return the contenders that are left to measure, in lists of those that take turns."""
    done = {(row["work"], row["contender"]) for row in rows if row["settings"] == describe(entry)}
    left = [c for c in contenders if any((entry.name(k), c) not in done for k in entry.kinds)]
    if on_cpu:  # ratios are within a turn: all again
        return [contenders] if left else []
    return [[contender] for contender in left]


def _kept(rows, new):
    """Return the rows beside which `new` ones stand: not measured again, and of the same device."""
    again = {(row["work"], row["contender"]) for row in new}
    devices = {row["environment"]["device"] for row in new if "environment" in row}
    return [row for row in rows if (row["work"], row["contender"]) not in again and (
        not devices or "environment" not in row or row["environment"]["device"] in devices)]


def _rows_of(entry, rows, contenders):
    """Return the rows of a Work: kind by kind, contenders in their order."""
    return [row for kind in entry.kinds for contender in contenders for row in rows
            if row["work"] == entry.name(kind) and row["contender"] == contender]


def write(rows, on_cpu, name, folder, settings):
    """Write results/benchmark_DEVICE[_NAME].json and its figure; return the paths of both.

    Without matplotlib there is no figure.
    """
    json_path, figure_path = _paths(rows, on_cpu, name, folder)
    run_folder.write_json(json_path, {**settings, "rows": rows})
    try:
        plot.bars(rows, figure_path,
                  title=f"jaxcifar's speed over PyTorch's ({_place(rows, on_cpu)})")
    except ImportError as error:
        print(f"no figure: {error}", file=sys.stderr)
        return (json_path,)
    return json_path, figure_path


def _place(rows, on_cpu):
    """Return the device's name, or how many CPU cores a contender had."""
    if not on_cpu:
        return _device(rows)
    cores = next(row["environment"]["host_cores"] for row in rows if "environment" in row)
    return f"{cores} CPU core{'s'[:cores > 1]}"


def _device(rows):
    return next(row["environment"]["device"] for row in rows if "environment" in row)


def _paths(rows, on_cpu, name, folder):
    """Return the paths of the results and of their figure."""
    slug = "cpu" if on_cpu else "-".join(_device(rows).lower().split())
    stem = "_".join(filter(None, ("benchmark", slug, name)))
    results, figures = (folder / sub for sub in _FOLDERS)
    return results / f"{stem}.json", figures / f"{stem}.png"


def _contenders(text, on_cpu):
    if not text:
        return [c for c in work_lib.CONTENDERS if not (on_cpu and c == "jaxcifar_bf16")]
    names = text.replace(" ", "").split(",")
    for name in names:
        if name not in work_lib.CONTENDERS:
            raise UserError(unknown("contender", name, work_lib.CONTENDERS))
    return list(dict.fromkeys(names))
