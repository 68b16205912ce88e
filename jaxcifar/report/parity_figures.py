"""The reports' figures, redrawn from the committed results: curves per epoch, seeds and their band.

A figure shows only what was measured; one of which nothing was measured is not drawn. Each PNG
carries a digest of the numbers in it, so that it is drawn again only when they change.
"""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from jaxcifar.report import parity_rows, plots, published

_DPI = 100
_DIGEST = "drawn_from"

_SETTINGS = ("lr0.2_wd5e-4", "lr0.05_wd5e-4", "lr0.1_wd5e-3", "lr0.2_wd5e-5", "lr0.05_wd5e-5")
_TABLE2 = ("k3", "k5", "0_5", "k5_0_5", "k3_k5_0_5_p2", "k3_k5_0_5_p2_k5", "0_5_v5")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram of a figure: lines of (row's name, label), each with the metrics' curves.

    metrics: names of curves; the second one takes the next colour. reference: name of a published
    curve, which is dashed, or "".
    """

    title: str
    lines: tuple
    metrics: tuple
    reference: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of docs/figures/NAME.png. report: whose. columns: of panels."""

    name: str
    report: str
    title: str
    panels: tuple
    columns: int = 1


def _cnn(title, cells):
    return Panel(title, parity_rows.cnn_cells(cells), ("val_accuracy",))


FIGURES = (
    Figure("architectures_batch_rate", "architectures", "CNN: batch size and learning rate", (
        _cnn("no dropout, no L2, no augmentation",
             [((b, r, 0, 0, "none"), f"batch {b}, rate {r}")
              for b in (64, 128) for r in (0.01, 0.001, 0.0001)]),)),
    Figure("architectures_l2_dropout", "architectures", "CNN: L2 and dropout", tuple(
        _cnn(f"augmentation: {augmentation}",
             [((128, 0.001, l2, d, augmentation), f"L2 {l2}, dropout {d}")
              for l2 in (0, 0.01) for d in (0, 0.5)])
        for augmentation in ("none", "basic")), 2),
    Figure("architectures_augmentation", "architectures", "CNN: augmentation", tuple(
        _cnn(f"dropout {d}", [((128, 0.001, 0, d, a), a.replace("_", " + "))
                              for a in ("none", "basic", "basic_erasing")]) for d in (0, 0.5)), 2),
    Figure("architectures_networks", "architectures", "MLP, CNN and ViT", (Panel(
        "each network's own recipe", (
            ("architectures/mlp_s", "MLP, small"), ("architectures/mlp_l", "MLP, large"),
            *parity_rows.cnn_cells([((128, 0.001, 0, 0.5, "basic"), "CNN, the report's best")]),
            ("architectures/vit", "ViT, 1 layer"), ("architectures/vit/depth6", "ViT, 6 layers")),
        ("val_accuracy",)),)),
    Figure("cifar100_networks", "cifar100", "CIFAR-100: networks", (
        Panel("width", (("cifar100/nn", "fully connected"), *(
            (f"cifar100/cnn/{width}", f"CNN {width}") for width in (32, 128, 256, 512))),
            ("test_accuracy",)),
        Panel("on CNN 128", (("cifar100/cnn/128", "CNN 128"), *(
            (f"cifar100/cnn/{name}", label) for name, label in (
                ("bn", "BatchNorm"), ("bn_fc8192", "BatchNorm, 8192 units"),
                ("bn_dropout", "BatchNorm, dropout"), ("flip", "flip"), ("crop", "crop")))),
            ("test_accuracy",))), 2),
    Figure("googlenet_variants", "googlenet", "GoogLeNet's variants, 8 epochs", (Panel(
        "table 2", tuple((f"googlenet/table2/{name}", name) for name in _TABLE2),
        ("test_accuracy",)),)),
    Figure("googlenet_tuning", "googlenet", "GoogLeNet's variants, tuned over 10 epochs", tuple(
        Panel(model, tuple((f"googlenet/table3/{model}/{s}", s.replace("_", ", "))
                           for s in _SETTINGS), ("test_accuracy",))
        for model in ("k5_0_5", "0_5_v5")), 2),
    Figure("resnet5m_losses", "resnet5m", "Six ResNets: loss, and the published one", tuple(
        Panel(f"model {i}", ((f"resnet5m/model{i}", "ours"),), ("train_loss", "val_loss"),
              f"resnet5m_model{i}") for i in range(1, 7)), 3),
)


def curves_of(content, metric):
    """Return a curve of every seed, float array [seeds, epochs], as far as every seed went.

    content: of a result file. metric: name of a curve. [seeds, 0] where it was not measured.
    """
    curves = [record["curves"].get(metric, []) for record in content["seeds"].values()]
    shortest = min(map(len, curves), default=0)
    return np.array([[np.nan if v is None else v for v in curve[:shortest]] for curve in curves])


def band(curves):
    """Return (mean, std) over the seeds, float arrays [epochs], of `curves_of`; one seed's std is 0."""
    return curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(curves) - 1))


