"""Does a measured number hold the published one? The tolerances, and what became of every number.

Tolerances. Accuracy, of runs of 10 epochs or more: the mean over seeds is at most 1.0 point below
the published value (a range's lower end); of shorter runs: at most 10 points, since their accuracy
still jumps from epoch to epoch. Better is always fine. Loss: above it by at most 10% or 0.05, of
shorter runs 20% or 0.3, whichever is more. Parameters: equal, or equal once rounded to 0.1 million
where the report prints millions. Times are not judged: the hardware is another.
"""

import csv
import dataclasses
import math
import pathlib
import statistics
from typing import Any

from jaxcifar.errors import UserError
from jaxcifar.report import parity_rows, published

WITHIN, EXPLAINED, OUTSIDE = "within", "outside, explained", "outside"
NOT_MEASURED, STALE, NEEDS_WEIGHTS, NOT_JUDGED = (
    "not measured", "stale", "needs ImageNet weights", "not judged")
STATUSES = (WITHIN, EXPLAINED, OUTSIDE, NOT_MEASURED, STALE, NEEDS_WEIGHTS, NOT_JUDGED)

_LONG_RUN_EPOCHS = 10
_ACCURACY_POINTS = {True: 1.0, False: 10.0}  # long run, short run
_LOSS = {True: (0.10, 0.05), False: (0.20, 0.3)}  # relative, absolute
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one published number.

    number: published.Row. row: name of its row. status: one of STATUSES. ours: the value per seed,
    a tuple of floats, of one value for what is counted; () where there is none. reason: why it is
    outside, from the notes; "" where no note says. epochs: of the recipe.
    """

    number: Any
    row: str
    status: str
    ours: tuple = ()
    reason: str = ""
    epochs: int = 0

    @property
    def mean(self):
        """Mean over the seeds, or None."""
        return statistics.mean(self.ours) if self.ours else None

    @property
    def std(self):
        """Standard deviation over the seeds (n - 1), or None for fewer than two."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else None

    @property
    def difference(self):
        """Mean less the published value; 0 inside a published range, else to its nearer end."""
        if self.mean is None:
            return None
        upper = self.number.value if self.number.upper is None else self.number.upper
        if self.number.value <= self.mean <= upper:
            return 0.0
        return self.mean - (upper if self.mean > upper else self.number.value)


def limit(number, epochs):
    """Return the worst value that still holds a published number, or None where none is judged.

    number: published.Row. epochs: of the recipe; the number's own epoch, where it has one, counts.
    An accuracy's is the lowest, a loss's the highest. Parameters have none: see `holds`.
    """
    long_run = (number.epoch or epochs) >= _LONG_RUN_EPOCHS
    if number.metric.endswith("_accuracy"):
        return number.value - _ACCURACY_POINTS[long_run]
    if number.metric.endswith("_loss"):
        relative, absolute = _LOSS[long_run]
        return number.value + max(relative * number.value, absolute)
    return None


def holds(number, ours, epochs):
    """Return whether our value (a mean over seeds) holds a published number; None: not judged."""
    if number.metric == "params":
        if number.approximate:
            return math.floor(ours / 1e5 + 0.5) == round(number.value / 1e5)
        return ours == number.value
    worst = limit(number, epochs)
    if worst is None:
        return None
    if not math.isfinite(ours):
        return False
    if number.metric.endswith("_loss"):
        return ours <= worst + _ROUNDING
    return ours >= worst - _ROUNDING


def verdicts(known, counted, results, notes):
    """Return a Verdict for every published number of the reports, in their order.

    known: {name: Recipe}. counted: see parity_rows.counts. results: see parity_results.read. notes:
    see `read_notes`.
    """
    return [_verdict(number, known, counted, results, notes)
            for number in published.rows() if number.needs != "peer"]


def failures(judged):
    """Return one line per number that is outside its tolerance without a note that says why."""
    return [f"{v.row} {v.number.metric}"
            f"{f' after epoch {v.number.epoch}' if v.number.epoch else ''}: {v.mean:,.10g} "
            f"({len(v.ours)} value(s)), published {v.number.value:,.10g}{_limit_text(v)}; a reason "
            "in results/notes.csv would make it a known exception"
            for v in judged if v.status == OUTSIDE]


def read_notes(root):
    """Return {(row, metric, epoch or None, source): reason} of root/results/notes.csv.

    These are the listed exceptions: numbers that may be outside their tolerance, and why. Raises
    UserError for a line that gives no reason or names no published number.
    """
    path = pathlib.Path(root, "results", "notes.csv")
    if not path.is_file():
        return {}
    numbers = {_key(number) for number in published.rows() if number.needs != "peer"}
    notes = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            key = (line["row"], line["metric"], int(line["epoch"]) if line["epoch"] else None,
                   line["source"])
            if key not in numbers or key in notes or not (line["reason"] or "").strip():
                raise UserError(f"{path}: {key}: every line names one published number (row, "
                                "metric, epoch, source as in published.csv) once, with a reason")
            notes[key] = line["reason"].strip()
    return notes


def value_of(number, record):
    """Return a seed's value of what a published number measures, or None if it was not measured."""
    metric = number.metric.replace("kaggle_", "test_")  # the same 10,000 images
    if metric == "minutes":
        return record["seconds"] and record["seconds"] / 60
    if metric == "seconds_per_epoch":
        return record["seconds_per_epoch"]
    if number.epoch:
        curve = record["curves"].get(metric, ())
        return curve[number.epoch - 1] if number.epoch <= len(curve) else None
    return record["values"].get(metric)


def _verdict(number, known, counted, results, notes):
    row = parity_rows.row_name(number.variant)
    if row not in known:
        return Verdict(number, row, NEEDS_WEIGHTS if number.needs == "finetune" else NOT_MEASURED)
    recipe, content = known[row], results.get(row)
    epochs = recipe.config.epochs
    if number.metric == "params":
        ours = (counted[row]["params"],)
    elif content is None:
        status = NEEDS_WEIGHTS if recipe.needs_weights else NOT_MEASURED
        return Verdict(number, row, status, epochs=epochs)
    elif content["config_hash"] != recipe.hash:
        return Verdict(number, row, STALE, epochs=epochs)
    else:
        values = [value_of(number, record) for record in content["seeds"].values()]
        if any(value is None for value in values) or not values:
            return Verdict(number, row, NOT_MEASURED, epochs=epochs)
        ours = tuple(values)
    held = holds(number, statistics.mean(ours), epochs)
    reason = notes.get(_key(number), "")
    status = {None: NOT_JUDGED, True: WITHIN, False: EXPLAINED if reason else OUTSIDE}[held]
    return Verdict(number, row, status, ours, reason if held is False else "", epochs)


def _limit_text(verdict):
    worst = limit(verdict.number, verdict.epochs)
    return "" if worst is None else f", worst allowed {worst:,.6g}"


def _key(number):
    return (parity_rows.row_name(number.variant), number.metric, number.epoch, number.source)
