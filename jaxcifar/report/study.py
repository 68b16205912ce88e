"""What a study shows a person: a table, the best trial as a configuration file, and plots."""

import csv
import io
import textwrap

import numpy as np
from ml_collections import ConfigDict

from jaxcifar import config as config_lib
from jaxcifar import run_folder
from jaxcifar.report import plots

_BLUE, _ORANGE, _GREY = *plots.COLOURS[:2], "#9a9a9a"
_COLUMNS = ("number", "kind", "value", "seconds", "retry_of", "seed", "config_hash", "folder",
            "reason")
_PER_ROW = 4  # slices beside one another


def best(records, direction):
    """Return the record of the best complete trial (see study.Study.records), or None."""
    done = [r for r in records if r["kind"] == "complete"]
    sign = 1 if direction == "minimize" else -1
    return min(done, key=lambda r: sign * r["value"], default=None)


def write(workdir, content):
    """Write study.json and study.csv.

    content: a dict fit for JSON whose "trials" are the records. Raises UserError if they cannot be
    written.
    """
    run_folder.write_json(workdir / "study.json", content)
    names = list(dict.fromkeys(name for r in content["trials"] for name in r["params"]))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*_COLUMNS, "epochs", *names])
    for record in content["trials"]:
        table.writerow([*("" if record[key] is None else record[key] for key in _COLUMNS),
                        len(record["epochs"]), *(record["params"].get(name, "") for name in names)])
    run_folder.write_atomic(workdir / "study.csv", text.getvalue())


def write_plots(workdir, records, search, importances, title):
    """Draw history.png, slices.png and, where `importances` is not empty, importance.png.

    records: of trials. search: search_space.Search. importances: {parameter: share}.
    """
    history(records, search, workdir / "history.png", title=title)
    slices(records, search, workdir / "slices.png", title=title)
    if importances:
        importance(importances, workdir / "importance.png",
                   title=f"{title}: what decides the best trials (PED-ANOVA)")


def history(records, search, path, *, title):
    """Plot the objective of every trial with the best so far, and of every epoch, to a PNG file."""
    figure = plots.new_figure((11, 4.6))
    left, right = figure.subplots(1, 2)
    done = [r for r in records if r["kind"] == "complete"]
    if done:
        values = np.array([r["value"] for r in done])
        so_far = (np.minimum if search.direction == "minimize" else np.maximum).accumulate(values)
        left.plot([r["number"] for r in done], values, "o", color=_BLUE, label="complete")
        left.step([r["number"] for r in done], so_far, where="post", color=_BLUE, linewidth=1.2,
                  label=f"best so far {so_far[-1]:.4g}")
    cut = [r for r in records if r["kind"] == "pruned" and r["epochs"]]
    if cut:
        left.plot([r["number"] for r in cut], [list(r["epochs"].values())[-1] for r in cut], "x",
                  color=_GREY, label="pruned, its last epoch")
    others = [r["number"] for r in records
              if r["kind"] not in ("complete", "pruned", "running", "waiting")]
    if others:
        left.plot(others, [0.02] * len(others), "|", markersize=12, color=_ORANGE,
                  label="no value", transform=left.get_xaxis_transform())
    left.set(xlabel="trial", ylabel=search.objective)
    _epochs(right, records, best(records, search.direction))
    right.set(xlabel="epoch", ylabel=search.objective)
    for axes in (left, right):
        plots.dress(axes, whole_numbers=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9, framealpha=0.9)
    figure.suptitle(title, fontsize=12)
    return plots.save(figure, path)


def _epochs(axes, records, winner):
    """Draw the objective of every trial over its epochs; complete ones blue, others grey."""
    for record in (r for r in records if r["epochs"]):
        chosen = winner is not None and record["number"] == winner["number"]
        axes.plot(list(record["epochs"]), list(record["epochs"].values()), marker="o",
                  markersize=4 if chosen else 2.5, linewidth=2.2 if chosen else 0.9,
                  zorder=3 if chosen else 2, alpha=1 if chosen else 0.7,
                  color=_ORANGE if chosen else _BLUE if record["kind"] == "complete" else _GREY,
                  label=f"trial {record['number']}, the best" if chosen else None)