def measured(figure, results):
    """Return (panels, each with only its measured lines, number of lines that are missing).

    Panels without any are left out.
    """
    panels, missing = [], 0
    for panel in figure.panels:
        lines = tuple((name, label) for name, label in panel.lines
                      if name in results and curves_of(results[name], panel.metrics[0]).size)
        missing += len(panel.lines) - len(lines)
        if lines:
            panels.append(dataclasses.replace(panel, lines=lines))
    return tuple(panels), missing


def digest(figure, results):
    """Return 16 hexadecimal digits of everything that a figure shows, "" where it shows nothing."""
    panels, _ = measured(figure, results)
    if not panels:
        return ""
    colours = colours_of(figure.panels)
    shown = [figure.title, figure.columns, [
        [panel.title, panel.reference, [
            [label, colours[label], metric, np.round(curves_of(results[name], metric), 3).tolist()]
            for name, label in panel.lines for metric in panel.metrics]] for panel in panels]]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def drawn_from(path):
    """Return the digest of a figure's file, "" where there is none."""
    from PIL import Image
    if not pathlib.Path(path).is_file():
        return ""
    with Image.open(path) as image:
        return image.info.get(_DIGEST, "")


def write(folder, results):
    """Draw what has changed to folder/NAME.png, remove what shows nothing any more.

    Returns the names of the figures that were drawn. Raises UserError if a file cannot be written.
    """
    folder, drawn = pathlib.Path(folder), []
    for figure in FIGURES:
        path, wanted = folder / f"{figure.name}.png", digest(figure, results)
        if not wanted:
            path.unlink(missing_ok=True)
        elif drawn_from(path) != wanted:
            folder.mkdir(parents=True, exist_ok=True)
            draw(figure, results, path)
            drawn.append(figure.name)
    return drawn


def draw(figure, results, path):
    """Draw a figure to the PNG file `path`; return the matplotlib Figure."""
    from matplotlib.figure import Figure as Canvas
    panels, _ = measured(figure, results)
    columns = min(figure.columns, len(panels))
    lines = -(-len(panels) // columns)
    width = 7.5 if columns == 1 else 5.4 * columns
    entries = max(len(panel.lines) * len(panel.metrics) for panel in panels)
    height = 3.9 + 0.2 * -(-entries // 2)  # of a panel and its legend
    canvas = Canvas(figsize=(width, height * lines + 0.4), dpi=_DPI, layout="constrained")
    colours = colours_of(figure.panels)
    grid = canvas.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, panel in zip(grid[:len(panels)], panels, strict=True):
        _draw_panel(axes, panel, results, colours)
    for axes in grid[len(panels):]:
        axes.set_visible(False)
    canvas.suptitle(figure.title, fontsize=12)
    return plots.save(canvas, path, {_DIGEST: digest(figure, results), "Software": None})


def colours_of(panels):
    """Return {label: number of its colour}: one in all panels, and another than those beside it.

    Labels take the colours in turn; where there are more labels, some share one across panels.
    """
    groups, chosen = [[label for _, label in panel.lines] for panel in panels], {}
    for label in dict.fromkeys(label for group in groups for label in group):
        beside = {chosen.get(other) for group in groups if label in group for other in group}
        free = [number for number in range(len(plots.COLOURS)) if number not in beside]
        unused = [number for number in free if number not in chosen.values()]
        chosen[label] = (unused or free or [len(chosen)])[0]
    return chosen


def _draw_panel(axes, panel, results, colours):
    """Draw the measured lines."""
    for name, label in panel.lines:
        for position, metric in enumerate(panel.metrics):
            colour = plots.COLOURS[(colours[label] + position) % len(plots.COLOURS)]
            curves = curves_of(results[name], metric)
            mean, std = band(curves)
            epochs, seeds = np.arange(1, len(mean) + 1), len(curves)
            split = f"{metric.split('_')[0]} " if len(panel.metrics) > 1 else ""
            unit = "%" if metric.endswith("accuracy") else ""
            digits = 1 if unit else 3
            axes.plot(epochs, mean, color=colour, linewidth=1.6, zorder=3,
                      marker="o" if len(mean) <= 12 else None, markersize=3,
                      label=f"{split}{label}: {mean[-1]:.{digits}f}{unit} (n={seeds})")
            axes.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
            if seeds > 1:
                axes.plot(epochs, curves.T, color=colour, linewidth=0.6, alpha=0.6)
            if panel.reference:
                _draw_reference(axes, panel.reference, metric, colour)
    metric = panel.metrics[0]
    axes.set(xlabel="epoch", title=panel.title,
             ylabel={"val_accuracy": "validation accuracy [%]",
                     "test_accuracy": "test accuracy [%]"}.get(metric, "loss"))
    axes.title.set_fontsize(10)
    plots.dress(axes, whole_numbers=True)
    axes.legend(fontsize=8, title="mean at the end (seeds)", title_fontsize=7, frameon=False, ncols=2,
                alignment="left", loc="upper left", bbox_to_anchor=(0, -0.14))  # below the lines


def _draw_reference(axes, name, metric, colour):
    rows = published.reported_curve(name)
    axes.plot([row["epoch"] for row in rows], [row[metric] for row in rows], color=colour,
              linewidth=1.0, linestyle=(0, (4, 2)), alpha=0.7,
              label=f"{metric.split('_')[0]} published: {rows[-1][metric]:.3f}")
