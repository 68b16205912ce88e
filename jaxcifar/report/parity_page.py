"""docs/parity.md: every published number beside ours, made of results/ alone."""

import pathlib
import statistics

from jaxcifar.report import parity_claims, parity_figures, parity_judge, parity_results, parity_rows
from jaxcifar.run_folder import write_atomic

_TITLES = {
    "googlenet": "GoogLeNet's variants (CIFAR-10, \"Deep Learning Mini-Project - Fall 2022\")",
    "resnet5m": "ResNets under 5 million parameters (CIFAR-10, \"Deep Learning Mini Project\")",
    "cifar100": "Networks on CIFAR-100 (\"Report Homework 3 - Deep Learning\")",
    "se_resnet": "SE bottlenecks in DLA trees (CIFAR-10, \"Team DLEnthusiasts\")",
    "architectures": "MLP, CNN and ViT (CIFAR-10, \"Deep Learning 2023 - Project I report\")",
}
_METRICS = {"params": "parameters", "imagenet_params": "parameters with ImageNet's 1,000 classes",
            "kaggle_accuracy": "Kaggle accuracy (ours: test)",
            "minutes": "minutes for the run", "seconds_per_epoch": "seconds per epoch"}
_MEASURED = {
    "last": "last epoch", "best_val_loss": "epoch of the lowest validation loss",
    "best_val_accuracy": "epoch of the best validation accuracy",
    "best_test_accuracy": "epoch of the best test accuracy"}
_SOURCES = {"report": "", "log": ", by the authors' log",
            "recount": ", recounted"}
_SEEDS = 3  # that make a mean
_APART = 5.0  # deviation above which a mean says little: some seeds train, some do not
_MARKS = {parity_judge.WITHIN: "yes", parity_judge.NOTED: "no: see below",
          parity_judge.OUTSIDE: "**NO**", parity_judge.STALE: "stale",
          parity_judge.NOT_JUDGED: "not judged"}

_INTRODUCTION = """\
# Parity with the published numbers

Every number of the five reports, and what this code gives for it. Made from `results/` (one file
per row: every seed's values and curves, configuration hash, commit, versions, device, seconds) by
`python scripts/parity.py --report-only`; nothing here is written by hand, but for the reasons in
`results/notes.csv`.

- **Ours** is the mean over seeds +- the standard deviation (n - 1), then the number of seeds, and
  their values where the deviation is above 5. A parameter count is that of the network which the
  configuration builds; it needs no run.
- **Limit** is the worst value that holds, by the number of epochs, since the accuracy of a short run
  still jumps from one to the next:

  | epochs | accuracy: points below the published value, a range's lower end | loss: above it, the more of |
  | --- | ---: | ---: |
  | 10 or more | 1.0 | 10% or 0.05 |
  | 3 to 9 | 5.0 | 20% or 0.3 |
  | 1 or 2 | 10.0 | 20% or 0.3 |

  Parameters have to be equal, or equal when rounded to 0.1 million where the report prints millions.
  Better is fine, but where the report's point is that a network does not train (10%, guessing): there
  above counts as below. **Difference**: ours less the published value, 0 inside a published range,
  beyond one to its nearer end. Times are shown and not judged: the hardware is another.
- **about**: the report gives the number only roughly, in its text or in a figure.
- Kaggle accuracy is that of the 10,000 images that are scored, which are the test set: ours is
  measured there.
- **recounted**: of the network that is built here, where the report's count is rounded or fits
  nothing; the summary leaves these out. **Outside, noted**: worse than the limit, with the reason and
  a limit of its own in `results/notes.csv`, which a test enforces; the lines below a table begin with
  "outside". The other lines there are remarks on what the report prints.
- **Better by more**: of the numbers that hold, those better than the published value by more than the
  table above allows below it. They are no copies of the report's result, but no worse.
- **Needs ImageNet weights**: torchvision's, which this repository does not contain. With a network
  the row's command fetches them (reading them takes PyTorch); without one, put the files that it
  names from https://download.pytorch.org/models/ into `~/.cache/torch/hub/checkpoints` first. These
  rows are `cifar100/finetune*` and `architectures/finetune/*`:
  `python scripts/parity.py --rows='cifar100/finetune*,architectures/finetune/*'`.
- The configuration hash in `results/` is that of seed 0. A result whose configuration has changed
  since is **stale**, and a test fails.
- The last column: for a measured row the command that trains its seeds again and prints mean and
  deviation; for another the one that measures it with seeds 0, 1 and 2 (`--seeds=0` for one) and
  enters it here. `python scripts/parity.py --rows=ROW` adds the seeds that a row lacks.
"""


