"""The curves that the reports published, packaged with the code."""

import csv
import importlib.resources

from jaxcifar.errors import UserError, unknown


def curve_names():
    """Return the names of the packaged curves, sorted."""
    return sorted(entry.name.removesuffix(".csv") for entry in _folder().iterdir()
                  if entry.name.endswith(".csv"))


def reported_curve(name):
    """Return a published curve, for instance "resnet5m_model1", as a list of one dict per epoch.

    Keys: epoch (int), epoch_seconds, train_loss, train_accuracy (percent), val_loss, val_accuracy.
    Raises UserError for an unknown name. Source: the training logs that the reports' authors
    published.
    """
    names = curve_names()
    if name not in names:
        raise UserError(unknown("published curve", name, names))
    with (_folder() / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [{key: int(value) if key == "epoch" else float(value) for key, value in row.items()}
                for row in csv.DictReader(file)]


def _folder():
    return importlib.resources.files("jaxcifar.report") / "curves"
