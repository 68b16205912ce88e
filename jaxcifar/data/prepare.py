"""`prepare`: from official files, images or nothing to a verified TFDS folder, or one clear error.

Everything is built in a hidden temporary directory of the data_dir, read back, compared, and
renamed as the last step: a folder `name/version` is complete or does not exist.
"""

import errno
import os
import pathlib

import numpy as np

from jaxcifar.data import cache, download, folders, image_folder, official, shapes32, store
from jaxcifar.data.specs import SPLITS, DataError, DatasetSpec, SplitArrays, get_spec
from jaxcifar.data.specs import verify_split
from jaxcifar.errors import first_line

_DOWNLOADS = "downloads"
_IMAGE_FOLDERS = "train/<class>/ and test/<class>/ image folders"


def prepare(name: str, source: str = "auto", data_dir=None, say=lambda line: None) -> pathlib.Path:
    """Prepare "cifar10", "cifar100" or "shapes32" below `data_dir`; return its folder.

    `source`: "auto" (what torchvision, Keras, fastai or TFDS left on this machine, else download),
    "download", or the path of an official archive, of an extracted folder (or the folder around
    it), or of train/<class>/ and test/<class>/ image folders. shapes32 is drawn, whatever the
    source. A dataset that is prepared already stays as it is. `say` takes one line of progress.
    Raises DataError, a UserError.
    """
    spec = get_spec(name)
    root = folders.resolve_data_dir(data_dir)
    if (folder := _there(spec, root, say)) is not None:  # it may be another's, to be read only
        return folder
    try:
        with folders.dataset_lock(root, spec.name, say):
            if (folder := _there(spec, root, say)) is not None:
                return folder
            folders.check_free_space(root, _bytes_needed(spec), f"preparing {spec.name}")
            splits = _arrays(spec, source, root, say)
            folder = _publish(spec, splits, root, say)
            cache.write(spec, folder, root, splits)
            return folder
    except OSError as error:
        raise folders.os_error(error, root, f"preparing {spec.name}") from error


def _there(spec, root, say):
    """Return the folder where a dataset is prepared, and say so, or None."""
    folder = folders.prepared_folder(spec, root)
    if folder is not None:
        say(f"{spec.name} is prepared already in {folder}; delete that folder to prepare it again")
    return folder


def _bytes_needed(spec):
    """Return the bytes of the records and of the decoded cache, each about the raw pixels."""
    return 2 * 3 * 32 * 32 * sum(spec.count(split) for split in SPLITS)


def _arrays(spec: DatasetSpec, source: str, root: pathlib.Path, say):
    """Return {"train": SplitArrays, "test": SplitArrays}, verified."""
    if spec.generated:
        return {split: shapes32.generate(spec, split) for split in SPLITS}
    if source == "auto":
        for path in folders.find_sources(spec, root):
            try:
                say(f"found {path}")
                return read_source(spec, path)
            except DataError as error:
                say(f"not usable: {error}")
        say(f"no usable copy of {spec.name} where torchvision, Keras, fastai and TFDS keep theirs")
    if source in ("auto", "download") and not spec.archives:
        raise DataError(f"{spec.name} cannot be downloaded: --source=FOLDER with {_IMAGE_FOLDERS}")
    if source in ("auto", "download"):
        archive = spec.archives[0]
        path = root / _DOWNLOADS / archive.file_name
        download.fetch(spec.server + archive.file_name, archive, path, say)
        return read_source(spec, path)
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise DataError(f"--source {source}: no such file or folder; expected auto, download, or "
                        f"the path of {_readable(spec)}")
    say(f"reading {path}")
    return read_source(spec, path)


def read_source(spec: DatasetSpec, path: pathlib.Path) -> dict[str, SplitArrays]:
    """Read an archive, an official folder, the folder around one, or image folders.

    Returns {"train": SplitArrays, "test": SplitArrays}, verified. Raises DataError naming `path`.
    """
    try:
        splits = _read_any(spec, path)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error}); "
                        "make it readable, or give another --source") from error
    for split in SPLITS:
        verify_split(spec, split, splits[split], str(path))
    return splits


def _read_any(spec, path):
    if path.is_file() and spec.archives:
        return official.read_archive(spec, path)
    for folder in (path, *(path / archive.folder for archive in spec.archives)):
        if official.is_official_folder(spec, folder):
            return official.read_folder(spec, folder)
    for archive in spec.archives:
        if (path / archive.file_name).is_file():
            return official.read_archive(spec, path / archive.file_name)
    if image_folder.is_image_folder(path):
        return image_folder.read_image_folder(spec, path)
    raise DataError(f"{path}: holds no {spec.name}{official.other_dataset(spec, path)}; expected "
                    f"{_readable(spec)}")


def _readable(spec):
    """Return what a dataset is read from, in words."""
    names = [name for archive in spec.archives for name in (archive.folder, archive.file_name)]
    return " or ".join([*names, _IMAGE_FOLDERS])


def _publish(spec, splits, root, say):
    """Write the TFDS folder in a temporary directory, compare, and rename it to its place."""
    target = root / spec.name / spec.version
    if target.exists() or target.is_symlink():
        raise DataError(f"{target}: is in the way: it is no prepared {spec.name}; move it away")
    what = f"writing {spec.name}"
    say(f"writing {sum(len(s.labels) for s in splits.values()):,} images to {target}")
    with folders.temporary_directory(root, spec.name) as temporary:
        try:
            written = store.write(spec, splits, temporary)
            stored = store.read(spec, written)
        except OSError as error:
            raise folders.os_error(error, root, what) from error
        except Exception as error:  # array_record reports a full disk in types of its own
            if os.strerror(errno.ENOSPC) in str(error):
                raise folders.os_error(OSError(errno.ENOSPC, ""), root, what) from error
            raise DataError(f"{root}: {what} failed ({first_line(error)}); nothing was kept: "
                            "mend it and run again") from error
        for split in SPLITS:
            same = np.array_equal(stored[split].images, splits[split].images)
            if not same or not np.array_equal(stored[split].labels, splits[split].labels):
                raise DataError(f"{root}: {what}: what was written reads back differently; check "
                                "the disk and run again")
        target.parent.mkdir(exist_ok=True)
        os.chmod(written, 0o755)
        os.rename(written, target)
    return target
