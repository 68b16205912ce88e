"""Does a measured number hold the published one? The tolerances, and what became of every number.

Tolerances. Accuracy, of runs of 10 epochs or more: the mean over seeds is at most 1.0 point below
the published value (a range's lower end); of shorter runs, whose accuracy still jumps from epoch to
epoch: at most 5 points, of one or two epochs 10. Better is fine, but where a report says that a
network does not train (10%, guessing): there ours may not be above by more than that either. Loss:
above it by at most 10% or 0.05, of shorter runs 20% or 0.3, whichever is more. Parameters: equal, or
equal once rounded to 0.1 million where the report prints millions. Times are not judged: the
hardware is another.

Exceptions. results/notes.csv lists numbers that may be outside, why, and how far: beyond its own
limit an exception fails as any other number does, and so does one for a number that holds.
"""

import csv
import dataclasses
import math
import pathlib
import re
import statistics
from typing import Any

from jaxcifar.errors import UserError
from jaxcifar.report import parity_rows, published

WITHIN, NOTED, OUTSIDE = "within", "outside, noted", "outside"
NOT_MEASURED, STALE, NEEDS_WEIGHTS, NOT_JUDGED = (
    "not measured", "stale", "needs ImageNet weights", "not judged")
STATUSES = (WITHIN, NOTED, OUTSIDE, NOT_MEASURED, STALE, NEEDS_WEIGHTS, NOT_JUDGED)

_LONG_RUN_EPOCHS = 10
_ACCURACY_POINTS = ((_LONG_RUN_EPOCHS, 1.0), (3, 5.0), (0, 10.0))  # from so many epochs on
_LOSS = {True: (0.10, 0.05), False: (0.20, 0.3)}  # relative, absolute
_GUESSING = 10.0  # percent, of ten classes
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one published number.

    number: published.Row. row: name of its row. status: one of STATUSES. ours: the value per seed,
    a tuple of floats, of one value for what is counted; () where there is none. note: the Note that
    lets it be outside, or None (a number that holds must have none). epochs: of the recipe.
    """

    number: Any
    row: str
    status: str
    ours: tuple = ()
    note: Any = None
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


@dataclasses.dataclass(frozen=True)
class Note:
    """A line of results/notes.csv: why a number may be outside, and the worst value that it may have.

    Of parameters, `worst` is the only count that it may have.
    """

    reason: str
    worst: float


def is_long(number, epochs):
    """Return whether a number comes from 10 epochs or more, so that the narrow tolerance holds.

    number: published.Row. epochs: of the recipe; the number's own epoch, where it has one, counts.
    """
    return (number.epoch or epochs) >= _LONG_RUN_EPOCHS


def limit(number, epochs):
    """Return the worst value that still holds a published number, or None where none is judged.

    number, epochs: see `is_long`. An accuracy's is the lowest, a loss's the highest. Parameters have
    none: see `holds`.
    """
    if number.metric.endswith("_accuracy"):
        trained = number.epoch or epochs
        return number.value - next(p for first, p in _ACCURACY_POINTS if trained >= first)
    if number.metric.endswith("_loss"):
        relative, absolute = _LOSS[is_long(number, epochs)]
        return number.value + max(relative * number.value, absolute)
    return None


def holds(number, ours, epochs):
    """Return whether our value (a mean over seeds) holds a published number; None: not judged."""
    if number.is_count:
        if number.approximate:
            return math.floor(ours / 1e5 + 0.5) == round(number.value / 1e5)
        return ours == number.value
    worst, best = limit(number, epochs), best_limit(number, epochs)
    if best is not None and ours > best + _ROUNDING:
        return False
    return None if worst is None else _reaches(number, ours, worst)


def best_limit(number, epochs):
    """Return the best value that still holds a number, as far above it as `limit` is below, or None.

    None but for an accuracy which says that a network does no better than guessing.
    """
    if number.metric.endswith("_accuracy") and number.value == _GUESSING:
        return 2 * number.value - limit(number, epochs)
    return None


def is_better(verdict):
    """Return whether ours is better than the published value by more than it might be worse."""
    worst = limit(verdict.number, verdict.epochs)
    if worst is None or verdict.difference is None:
        return False
    gain = verdict.difference if worst < verdict.number.value else -verdict.difference
    return gain > abs(worst - verdict.number.value) + _ROUNDING


def _reaches(number, ours, worst):
    """Return whether our value is no worse than `worst`, of parameters whether it is equal."""
    if number.is_count:
        return ours == worst
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
    """Return one line per number that is outside its tolerance, or beyond the limit of its note,
    and per note that a number no longer needs."""
    return [_line(v, _limit_text(v), "a reason and a limit in results/notes.csv would make it a "
                  "known exception") for v in judged if v.status == OUTSIDE] + [
            _line(v, "", "it holds: remove its line in results/notes.csv")
            for v in judged if v.status == WITHIN and v.note]


def _line(v, allowed, what_to_do):
    return (f"{v.row} {v.number.metric}"
            f"{f' after epoch {v.number.epoch}' if v.number.epoch else ''}: {v.mean:,.10g} "
            f"({len(v.ours)} value(s)), published {v.number.value:,.10g}{allowed}; {what_to_do}")


def read_notes(root):
    """Return {(row, metric, epoch or None, source): Note} of root/results/notes.csv.

    These are the listed exceptions. Raises UserError for a line that names no published number, or
    gives no reason or no limit.
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
            reason, worst = (line["reason"] or "").strip(), line["worst"].strip()
            if key not in numbers or key in notes or not reason or not _is_number(worst):
                raise UserError(f"{path}: {key}: every line names one published number (row, "
                                "metric, epoch, source as in published.csv) once, with the worst "
                                "value that it may have (parameters: the only one) and a reason")
            notes[key] = Note(reason, float(worst))
    return notes


def _is_number(text):
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None


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
    if number.is_count:
        ours = (counted[row][number.metric],)
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
    mean = statistics.mean(ours)
    held, note = holds(number, mean, epochs), notes.get(_key(number))
    if held is not False:
        return Verdict(number, row, WITHIN if held else NOT_JUDGED, ours, note, epochs)
    noted = note is not None and _reaches(number, mean, note.worst)
    return Verdict(number, row, NOTED if noted else OUTSIDE, ours, note, epochs)


def _limit_text(verdict):
    worst = verdict.note.worst if verdict.note else limit(verdict.number, verdict.epochs)
    return "" if worst is None else f", worst allowed {worst:,.10g}"


def _key(number):
    return (parity_rows.row_name(number.variant), number.metric, number.epoch, number.source)