def write(root, say=print):
    """Write root/docs/parity.md and docs/figures/; return the numbers that fail, a list of lines.

    Raises UserError if a result or a note cannot be read, or a file cannot be written.
    """
    root = pathlib.Path(root)
    known, counted, results, judged = gather(root)
    (root / "docs").mkdir(exist_ok=True)
    drawn = parity_figures.write(root / "docs" / "figures",
                                  parity_results.fresh(results, known))
    write_atomic(root / "docs" / "parity.md", page(known, results, judged))
    say("wrote docs/parity.md" + (f" and drew {', '.join(drawn)}" if drawn else ""))
    return [*parity_results.stale(results, known), *parity_judge.failures(judged)]


def gather(root):
    """Return (recipes, counts, results, verdicts) of a repository's root."""
    known = parity_rows.recipes(root)
    counted, results = parity_rows.counts(root, known), parity_results.read(root)
    notes = parity_judge.read_notes(root)
    return known, counted, results, parity_judge.verdicts(known, counted, results, notes)


def page(known, results, judged):
    """Return the text of docs/parity.md.

    known: {name: Recipe}. results: see parity_results.read. judged: list of Verdict.
    """
    current = parity_results.fresh(results, known)
    lines = [_INTRODUCTION, "## Summary", "", *_summary(judged), ""]
    for report in parity_rows.reports():
        of_report = [v for v in judged if v.number.report == report]
        lines += [f"## {_TITLES[report]}", ""]
        for table in dict.fromkeys(v.number.table for v in of_report):
            lines += [f"### {report}: {table.replace('_', ' ')}", "",
                      *_table([v for v in of_report if v.number.table == table], known, current),
                      ""]
        lines += [*_claims(report, current), *_figures(report, current)]
    return "\n".join([*lines, *_unpublished(known, current), *_runs(results)]).rstrip() + "\n"


def _summary(judged):
    """The table at the top: a line per report, and their sum."""
    lines = ["| report | printed parameter counts that hold | other numbers | hold, of those measured "
             "in 10 epochs or more | hold, of those measured in fewer, with wide limits | of all these "
             "better by more | of all these with three seeds or more | outside, noted | outside | not "
             "measured | need ImageNet weights | times, not judged |",
             "| --- " + "| ---: " * 11 + "|"]
    for report in (*parity_rows.reports(), "all"):
        of_report = [v for v in judged if report in (v.number.report, "all")]
        counts = [v for v in of_report if v.number.is_count
                  and v.number.source != "recount" and v.status != parity_judge.NEEDS_WEIGHTS]
        times = [v for v in of_report if _is_time(v)]
        others = [v for v in of_report if not v.number.is_count and not _is_time(v)]
        number = {status: sum(v.status == status for v in others)
                  for status in parity_judge.STATUSES}
        cells = (_held(counts), len(others), _held(others, long=True), _held(others, long=False),
                 sum(v.status == parity_judge.WITHIN and parity_judge.is_better(v)
                     for v in others), sum(len(v.ours) >= _SEEDS for v in others),
                 number[parity_judge.NOTED], number[parity_judge.OUTSIDE],
                 number[parity_judge.NOT_MEASURED] + number[parity_judge.STALE],
                 number[parity_judge.NEEDS_WEIGHTS], len(times))
        lines.append(f"| {report} | {' | '.join(map(str, cells))} |")
    return lines


