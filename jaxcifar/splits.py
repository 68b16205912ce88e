"""A run's data: the training examples, and the held-out ones with the spans of their splits."""

import dataclasses

import numpy as np

from jaxcifar import data


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A run's data on the host.

    train, held_out: {"images": uint8 [n, 32, 32, 3], "labels": int32 [n]}. spans: where the held-out
    splits lie, {"val": (first, stop), "test": (first, stop)}. class_names: one string per class.
    """

    train: dict
    held_out: dict
    spans: dict
    class_names: tuple

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
        class_names=tuple(dataset.class_names))


def measured(config):
    """Return the names of the held-out splits that are measured after every epoch."""
    return (["val"] if config.val_size else []) + (["test"] if config.test_every_epoch else [])
