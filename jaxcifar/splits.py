"""A run's data: the training examples, and the held-out ones with the spans of their splits."""

import dataclasses
import json
import pathlib
import zlib

import numpy as np

from jaxcifar import data, run_folder
from jaxcifar.errors import UserError

_FILE = "data.json"  # in a run folder


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A run's data on the host.

    train, held_out: {"images": uint8 [n, 32, 32, 3], "labels": int32 [n]}. spans: where the held-out
    splits lie, {"val": (first, stop), "test": (first, stop)}. class_names: one string per class.
    digest: of the training set in its order, 8 hexadecimal digits: the split is one of positions.
    """

    train: dict
    held_out: dict
    spans: dict
    class_names: tuple
    digest: str = ""

    @property
    def num_classes(self):
        """Number of classes."""
        return len(self.class_names)


def load(config):
    """Load the configured dataset and split its training set at random.

    Returns:
      Arrays. Validation and test lie in one array, so that one program evaluates both.

    Raises:
      UserError: the dataset is not prepared, or config.val_size leaves nothing to train on.
    """
    dataset = data.load(config.dataset, config.data_dir or None)
    train, val = data.split_indices(len(dataset.train_labels), config.val_size, config.split_seed)
    count = len(val), len(dataset.test_labels)
    return Arrays(
        train={"images": np.ascontiguousarray(dataset.train_images[train]),
               "labels": np.ascontiguousarray(dataset.train_labels[train])},
        held_out={"images": np.concatenate([dataset.train_images[val], dataset.test_images]),
                  "labels": np.concatenate([dataset.train_labels[val], dataset.test_labels])},
        spans={"val": (0, count[0]), "test": (count[0], sum(count))},
        class_names=tuple(dataset.class_names),
        digest=_digest(dataset.train_images, dataset.train_labels))


def _digest(images, labels):
    """Return a checksum of all labels and one image in a hundred, in their order."""
    total = zlib.crc32(np.ascontiguousarray(labels, np.int32).tobytes())
    return f"{zlib.crc32(np.ascontiguousarray(images[::100]).tobytes(), total):08x}"


def write_digest(digest, workdir):
    """Note in a run folder on which training set, in which order, the run trains."""
    run_folder.write_json(pathlib.Path(workdir) / _FILE, {"train_crc32": digest})


def refuse_other_data(digest, workdir):
    """Check that `digest` is that of the training set that a run folder names, where both are known.

    Raises UserError: the data set has other images, or was prepared from another source, in another
    order. Then what was trained on would become validation.
    """
    path = pathlib.Path(workdir) / _FILE
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["train_crc32"]
    except FileNotFoundError:  # the run is older than this file
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): put it back, or remove it if the data set "
                        "is the one that the run was trained on") from error
    if digest and there != digest:
        raise UserError(f"{workdir} was trained on this data set in another order (prepared from "
                        "another source) or with other images, by which its training images would "
                        "now be validation images: give the folder it was trained from, by "
                        "config.data_dir or TFDS_DATA_DIR")


def measured(config):
    """Return the names of the held-out splits that are measured after every epoch."""
    return (["val"] if config.val_size else []) + (["test"] if config.test_every_epoch else [])
