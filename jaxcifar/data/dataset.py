"""`load`: a dataset's name to four arrays, and `split_indices`: a seeded train/validation split."""

import dataclasses
import os
import pathlib
import shlex

import numpy as np
from absl import logging

from jaxcifar.data import cache, folders
from jaxcifar.data.specs import DataError, DatasetSpec, get_spec


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Hold a dataset in memory (or memory-mapped): read-only arrays, NHWC.

    train_images uint8 [N, 32, 32, 3], train_labels int32 [N], test_images, test_labels likewise;
    `class_names[i]` names label i.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)


def load(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Load "cifar10", "cifar100" (fine labels) or "shapes32", verified.

    `data_dir` is the TFDS store; None or "" means TFDS's own ($TFDS_DATA_DIR, or
    ~/tensorflow_datasets). The first load decodes the TFDS records (seconds) and leaves a cache of
    uint8 arrays, which later loads map into memory (milliseconds, and without importing
    tensorflow_datasets). shapes32 is drawn and prepared at first use. The examples are in the order
    of the official files (see store.py). Raises DataError, a UserError.
    """
    spec = get_spec(name)
    root = folders.resolve_data_dir(data_dir)
    folder = folders.prepared_folder(spec, root)
    if folder is None and not spec.generated:
        raise DataError(_not_prepared(spec, root, explicit=bool(data_dir)))
    if folder is None:
        from jaxcifar.data import prepare  # imports tensorflow_datasets

        logging.info("drawing %s into %s (once, a few seconds)", name, root)
        folder = prepare.prepare(name, data_dir=root)
    splits = cache.read(spec, folder, root)
    if splits is None:
        from jaxcifar.data import store  # imports tensorflow_datasets

        logging.info("decoding %s (once, a few seconds)", folder)
        splits = store.read(spec, folder)
        cache.write(spec, folder, root, splits)
    train, test = splits["train"], splits["test"]
    for array in (train.images, train.labels, test.images, test.labels):
        array.flags.writeable = False
    return Dataset(name, train.images, train.labels, test.images, test.labels, spec.class_names)


def _not_prepared(spec: DatasetSpec, root: pathlib.Path, explicit: bool) -> str:
    """Return the message that says where the data was looked for and how to prepare it."""
    source = "auto" if spec.archives else "FOLDER (of train/<class>/ and test/<class>/ images)"
    command = f"python scripts/prepare_data.py --dataset {spec.name} --source {source}"
    command += f" --data_dir {shlex.quote(str(root))}" if explicit else ""
    found = folders.find_sources(spec, root)
    hint = f" (it will take {found[0]})" if found else ""
    return (
        f"{spec.name} is not prepared: no {root / spec.name / spec.version}; run: {command}{hint}. "
        "To try without data: python -m jaxcifar.main --config=configs/quickstart.py"
    )


def split_indices(count: int, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split range(count) at random: training indices int32 [count - val_size], validation [val_size].

    Like torch.utils.data.random_split: the first indices of a seeded permutation are for training,
    the others for validation. numpy's RandomState is a frozen stream: the split stays the same in
    every numpy version. Raises DataError unless 0 <= val_size < count.
    """
    if not 0 <= val_size < count:
        raise DataError(f"val_size is {val_size}: expected 0 <= val_size < {count}, all the images")
    permutation = np.random.RandomState(seed).permutation(count).astype(np.int32)
    return permutation[: count - val_size], permutation[count - val_size :]
