"""Write and read prepared TFDS folders, both without TensorFlow.

Order of the examples: by TFDS's "id" feature ("train_00000", ...), which is the order of the
official files, whatever order TFDS stored the records in. Example i is therefore the same image as
torchvision's example i, and a run does not depend on who prepared the folder or in which file
format. (Data prepared from another order, such as a folder of images, has that order.) Folders of
TFDS versions without "id" keep the order of the records.

Importing this module imports tensorflow_datasets (half a second).
"""

import contextlib
import io
import os
import pathlib
import struct

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tqdm import tqdm

from jaxcifar.data import builders
from jaxcifar.data.specs import (
    IMAGE_SHAPE,
    SPLITS,
    DataError,
    DatasetSpec,
    SplitArrays,
    verify_labels,
    verify_split,
)
from jaxcifar.errors import first_line


def write(spec: DatasetSpec, splits: dict[str, SplitArrays], data_dir: os.PathLike) -> pathlib.Path:
    """Write both splits as array_record below `data_dir` and return the folder `name/version`.

    `splits` maps "train" and "test" to verified arrays. Raises what TFDS and the file system raise;
    the caller writes into a temporary directory and renames it (see prepare.py).
    """
    builder = builders.builder_of(spec)(data_dir=os.fspath(data_dir), file_format="array_record")
    builder.arrays = splits
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with _quiet():
        builder.download_and_prepare(download_config=config)
    return pathlib.Path(builder.data_dir)


def read(spec: DatasetSpec, folder: os.PathLike) -> dict[str, SplitArrays]:
    """Read and verify a prepared folder (array_record or tfrecord), whoever prepared it.

    Returns {"train": SplitArrays, "test": SplitArrays}. Raises DataError, naming the folder, for
    anything that is not exactly the dataset.
    """
    folder = pathlib.Path(folder)
    try:
        with _quiet():
            builder = tfds.builder_from_directory(os.fspath(folder))
            splits = {split: _read_split(spec, builder, split, folder) for split in SPLITS}
    except DataError:
        raise
    except Exception as error:  # TFDS raises many types for a damaged folder
        raise DataError(
            f"{folder}: cannot be read as a prepared {spec.name} ({first_line(error)}); delete the "
            f"folder and run: python scripts/prepare_data.py --dataset {spec.name}"
        ) from error
    for split, arrays in splits.items():
        verify_split(spec, split, arrays, str(folder))
    return splits


def _read_split(spec, builder, split, folder):
    features = builder.info.features
    if split not in builder.info.splits:
        raise DataError(f"{folder}: has no split {split!r}; delete the folder and prepare it again")
    count = spec.count(split)
    images = np.zeros((count, *IMAGE_SHAPE), np.uint8)
    labels, coarse, ids = np.full(count, -1, np.int32), np.full(count, -1, np.int32), []
    num_read = 0
    records = tqdm(_records(builder, split), f"reading {split}", count, disable=None, leave=False)
    for i, record in enumerate(records):
        num_read = i + 1
        if num_read > count:
            break
        example = features.deserialize_example_np(record)
        images[i], labels[i] = example["image"], example["label"]
        coarse[i] = example.get("coarse_label", -1)
        ids.append(example.get("id", b""))
    if num_read != count or builder.info.splits[split].num_examples != count:
        found = builder.info.splits[split].num_examples
        raise DataError(
            f"{folder}: the {split} split holds {min(num_read, found):,} examples, expected "
            f"{count:,}; delete the folder and prepare it again"
        )
    verify_labels(spec, split, labels, features["label"].names, str(folder))
    order = _order(np.asarray(ids, bytes))
    return SplitArrays(images[order], labels[order], coarse[order] if spec.coarse_names else None)


def _order(ids):
    """Return where each example lies by its number: train_99999 comes before train_100000.

    Without ids (all b""), the order that is there.
    """
    return np.lexsort((ids, np.char.str_len(ids)))


def _records(builder, split):
    """Yield the serialised examples of one split, bytes each."""
    file_format = builder.info.file_format.value
    if file_format == "tfrecord":
        for path in builder.info.splits[split].filepaths:
            yield from _tfrecords(os.fspath(path))
        return
    if file_format != "array_record":
        raise DataError(
            f"{builder.data_dir}: is in format {file_format!r}, expected array_record or tfrecord; "
            f"run: python scripts/prepare_data.py --dataset {builder.name} --data_dir ANOTHER"
        )
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split, deserialize_method=raw)
    for start in range(0, len(source), 1000):
        yield from source.__getitems__(range(start, min(start + 1000, len(source))))


def _tfrecords(path):
    """Yield the records of one TFRecord file.

    The format: uint64 length, uint32 checksum of the length, data, uint32 checksum of the data, all
    little endian. The checksums are CRC-32C, slow in Python; the PNG files inside carry their own.
    """
    with open(path, "rb") as file:
        while header := file.read(12):
            if len(header) < 12:
                raise DataError(f"{path}: truncated; delete the folder and prepare it again")
            (length,) = struct.unpack("<Q", header[:8])
            data = file.read(length + 4)
            if len(data) < length + 4:
                raise DataError(f"{path}: truncated; delete the folder and prepare it again")
            yield data[:length]


@contextlib.contextmanager
def _quiet():
    """Silence TFDS's own progress bars, announcements and advice."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()
