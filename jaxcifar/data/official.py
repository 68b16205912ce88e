"""Read the official CIFAR files: python (pickles) or binary version, archive or folder."""

import hashlib
import io
import pathlib
import pickle
import tarfile
import zlib

import numpy as np

from jaxcifar.data.specs import SPECS, SPLITS, Archive, DataError, DatasetSpec, SplitArrays
from jaxcifar.errors import first_line

_META_FILES = ("batches.meta", "meta", "batches.meta.txt", "fine_label_names.txt")
_NAME_KEYS = ("label_names", "fine_label_names")
_IMAGE_BYTES = 3 * 32 * 32


def is_official_folder(spec: DatasetSpec, path: pathlib.Path) -> bool:
    """Return whether `path` is (part of) an extracted official folder of this dataset."""
    return path.is_dir() and _kind_of(spec, _files_in(path)) is not None


def read_folder(spec: DatasetSpec, path: pathlib.Path) -> dict[str, SplitArrays]:
    """Read an extracted folder such as cifar-10-batches-py; see `_parse` for what is returned."""
    names = _files_in(path)
    kind = _kind_of(spec, names)
    wanted = [n for n in names if n in _META_FILES or n in _data_files(spec, kind)]
    return _parse(spec, kind, {name: (path / name).read_bytes() for name in wanted}, path)


def read_archive(spec: DatasetSpec, path: pathlib.Path) -> dict[str, SplitArrays]:
    """Read an archive (tar, any compression) without unpacking it to disk.

    The md5 is checked when the file has the name of an official archive. Raises DataError naming
    `path`.
    """
    for archive in spec.archives:
        if path.name == archive.file_name:
            check_md5(path, archive)
    possible = {*_META_FILES, *_data_files(spec, "python"), *_data_files(spec, "binary")}
    contents, seen = {}, []
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                name = pathlib.PurePosixPath(member.name).name
                seen.append(name)
                if member.isfile() and name in possible:
                    contents[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{path}: damaged or truncated, or no tar archive ({first_line(error)}); download it "
            "again, or give the extracted folder"
        ) from error
    kind = _kind_of(spec, contents)
    if kind is None:
        raise DataError(f"{path}: holds no {spec.name}{_other_dataset(spec, seen)}; expected the "
                        f"official archive, {' or '.join(a.file_name for a in spec.archives)}")
    return _parse(spec, kind, contents, path)


