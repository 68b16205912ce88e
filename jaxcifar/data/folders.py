"""Where data lies: TFDS's folders, other libraries' copies, locks and temporary directories.

Nothing here imports tensorflow_datasets, so that a start with a decoded cache stays fast.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import tempfile

from jaxcifar import run_folder
from jaxcifar.data.specs import DataError, DatasetSpec


def resolve_data_dir(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Return `data_dir`, or for None and "" TFDS's own: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    if data_dir:
        return pathlib.Path(data_dir).expanduser()
    default = pathlib.Path("~") / "tensorflow_datasets"
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or default).expanduser()


def prepared_folder(spec: DatasetSpec, root: pathlib.Path) -> pathlib.Path | None:
    """Return the folder `root/name/version` that TFDS prepared, the newest version, or None.

    CIFAR's images are the same in all versions; any other data set must have that of its spec.
    """
    found = []
    with contextlib.suppress(OSError):
        for folder in (root / spec.name).iterdir():
            complete = all((folder / f).is_file() for f in ("dataset_info.json", "features.json"))
            if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and complete:
                found.append(folder)
    if not spec.archives:
        found = [folder for folder in found if folder.name == spec.version]
    return max(found, key=lambda f: [int(n) for n in f.name.split(".")], default=None)


def find_sources(spec: DatasetSpec, root: pathlib.Path) -> list[pathlib.Path]:
    """Return the official folders and archives of a dataset in the usual places, best first.

    The places are those of torchvision (./data, ~/data, ...), Keras, fastai and TFDS (`root`
    included).
    """
    home = pathlib.Path.home()
    keras = pathlib.Path(os.environ.get("KERAS_HOME") or home / ".keras")
    places = [pathlib.Path(p) for p in (".", "data", "datasets", "../data")]
    places += [home, home / "data", home / "datasets", home / "Downloads", home / ".torch"]
    places += [home / ".torch/datasets", home / ".cache/torch/datasets", keras / "datasets"]
    for tfds_root in {root: None, resolve_data_dir(None): None}:
        places += [tfds_root, tfds_root / "downloads"]
        with contextlib.suppress(OSError):
            places += sorted((tfds_root / "downloads" / "extracted").iterdir())
    names = [name for a in spec.archives for name in (a.folder, f"{a.folder}-target/{a.folder}")]
    names += [name for a in spec.archives for name in (a.file_name, f"{a.folder}.tar.gz")]
    found = [place / name for name in names for place in places if _exists(place / name)]
    for a in spec.archives:  # TFDS's downloads: cs.toronto.edu_kriz_cifar-10-binary<hash>.tar.gz
        pattern = f"*_{a.file_name.removesuffix('.tar.gz')}*.tar.gz"
        with contextlib.suppress(OSError):
            found += sorted((root / "downloads").glob(pattern))
    fastai = home / ".fastai" / "data" / spec.name
    return found + ([fastai] if _exists(fastai / "train") and _exists(fastai / "test") else [])


def _exists(path):
    try:
        return path.exists()
    except OSError:  # a folder that may not be entered
        return False


@contextlib.contextmanager
def dataset_lock(root: pathlib.Path, name: str, say=None, wait: bool = True):
    """Hold the lock of one dataset below `root`; yield whether it is held.

    The system releases the lock when its process ends, however it ends. Where locks do not work, go
    on without: the renames are atomic anyway. `wait=False` yields False at once when another
    process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".jaxcifar_{name}.lock", "w") as file:
        held = run_folder.lock(file) is not False
        if wait and not held:
            if say:
                say(f"another process is preparing {name} in {root}: waiting for it")
            run_folder.lock(file, wait=True)
        yield held or wait


@contextlib.contextmanager
def temporary_directory(parent: pathlib.Path, name: str):
    """Yield a new hidden directory in `parent`; it is removed at the end, and so are stale ones.

    Call it with the dataset's lock held: then every other such directory belongs to a dead process.
    """
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".incomplete_{name}."  # then "cifar10" is not the beginning of another name
    for stale in parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    path = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def check_free_space(root: pathlib.Path, num_bytes: int, what: str) -> None:
    """Raise DataError unless the disk of `root` has `num_bytes` free."""
    free = shutil.disk_usage(root).free
    if free < num_bytes:
        raise DataError(
            f"{root}: {free / 1e6:,.0f} MB free, {what} needs {num_bytes / 1e6:,.0f} MB; "
            "free some space or give another folder with --data_dir"
        )


def os_error(error: OSError, path: os.PathLike, what: str) -> DataError:
    """Return the DataError that says what a failed file operation means and what to do."""
    where = error.filename or path
    if error.errno == errno.ENOSPC:
        return DataError(f"{path}: the disk is full while {what}; free some space or give another "
                         "folder with --data_dir (nothing half-written was kept)")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DataError(f"{where}: not writable while {what}; give another folder with --data_dir "
                         "or set TFDS_DATA_DIR")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY):
        return DataError(f"{where}: is in the way while {what}; a folder is needed there: move it "
                         "away or give another folder with --data_dir")
    return DataError(f"{where}: {error.strerror or error} while {what}; mend it and run again")