def _held(judged, long=None):
    """Return "HELD of MEASURED", of long or of short runs where `long` says so."""
    measured = [v.status == parity_judge.WITHIN for v in judged if v.status in (
        parity_judge.WITHIN, parity_judge.NOTED, parity_judge.OUTSIDE)
        and long in (None, parity_judge.is_long(v.number, v.epochs))]
    return f"{sum(measured)} of {len(measured)}"


def _table(judged, known, results):
    """One table of a report, and the reasons and remarks on its numbers."""
    lines = ["| row | number | published | limit | ours | difference | holds | run again |",
             "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |"]
    remarks, shown = {}, None
    order = list(dict.fromkeys(v.row for v in judged))
    for v in sorted(judged, key=lambda v: order.index(v.row)):
        new = v.row != shown
        shown = v.row
        name = v.row.partition("/")[2]
        lines.append("| " + " | ".join((
            f"`{name}`" if new else "", _number(v.number), published_text(v.number),
            _limit(v), ours_text(v), _difference(v), _MARKS.get(v.status, v.status),
            _command(v.row, known, results) if new and v.row in known
            and known[v.row].needs_run else "")) + " |")
        known_to_all = v.number.source == "recount" or v.number.metric == "kaggle_accuracy"
        note = "" if known_to_all else v.number.note  # the page's beginning says it
        outside = f"outside: {v.note.reason}" if v.note and v.status != parity_judge.WITHIN else ""
        remark = "; ".join(text for text in (outside, note) if text)
        if remark:
            remarks.setdefault(remark, {})[f"`{name}`"] = True
    return [*lines, *([""] if remarks else []),
            *(f"- {', '.join(names)}: {remark}." for remark, names in remarks.items())]


def _number(number):
    plain = number.metric.replace("_", " ").replace("val ", "validation ")
    name = _METRICS.get(number.metric, plain)
    if number.measured == f"best_{number.metric}":
        return f"best {name}{', the test set had a say' * name.startswith('test')}"
    if number.is_count or number.measured == "clock":
        return name + _SOURCES[number.source]
    when = f"epoch {number.epoch}" if number.epoch else _MEASURED[number.measured]
    return f"{name}, {when}{_SOURCES[number.source]}"


def published_text(number):
    """Return a published value as the page shows it."""
    if number.is_count:
        text = f"{number.value / 1e6:.1f} M" if number.approximate else f"{number.value:,.0f}"
        return text
    if number.upper is not None:
        return f"{number.value:g}-{number.upper:g}"
    return f"about {number.value:g}" if number.approximate else f"{number.value:g}"


def ours_text(verdict):
    """Return our values as the page shows them: mean, deviation and number of seeds, "" without any."""
    if verdict.mean is None:
        return ""
    if verdict.number.is_count:
        return f"{verdict.mean:,.0f}"
    return _mean(verdict.ours, _digits(verdict.number))


def _mean(values, digits):
    """Return "mean +- deviation (number of seeds)", where they lie far apart the seeds themselves."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1)"
    text = f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"
    apart = statistics.stdev(values) > _APART
    seeds = ": " + ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{text} ({len(values)}{seeds * apart})"


def _difference(verdict):
    if verdict.difference is None or verdict.status == parity_judge.NOT_JUDGED:
        return ""
    if verdict.number.is_count:
        if verdict.number.approximate and verdict.status == parity_judge.WITHIN:
            return "0"
        return f"{verdict.difference:+,.0f}" if verdict.difference else "0"
    return f"{verdict.difference:+.{_digits(verdict.number)}f}"


def _digits(number):
    return 3 if number.metric.endswith("_loss") else 1 if _is_clock(number) else 2


def _is_clock(number):
    return number.measured == "clock"


def _is_time(verdict):
    return _is_clock(verdict.number)


def _command(row, known, results):
    """Return the command that trains a measured row's seeds again, or measures another row."""
    if row in results:
        seeds = ",".join(results[row]["seeds"])
        return f"`python -m jaxcifar.main --config={known[row].spec} --seeds={seeds}`"
    return f"`python scripts/parity.py --rows='{row}'`"


def _limit(verdict):
    """Return the limits between which a value holds, "" where none is judged or it must be equal."""
    limits = [judge(verdict.number, verdict.epochs)
              for judge in (parity_judge.limit, parity_judge.best_limit)]
    return "-".join(f"{value:.{_digits(verdict.number)}f}" for value in limits if value is not None)


