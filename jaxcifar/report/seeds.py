"""What several seeds of one configuration show a person: a table, and curves with a band."""

import numpy as np

from jaxcifar.report import plots

_MOST_COLUMNS = 8  # more seeds than this: their values are in seeds.json only


def table(result):
    """Return the content of seeds.json (`jaxcifar.seeds.summary`) as a table, a str."""
    seeds = result["seeds"] if len(result["seeds"]) <= _MOST_COLUMNS else []
    lines = [["metric", "mean", "std", "n", *(f"seed {seed}" for seed in seeds)]]
    for name, entry in result["metrics"].items():
        digits = 4 if name.endswith("loss") else 1 if name.startswith("epoch") else 2
        numbers = [entry["mean"], entry["std"], *entry["values"][:len(seeds)]]
        texts = ["-" if number is None else f"{number:.{digits}f}" for number in numbers]
        lines.append([name, *texts[:2], str(entry["n"]), *texts[2:]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]),
                                *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))])
                     for line in lines)


def curves(runs, path, *, title):
    """Plot mean loss and accuracy over epochs, with a band of one standard deviation of the seeds.

    runs: for each seed its rows as in metrics.jsonl. Each seed is a thin line; where some of them
    have stopped, the mean of the rest is dashed and has no band. Raises UserError if `path` cannot
    be written. Returns the matplotlib Figure.
    """
    figure = plots.new_figure((11, 4.6))
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, colour in plots.SPLITS:
            values = by_epoch(runs, f"{split}_{metric}")
            if np.isfinite(values).any():
                _band(axes, values, split, colour, "%" if metric == "accuracy" else "")
        axes.set(xlabel="epoch", ylabel="accuracy [%]" if metric == "accuracy" else "loss")
        if metric == "loss":
            axes.set_ylim(bottom=0)
        plots.dress(axes, whole_numbers=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=9, framealpha=0.9,
                        title="mean \u00b1 std, last epoch of all", title_fontsize=8)
    figure.suptitle(title, fontsize=12)
    return plots.save(figure, path)


def by_epoch(runs, key):
    """Return a metric of several runs, float64 [runs, epochs]: NaN where it was not measured."""
    last = max((row["epoch"] for rows in runs for row in rows), default=0)
    values = np.full((len(runs), last), np.nan)
    for own, rows in zip(values, runs, strict=True):
        for row in rows:
            own[row["epoch"] - 1] = np.nan if row.get(key) is None else row[key]
    return values


def _band(axes, values, label, colour, unit):
    """Draw the seeds of one metric, [seeds, epochs], their mean and the band around it."""
    epochs = np.arange(1, values.shape[1] + 1)
    for own in values if len(values) > 1 else ():
        axes.plot(epochs, own, color=colour, linewidth=0.6, alpha=0.45)
    whole = np.isfinite(values).all(axis=0)
    common = int(np.flatnonzero(whole)[-1]) + 1 if whole.any() else 0
    count = np.isfinite(values).sum(axis=0)
    mean = np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
    text = label
    if common:
        text = f"{label} {mean[common - 1]:.{2 if unit else 3}f}{unit}"
    if common and len(values) > 1:
        std = values[:, :common].std(axis=0, ddof=1)
        axes.fill_between(epochs[:common], mean[:common] - std, mean[:common] + std, color=colour,
                          alpha=0.2, linewidth=0)
        text += f" \u00b1 {std[-1]:.{2 if unit else 3}f}"
    axes.plot(epochs[:common], mean[:common], color=colour, linewidth=1.9, label=text,
              marker="o" if len(epochs) <= plots.FEW_EPOCHS else None, markersize=4)
    if common < len(epochs):
        rest = slice(max(common - 1, 0), None)
        axes.plot(epochs[rest], mean[rest], color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
