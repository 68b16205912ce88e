"""What the reports published, packaged with the code: every number (published.csv), and curves."""

import csv
import dataclasses
import functools
import importlib.resources

from jaxcifar.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Row:
    """One published number.

    report: name of the report, and of its file in configs/; "peers": other codebases. table: of the
    report. variant: the configuration that reproduces it, as --config takes it; "" where needs is
    "peer". metric: train_loss, train_accuracy (percent), test_loss, test_accuracy, val_accuracy,
    kaggle_accuracy (of the 10,000 test images), params, imagenet_params (with a last layer of 1,000
    classes), minutes, seconds_per_epoch, seconds or pflops. epoch: after which it was measured,
    from 1; None where `measured` or the report decides.
    value: the number, or the lower end of a range. upper: its upper end, else None. approximate:
    printed as "about", as a range or rounded to millions. measured: last, best_val_loss,
    best_val_accuracy or best_test_accuracy as config.selection, else counted, clock or stated (by
    the authors, without more). source: report, log (the authors') or recount (of the network that
    is built here, where the report's count is rounded or fits nothing). needs: what the package
    still lacks to reproduce it, "peer", else "". note: what a reader should know.
    """

    report: str
    table: str
    variant: str
    metric: str
    epoch: int | None
    value: float
    upper: float | None
    approximate: bool
    measured: str
    source: str
    needs: str
    note: str

    @property
    def is_count(self):
        """Whether this is a number of parameters, which needs no run."""
        return self.metric in ("params", "imagenet_params")


def rows(report="", *, variant="", metric=""):
    """Return the published numbers, a list of Row in the reports' order.

    report, variant, metric: keep only the rows with these values; "" keeps all. Raises UserError
    for an unknown report.
    """
    everything = _read()
    reports = list(dict.fromkeys(row.report for row in everything))
    if report and report not in reports:
        raise UserError(unknown("report", report, reports))
    wanted = {"report": report, "variant": variant, "metric": metric}
    return [row for row in everything
            if all(not value or getattr(row, key) == value for key, value in wanted.items())]


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


@functools.cache
def _read():
    path = importlib.resources.files("jaxcifar.report") / "published.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(_row(fields) for fields in csv.DictReader(file))


def _row(fields):
    return Row(**fields | {
        "epoch": int(fields["epoch"]) if fields["epoch"] else None,
        "value": float(fields["value"]),
        "upper": float(fields["upper"]) if fields["upper"] else None,
        "approximate": fields["approximate"] == "yes"})


def _folder():
    return importlib.resources.files("jaxcifar.report") / "curves"
