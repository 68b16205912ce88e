"""The decoded cache: uint8 arrays beside the TFDS store, memory-mapped at the second start.

`data_dir/jaxcifar_cache/<name>-<key>/` holds one .npy file per array. The key is a digest of the
prepared folder's files (names, sizes, times), so a folder that was prepared again has another key.
A cache directory appears by one rename, complete or not at all. Delete it at any time: it is made
again.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil

import numpy as np
from absl import logging

from jaxcifar.data.folders import dataset_lock, temporary_directory
from jaxcifar.data.specs import IMAGE_SHAPE, SPLITS, DataError, DatasetSpec, SplitArrays
from jaxcifar.data.specs import verify_labels
from jaxcifar.errors import first_line

CACHE_FOLDER = "jaxcifar_cache"
_FORMAT = 1  # count up when the layout or the order of the examples changes


def cache_path(spec: DatasetSpec, folder: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """Return where the cache of the prepared `folder` lies (or would lie) below `root`."""
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(folder.iterdir())]
    identity = json.dumps([_FORMAT, folder.name, spec.class_names, files])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return root / CACHE_FOLDER / f"{spec.name}-{digest}"


def read(spec: DatasetSpec, folder: pathlib.Path, root: pathlib.Path):
    """Return {"train": SplitArrays, "test": SplitArrays}, read-only and memory-mapped, or None.

    None where there is no cache for exactly this folder, or it is damaged (it is then removed).
    """
    path = cache_path(spec, folder, root)
    if not path.is_dir():
        return None
    try:
        return {split: _read_split(spec, split, path) for split in SPLITS}
    except (OSError, ValueError, EOFError, DataError) as error:
        logging.warning("%s: damaged decoded cache (%s); making it again", path, first_line(error))
        shutil.rmtree(path, ignore_errors=True)
        return None


def _read_split(spec, split, path):
    images = np.load(path / f"{split}_images.npy", mmap_mode="r")
    labels = np.load(path / f"{split}_labels.npy", mmap_mode="r")
    if images.shape != (spec.count(split), *IMAGE_SHAPE) or images.dtype != np.uint8:
        raise DataError(f"{split} images are {images.dtype} {list(images.shape)}")
    if labels.dtype != np.int32:
        raise DataError(f"{split} labels are {labels.dtype}")
    verify_labels(spec, split, labels, spec.class_names, str(path))
    return SplitArrays(images, labels)


def write(spec: DatasetSpec, folder: pathlib.Path, root: pathlib.Path, splits) -> None:
    """Write the cache of `folder` and drop older ones.

    A directory that cannot be written, a full disk or another process at it are no errors: the run
    goes on with the arrays in memory.
    """
    target = cache_path(spec, folder, root)
    try:
        with dataset_lock(target.parent, spec.name, wait=False) as held:
            if held and not target.exists():
                with temporary_directory(target.parent, spec.name) as temporary:
                    for split, arrays in splits.items():
                        _save(temporary / f"{split}_images.npy", arrays.images)
                        _save(temporary / f"{split}_labels.npy", arrays.labels)
                    os.chmod(temporary, 0o755)  # mkdtemp's 0o700 would hide it from other users
                    os.rename(temporary, target)
                _remove_others(spec, target)
    except OSError as error:
        logging.info("%s: no decoded cache (%s); every start decodes the images", target, error)


def _save(path, array):
    with open(path, "wb") as file:
        np.save(file, np.ascontiguousarray(array))
        file.flush()
        os.fsync(file.fileno())  # before the rename: a power cut leaves no empty files behind it


def _remove_others(spec, target):
    for other in target.parent.glob(f"{spec.name}-*"):  # "pets-small-..." is another data set's
        if other != target and re.fullmatch("[0-9a-f]{16}", other.name.removeprefix(f"{spec.name}-")):
            with contextlib.suppress(OSError):
                shutil.rmtree(other)