def check_md5(path: pathlib.Path, archive: Archive) -> None:
    """Raise DataError unless the file has the official archive's md5."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != archive.md5:
        raise DataError(
            f"{path}: md5 is {found}, the official {archive.file_name} has {archive.md5} "
            f"({path.stat().st_size:,} bytes, expected {archive.num_bytes:,}): incomplete or "
            "altered; delete it and download it again"
        )


def _files_in(path):
    return [p.name for p in path.iterdir() if p.is_file()]


def _data_files(spec, kind):
    suffix = ".bin" if kind == "binary" else ""
    return [name + suffix for name in (*spec.train_files, *spec.test_files)]


def _kind_of(spec, names):
    """Return "python" or "binary" by the files that are there, one is enough; None if no one is."""
    for kind in ("python", "binary"):
        if not set(_data_files(spec, kind)).isdisjoint(names):
            return kind
    return None


def other_dataset(spec: DatasetSpec, path: pathlib.Path) -> str:
    """Return a hint for the message if folder `path` holds another dataset, else ""."""
    for other in SPECS.values():
        for folder in (path, *(path / archive.folder for archive in other.archives)):
            if other.name != spec.name and is_official_folder(other, folder):
                return _hint(other)
    return ""


def _other_dataset(spec, names):
    for other in SPECS.values():
        if other.name != spec.name and _kind_of(other, names):
            return _hint(other)
    return ""


def _hint(other):
    return f" (but {other.name}: run with --dataset {other.name})"


def _parse(spec, kind, contents, path):
    """Return {"train": SplitArrays, "test": SplitArrays} from `contents`: file name -> bytes."""
    missing = [name for name in _data_files(spec, kind) if name not in contents]
    if missing:
        raise DataError(
            f"{path}: {', '.join(missing)} missing: the {kind} version of {spec.name} has "
            f"{', '.join(_data_files(spec, kind))}; extract the archive again"
        )
    names = _class_names(contents, path)
    if names is not None and tuple(names) != spec.class_names:
        raise DataError(
            f"{path}: class names {', '.join(names[:3])}... are not those of {spec.name} "
            f"({', '.join(spec.class_names[:3])}...){_other_dataset(spec, contents)}"
        )
    read = _read_pickle if kind == "python" else _read_binary
    suffix = ".bin" if kind == "binary" else ""
    splits = {}
    for split, files in zip(SPLITS, (spec.train_files, spec.test_files), strict=True):
        parts = [read(spec, contents[f + suffix], f"{path}/{f}{suffix}") for f in files]
        images, labels, coarse = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        splits[split] = SplitArrays(images, labels, coarse if spec.coarse_names else None)
    return splits


def _class_names(contents, path):
    """Return the class names that the files state, or None where the file of names is missing."""
    for name in _META_FILES:
        if name in contents and name.endswith(".txt"):
            return contents[name].decode("utf-8", "replace").split()
        if name in contents:
            meta = _unpickle(contents[name], f"{path}/{name}")
            return next(([_text(n) for n in meta[k]] for k in _NAME_KEYS if k in meta), None)
    return None


def _read_pickle(spec, data, origin):
    """Return images [N, 32, 32, 3], labels [N], coarse labels [N] of one pickled batch."""
    batch = _unpickle(data, origin)
    keys = ("fine_labels", "coarse_labels") if spec.coarse_names else ("labels", "labels")
    pixels = batch.get("data")
    if not isinstance(pixels, np.ndarray) or any(key not in batch for key in keys):
        raise DataError(f"{origin}: has keys {', '.join(batch)}; expected data, {keys[0]}: this is "
                        f"no batch of {spec.name}")
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _IMAGE_BYTES:
        raise DataError(f"{origin}: data is {pixels.dtype} {list(pixels.shape)}, expected uint8 "
                        f"[N, {_IMAGE_BYTES}]; extract the archive again")
    labels, coarse = (_label_array(batch[key], len(pixels), origin) for key in keys)
    _check_range(spec, labels, origin)
    return _to_nhwc(pixels), labels, coarse


def _read_binary(spec, data, origin):
    """Return images, labels, coarse labels of one binary file: label bytes, then 3,072 pixels."""
    num_labels = 2 if spec.coarse_names else 1
    record = num_labels + _IMAGE_BYTES
    if not data or len(data) % record:
        raise DataError(f"{origin}: {len(data):,} bytes, expected a multiple of {record:,}: "
                        "truncated; extract the archive again")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    labels, coarse = rows[:, num_labels - 1].astype(np.int32), rows[:, 0].astype(np.int32)
    _check_range(spec, labels, origin)
    return _to_nhwc(rows[:, num_labels:]), labels, coarse


def _label_array(values, count, origin):
    try:
        labels = np.asarray(values)
    except ValueError:
        labels = np.empty(0)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(f"{origin}: labels are not {count:,} whole numbers; extract the archive "
                        "again")
    return labels.astype(np.int32)


def _check_range(spec, labels, origin):
    if labels.size and not 0 <= labels.min() <= labels.max() < spec.num_classes:
        raise DataError(f"{origin}: labels lie in [{labels.min()}, {labels.max()}], expected 0 to "
                        f"{spec.num_classes - 1} for {spec.name}; extract the archive again")


def _to_nhwc(pixels):
    """Turn rows of 1,024 red, 1,024 green and 1,024 blue pixels into [N, 32, 32, 3]."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle dicts, lists, numbers, bytes and numpy arrays, and refuse everything else.

    A pickle can name any function to call; these files need only the ones below.
    """

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        ("__builtin__", "bytes"): bytes,
        ("builtins", "bytes"): bytes,
        # numpy's own constructors, under the module's name before and since numpy 2
        **{(f"numpy.{c}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0]
           for c in ("core", "_core")},
        **{(f"numpy.{c}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0]
           for c in ("core", "_core")},
    }

    def find_class(self, module, name):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, which is refused")
        return self._ALLOWED[module, name]


def _unpickle(data, origin):
    """Return the dict in one official pickle, with str keys. Raises DataError naming `origin`."""
    try:
        # "bytes": Python 2 wrote the official files, and its strings hold binary data
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(
            f"{origin}: damaged or truncated ({first_line(error)}); extract the archive again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{origin}: holds a {type(content).__name__}, expected a dict; extract the "
                        "archive again")
    return {_text(key): value for key, value in content.items()}


def _text(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
