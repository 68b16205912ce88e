"""The figure: how many times PyTorch's speed, per work."""

from jaxcifar.benchmark import table
from jaxcifar.report import plots

_COLOURS = {"torch_eager": plots.COLOURS[5], "torch_best": plots.COLOURS[1]}
_LABELS = {"torch_eager": "PyTorch eager", "torch_best": "PyTorch at its best"}


def bars(rows, path, *, title):
    """Draw the ratios of our rows to the PNG file `path`, on a logarithmic scale, 1 = as fast.

    rows: as table.rows returns them. Returns the matplotlib Figure; UserError if `path` cannot be
    written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter
    rows = [row for row in rows if row.get("ratio")]
    figure = Figure(figsize=(9, 1.6 + 0.42 * max(len(rows), 1)), dpi=140, layout="constrained",
                    facecolor="white")
    axes = figure.subplots()
    names = [row["work"] + (" (bf16)" if row["contender"].endswith("bf16") else "")
             for row in rows]
    others = [other for other in table.THEIRS if any(other in row["ratio"] for row in rows)]
    for number, other in enumerate(others):
        place = 0.2 * (len(others) - 1) - 0.4 * number  # above and below the work's line, or on it
        places = [i + place for i, row in enumerate(rows) if other in row["ratio"]]
        values = [row["ratio"][other] for row in rows if other in row["ratio"]]
        drawn = axes.barh(places, [v - 1 for v in values], 0.38, left=1, color=_COLOURS[other],
                          label=_LABELS[other])
        axes.bar_label(drawn, [f"{v:.2f}x" for v in values], padding=3, fontsize=8)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set(xscale="log", yticks=range(len(rows)), yticklabels=names,
             xlabel="images per second, jaxcifar over PyTorch (1 = as fast)")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    every = [v for row in rows for v in row["ratio"].values()] or [1.0]
    low, high = min(0.8, min(every) * 0.75), max(1.25, max(every) * 1.35)
    ticks = [t for t in (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50) if low <= t <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9, frameon=False)
    axes.set_title(title, loc="left", fontsize=11)
    return plots.save(figure, path)
