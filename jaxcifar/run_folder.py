"""A run folder's small files, written so that an interruption never leaves half of one, and its lock."""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping

from jaxcifar.errors import UserError

# What a --workdir may be of, and files that show it
_KINDS = {
    "a single run": ("config.json", "metrics.jsonl", "checkpoints"),
    "several seeds": ("seeds.json", "seed[0-9]*/config.json"),
    "a search": ("study.json", "workers/turn"),
}
LAST = "--checkpoint=last (of jaxcifar.evaluate, predict and convert)"  # where another is lost
_HELD = {}  # {lock file: open file}, of the run folders that this process trains in


@contextlib.contextmanager
def writing(path):
    """Turn an OSError of the `with` block into a UserError of one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; "
                        "choose a place that is writable and has space left") from error


def make(folder):
    """Make a folder, unless it is there; UserError if it cannot be, or is not writable."""
    folder = pathlib.Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: choose another folder")


def check_target(path):
    """Return `path` as a Path, once it is clear that a file can be written there.

    Found out before the work, not after it. Raises UserError: no such folder, a folder of that
    name, what is neither, or no right to write.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; add a file name")
    if path.exists() and not path.is_file():  # such as /dev/stdout, which a rename would replace
        raise UserError(f"cannot write {path}: it is no regular file; give the name of one")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UserError(f"cannot write {path}: the folder {path.resolve().parent} is not writable; "
                        "choose another")
    return path


def write_atomic(path, content):
    """Write `content`, str or bytes, so that `path` holds either its old content or all of the new.

    A link stays one: the file that it names is written. Raises UserError if it cannot be written.
    """
    path = pathlib.Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_json(path, tree, *, sort_keys=False):
    """Write nested dicts, lists and scalars (NumPy's and JAX's too) as indented JSON, atomically.

    Numbers that are not finite become null. Raises UserError if the file cannot be written.
    """
    text = json.dumps(plain(tree), indent=2, sort_keys=sort_keys, allow_nan=False,
                      ensure_ascii=False)
    write_atomic(path, text + "\n")


def read_json(path, default):
    """Return what a JSON file holds, or `default` where there is none, or none that can be read."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def plain(value):
    """Return the same tree in JSON's types: NaN and infinities become None, arrays lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def refuse_other_kind(workdir, kind):
    """Check that a folder is of `kind`, one of _KINDS, or of none yet.

    Raises:
      UserError: says what it holds.
    """
    workdir = pathlib.Path(workdir)
    there = [name for name, files in _KINDS.items() if any(any(workdir.glob(f)) for f in files)]
    if there and kind not in there:
        named = names_of_seeds(workdir) if there[0] == "several seeds" else ""
        raise UserError(f"{workdir} holds {there[0]}{named and f' ({named})'}: choose another "
                        f"--workdir for {kind}")


def has_checkpoints(workdir):
    """Return whether a run folder has checkpoints, damaged ones included."""
    return any(path.name.isdigit() for path in pathlib.Path(workdir, "checkpoints").glob("*"))


def has_lost_checkpoints(workdir):
    """Return whether a run folder holds the result of a finished run, and no checkpoint."""
    return pathlib.Path(workdir, "result.json").exists() and not has_checkpoints(workdir)


def holds_run(workdir):
    """Return whether a training left a checkpoint, a row or a result in a folder."""
    rows = pathlib.Path(workdir, "metrics.jsonl")
    return (has_checkpoints(workdir) or pathlib.Path(workdir, "result.json").exists()
            or rows.exists() and rows.stat().st_size > 0)


def refuse_without_checkpoints(workdir):
    """Raise UserError where a run folder has no checkpoint, and say why it has none."""
    if has_checkpoints(workdir):
        return
    workdir = pathlib.Path(workdir).resolve()
    study = workdir.parent.parent
    if (study / "study.json").exists():
        raise UserError(f"{workdir} is a trial of a search, whose weights are not kept: train "
                        f"{study / 'best.py'}, and give that run's folder")
    if (workdir / "result.json").exists():
        raise UserError(f"{workdir} is a finished run whose checkpoints are gone: put them back")
    raise UserError(f"{workdir} holds no checkpoint yet: wait until its first epoch is saved")


def seeds_in(workdir):
    """Return the seeds that have a folder, WORKDIR/seedN, in ascending order."""
    names = [path.name for path in pathlib.Path(workdir).glob("seed*")]
    return sorted(int(name[4:]) for name in names if re.fullmatch(r"seed(0|[1-9]\d*)", name))


def names_of_seeds(workdir):
    """Return the names of the seeds' folders for a message, "" where there are none."""
    return ", ".join(f"seed{seed}" for seed in seeds_in(workdir))


def read_rows(workdir):
    """Return the rows of a run folder's metrics.jsonl, a list of dicts; [] if there is none.

    A last line without its end (the run was killed while it wrote) is left out. Raises UserError
    if any other line is not a row.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            valid = isinstance(row["epoch"], int) and isinstance(row["step"], int)
        except (ValueError, TypeError, KeyError):
            valid = False
        if not valid:
            raise UserError(f"{path}: line {number} is not a row with epoch and step: "
                            f"{line[:40]!r}; remove the line or choose another workdir")
        rows.append(row)
    return rows


def step_of(workdir, epoch):
    """Return the step at the end of an epoch (from 1), by a run's own record; UserError without one."""
    for row in read_rows(workdir):
        if row["epoch"] == epoch:
            return row["step"]
    raise UserError(f"{workdir}/metrics.jsonl has no row of epoch {epoch}, so its checkpoint "
                    f"cannot be found: put the file back, or use {LAST}")


def epoch_seconds(row):
    """Return the seconds that a row's epoch took; of seeds trained at once, one seed's share."""
    return row["seconds"] / row.get("seeds_at_once", 1)


def write_rows(workdir, rows):
    """Replace metrics.jsonl by `rows`, atomically. Raises UserError if it cannot be written."""
    write_atomic(pathlib.Path(workdir) / "metrics.jsonl", "".join(map(_line, rows)))


def append_row(workdir, row):
    """Append `row`, a dict of plain values, to metrics.jsonl; on disk when this returns.

    Raises UserError if it cannot be written.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    with writing(path), path.open("ab") as file:
        file.write(_line(row).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _line(row):
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def lock(file, *, wait=False):
    """Lock an open file for as long as it is open, here or in a process that got it.

    wait: until no other holds it. Returns:
      False if another holds it. None, neither True nor False, where files cannot be locked: Windows,
      some network drives.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def is_locked(path, *, unknown):
    """Return whether a process holds the lock on a file, `unknown` where that cannot be known."""
    try:
        with path.open("ab") as file:
            held = lock(file)
    except OSError:
        return unknown
    return unknown if held is None else not held


def hold(workdir):
    """Keep other processes from training in a run folder, until `release` or this process's end.

    Raises UserError if one does, or the folder cannot be written.
    """
    release(workdir)
    path = _lock_of(workdir)
    with writing(workdir):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    if lock(file) is False:
        file.close()
        raise UserError(f"another process trains in {workdir}: wait until it ends, or choose another "
                        "--workdir")
    _HELD[path] = file


def is_held(workdir):
    """Return whether a process trains in a run folder; False where that cannot be known."""
    path = _lock_of(workdir)
    return path.exists() and is_locked(path, unknown=False)


def release(workdir):
    """Let others train in a run folder that `hold` took."""
    file = _HELD.pop(_lock_of(workdir), None)
    if file:
        file.close()


def _lock_of(workdir):
    return pathlib.Path(workdir).resolve() / ".lock"