def slices(records, search, path, *, title):
    """Plot the objective against each parameter, complete trials only, to a PNG file."""
    done = [r for r in records if r["kind"] == "complete"]
    names = list(search.space)
    rows = -(-len(names) // _PER_ROW)
    columns = min(len(names), _PER_ROW)
    figure = plots.new_figure((2.9 * columns + 0.8, 2.5 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    winner = best(records, search.direction)
    for index, axes in enumerate(grid.flat):
        if index >= len(names):
            axes.set_axis_off()
            continue
        domain = search.space[names[index]]
        labels = list(getattr(domain, "values", ()))
        places = [labels.index(r["params"][names[index]]) if labels else r["params"][names[index]]
                  for r in done]
        # Later trials are darker; the points of one choice lie beside one another.
        spread = 0.3 * (np.arange(len(done)) / max(len(done) - 1, 1) - 0.5) if labels else 0
        axes.scatter(np.asarray(places, float) + spread, [r["value"] for r in done],
                     c=[r["number"] for r in done], cmap="Blues", vmin=-0.7 * (len(records) + 1),
                     s=26, edgecolors=[_ORANGE if r is winner else "white" for r in done],
                     linewidths=[2 if r is winner else 0.5 for r in done])
        if labels:
            axes.set_xticks(range(len(labels)), labels, fontsize=9)
            axes.set_xlim(-0.6, len(labels) - 0.4)
        elif domain.log:
            axes.set_xscale("log")
            plots.few_ticks(axes.xaxis)
        axes.set_xlabel(names[index])
        axes.set_ylabel(search.objective if index % columns == 0 else "")
        plots.dress(axes)
    text = f"{title}: complete trials, later ones darker, the best ringed"
    figure.suptitle(textwrap.fill(text, 36 * columns), fontsize=12)
    return plots.save(figure, path)


def importance(shares, path, *, title):
    """Draw {parameter: share} as bars, the largest on top, to a PNG file."""
    figure = plots.new_figure((8, 0.36 * len(shares) + 1.4))
    axes = figure.add_subplot()
    names = sorted(shares, key=shares.get)
    bars = axes.barh(names, [100 * shares[name] for name in names], color=_BLUE)
    axes.bar_label(bars, fmt="%.0f%%", padding=3, fontsize=9)
    axes.set(xlabel="share [%]")
    axes.margins(x=0.1)
    plots.dress(axes)
    figure.suptitle(title, fontsize=12)
    return plots.save(figure, path)


def config_source(config, doc):
    """Return a configuration file, str, that stands alone and whose get_config() returns `config`.

    doc: its docstring. Fields at their default are left out.
    """
    lines = [f'"""{doc}\n"""', "", "from jaxcifar import config as config_lib", "", "",
             "def get_config():", '    """Return the configuration."""',
             "    config = config_lib.default()",
             *_changes(config.copy_and_resolve_references(), config_lib.default(), "config"),
             "    return config"]
    return "\n".join(lines) + "\n"


def _changes(config, declared, name):
    for key, value in config.items():
        if name == "config" and key == "model":
            options = value.to_dict()
            entries = [repr(options.pop("name")), *(f"{k}={v!r}" for k, v in options.items())]
            yield from textwrap.wrap(
                f"config.model = config_lib.model({', '.join(entries)})", 100,
                initial_indent=" " * 4, subsequent_indent=" " * 36, break_long_words=False,
                break_on_hyphens=False)
        elif isinstance(value, ConfigDict):
            yield from _changes(value, declared[key], f"{name}.{key}")
        elif value != declared[key]:
            yield f"    {name}.{key} = {value!r}"