def _claims(report, results):
    """What a report says of its networks in words, beside the rows that it speaks of."""
    found = parity_claims.compared(report, results)
    if not found:
        return []
    lines = [f"### {report}: what it concludes", "",
             "Our accuracies are those of each run's last epoch, by the report's early stopping.", "",
             "| the report | measured here | train accuracy | validation accuracy |",
             "| --- | --- | ---: | ---: |"]
    for claim, compared in found:
        for number, (label, values) in enumerate(compared):
            cells = (_mean(values[metric], 2) for metric in parity_claims.METRICS)
            lines.append(f"| {'' if number else claim.text} | {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _figures(report, results):
    lines = []
    for figure in parity_figures.FIGURES:
        if figure.report != report:
            continue
        panels, missing = parity_figures.measured(figure, results)
        if not panels:
            lines += [f"Figure \"{figure.title}\": nothing of it is measured yet.", ""]
            continue
        curves = "curve is" if missing == 1 else "curves are"
        left = f" {missing} more {curves} not measured yet." if missing else ""
        lines += [f"![{figure.title}](figures/{figure.name}.png)", "",
                  f"{figure.title}: mean, and where there are several seeds a thin line for each and "
                  "a band of one standard deviation, as far as every seed went. The mean in the "
                  f"legend is that of the last epoch; a table may take the best one.{left}", ""]
    return lines


def _unpublished(known, results):
    """Rows that were measured and have no published number."""
    lines = []
    for name, content in results.items():
        if known[name].needs_run:
            continue
        cells = [_mean_of(content, metric) for metric in ("val_accuracy", "test_accuracy")]
        lines.append(f"| `{name}` | {' | '.join(cells)} | "
                     f"{_command(name, known, results)} |")
    if not lines:
        return []
    return ["## Measured, without a published number", "",
            "| row | validation accuracy | test accuracy | run again |",
            "| --- | ---: | ---: | --- |", *lines, ""]


def _mean_of(content, metric):
    values = [record["values"][metric] for record in content["seeds"].values()
              if metric in record["values"]]
    return _mean(values, 2) if values else ""


def _runs(results):
    """Where and with what each row was measured."""
    lines = ["## Where it was measured", ""]
    if not results:
        return [*lines, "Nothing was measured yet.", ""]
    lines += ["Epochs: of each seed, where they differ. Minutes: compilation and epochs of one run, on "
              "average; other work may have shared the machine. A + after the commit: tracked files "
              "differed from it.", "",
              "| row | seeds | epochs | minutes | device | JAX | commit |",
              "| --- | --- | --- | ---: | --- | --- | --- |"]
    for name, content in results.items():
        records = content["seeds"].values()
        seconds = [record["seconds"] for record in records if record["seconds"]]
        minutes = f"{statistics.mean(seconds) / 60:.1f}" if seconds else ""
        lines.append("| " + " | ".join((
            f"`{name}`", ", ".join(content["seeds"]), _epochs(records),
            minutes, _each(map(_device, records)),
            _each(r["versions"]["jax"] for r in records), _each(map(_commit, records)))) + " |")
    return [*lines, ""]


def _epochs(records):
    """Return the seeds' numbers of epochs, one where all are the same."""
    epochs = [str(record["epochs"]) for record in records]
    return epochs[0] if len(set(epochs)) == 1 else ", ".join(epochs)


def _each(values):
    return ", ".join(dict.fromkeys(map(str, values)))


def _device(record):
    device = record["device"]
    if device["platform"] == "cpu":
        cores = device["host_cores"]
        return f"{cores} core{'s' * (cores > 1)} of {device['host']}"
    return f"{device['count']} x {device['kind']}"


def _commit(record):
    """Return the commits that a seed was trained at, a resumed one's in the order of its starts."""
    commits = [*record.get("earlier_commits", ()), record["commit"]]
    names = _each(commit[:8] if commit else "unknown" for commit in commits)
    return names + "+" * bool(record["dirty"])
