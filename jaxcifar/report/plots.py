"""Draw a run: curves, confusion matrix, training images. PNG files, without pyplot's global state.

Colours are Okabe and Ito's, which people with any colour vision tell apart. Every function writes
the file atomically and returns the matplotlib Figure.
"""

import io
import textwrap

import numpy as np

from jaxcifar.run_folder import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # no yellow
SPLITS = tuple(zip(("train", "val", "test"), COLOURS))
_GREY = "#6b6b6b"
_DPI = 140
FEW_EPOCHS = 20  # up to here every epoch has a marker (a single one would otherwise be invisible)
_MOST_MARKS = 8  # more changes of the learning rate than this are not marked
_MOST_TEXTS = 20  # with more classes than this, cells are too small for a number


def curves(rows, path, *, title, reference=None, reference_label="reported"):
    """Plot loss and accuracy over epochs to the PNG file `path`.

    rows: dicts as in metrics.jsonl: epoch and any of {train,val,test}_{loss,accuracy} (accuracy in
    percent; None leaves a gap) and learning_rate, whose changes are marked. reference: rows of a
    published curve, drawn dashed in the same colours, or None. Raises UserError if `path` cannot be
    written.
    """
    figure = new_figure((11, 4.6))
    for axes, metric, corner in zip(figure.subplots(1, 2), ("loss", "accuracy"),
                                    ("upper right", "lower right"), strict=True):
        for split, colour in SPLITS:
            _line(axes, rows, f"{split}_{metric}", label=split,
                  color=colour, linewidth=1.8, zorder=3,
                  marker="o" if len(rows) <= FEW_EPOCHS else None, markersize=4)
            _line(axes, reference or (), f"{split}_{metric}", label=f"{split} {reference_label}",
                  color=colour, linewidth=1.1, linestyle=(0, (4, 2)), alpha=0.65)
        axes.set(xlabel="epoch", ylabel="accuracy [%]" if metric == "accuracy" else "loss")
        axes.set_xlim(*_epoch_range([*rows, *(reference or ())]))
        low, high = axes.dataLim.intervaly
        if metric == "loss" and 0 <= low < high / 2:  # else 0 would leave a flat line at the top
            axes.set_ylim(0, 1.05 * high)
        dress(axes, whole_numbers=True)
        _mark_learning_rates(axes, rows)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc=corner, fontsize=9, framealpha=0.9, title="last value",
                        title_fontsize=8)
    figure.suptitle(textwrap.fill(title, 100), fontsize=12)
    return save(figure, path)


def confusion_matrix(matrix, class_names, path, *, title):
    """Draw a confusion matrix to the PNG file `path`, with the accuracy and the commonest errors.

    matrix: counts [num_classes, num_classes], row = true class, column = predicted class.
    class_names: num_classes strings. Colour is the percentage of the row, on a square-root scale
    that shows rare errors; up to 20 classes every cell has its count. Raises UserError if `path`
    cannot be written.
    """
    from matplotlib.colors import PowerNorm
    matrix = np.asarray(matrix)
    count = len(class_names)
    texts = count <= _MOST_TEXTS
    size = 0.62 * count + 2.2 if texts else 0.135 * count + 2.5
    figure = new_figure((size + 0.8, size))
    axes = figure.add_subplot()
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, ticks=(0, 1, 5, 20, 50, 100))
    bar.set_label("% of the true class")
    font = 10 if texts else 6.5
    axes.set_xticks(range(count), class_names, rotation=45 if texts else 90, fontsize=font,
                    ha="right" if texts else "center", rotation_mode="anchor" if texts else None)
    axes.set_yticks(range(count), class_names, fontsize=font)
    axes.set(xlabel="predicted class", ylabel="true class")
    if texts:
        for true, predicted in np.ndindex(matrix.shape):
            if matrix[true, predicted]:
                axes.text(predicted, true, f"{matrix[true, predicted]:,}", ha="center", va="center",
                          fontsize=9, color="white" if percent[true, predicted] > 25 else "black")
    axes.set_title(f"{title}\n{_commonest_errors(matrix, class_names)}", fontsize=11)
    return save(figure, path)


def samples(images, labels, class_names, path, *, title, columns=8):
    """Draw images with their class names as a grid to the PNG file `path`.

    images: uint8 [N, H, W, 3], or float [N, H, W, 3] in 0..1 (not normalised; values beyond are
    clipped). labels: int [N], or float [N, num_classes] of which the two largest are named (mixup,
    cutmix). Raises UserError if `path` cannot be written.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        images = np.clip(images.astype(np.float32), 0, 1)
    rows, (height, width) = -(-len(images) // columns), images.shape[1:3]
    figure = new_figure((1.22 * columns, 1.38 * rows + 0.5))
    axes = figure.add_subplot()  # one for all: an axes each would take seconds to draw
    axes.set_axis_off()
    for index, (image, label) in enumerate(zip(images, np.asarray(labels), strict=True)):
        left, top = index % columns * 1.18 * width, index // columns * 1.4 * height
        axes.imshow(image, interpolation="nearest", extent=(left, left + width, top + height, top))
        axes.annotate(_label_text(label, class_names), (left + width / 2, top), (0, 3),
                      textcoords="offset points", fontsize=8, ha="center", va="bottom")
    axes.set(xlim=(0, (1.18 * columns - 0.18) * width), ylim=(1.4 * rows * height, -0.4 * height))
    figure.suptitle(textwrap.fill(title, 11 * columns), fontsize=12)
    return save(figure, path)


def new_figure(inches):
    """Return a white matplotlib Figure of (width, height) inches, laid out by constraints."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=inches, dpi=_DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def dress(axes, *, whole_numbers=False):
    """Give axes a light grid behind what is drawn, and no frame; whole_numbers: along x."""
    if whole_numbers:
        from matplotlib.ticker import MaxNLocator
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def few_ticks(axis):
    """Label a logarithmic axis at powers of ten, or at 1, 2 and 5 times them if it has few of these."""
    from matplotlib.ticker import LogLocator, NullFormatter
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save(figure, path, metadata=None):
    """Write a figure as PNG with `metadata`, {key: text}, whole or not at all; return it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi, metadata=metadata)
    write_atomic(path, file.getvalue())
    return figure


def _line(axes, rows, key, *, label, **style):
    values = [np.nan if row.get(key) is None else row[key] for row in rows]
    if np.isfinite(values).any():
        last = f"{values[-1]:.2f}%" if key.endswith("accuracy") else f"{values[-1]:.3f}"
        axes.plot([row["epoch"] for row in rows], values, label=f"{label} {last}", **style)


def _epoch_range(rows):
    epochs = [row["epoch"] for row in rows] or [1]
    margin = max(0.5, 0.02 * (max(epochs) - min(epochs)))
    return min(epochs) - margin, max(epochs) + margin


def _mark_learning_rates(axes, rows):
    """A dotted line where the learning rate changes, its value above the frame."""
    rates = [(row["epoch"], row["learning_rate"]) for row in rows if row.get("learning_rate")]
    changes = [after for before, after in zip(rates, rates[1:], strict=False)
               if after[1] != before[1]]
    if not 0 < len(changes) <= min(_MOST_MARKS, len(rates) / 3):
        return  # constant, or a smooth schedule
    left, right = axes.get_xlim()
    labelled = -np.inf
    for epoch, rate in (rates[0], *changes):
        if epoch > rates[0][0]:
            axes.axvline(epoch - 0.5, color=_GREY, linewidth=0.9, linestyle=":", zorder=1)
        if epoch - labelled > 0.1 * (right - left):  # else the two texts would overlap
            text = f"lr {rate:.3g}" if labelled == -np.inf else f"{rate:.3g}"
            axes.annotate(text, (epoch - 0.5, 1.01), xycoords=("data", "axes fraction"),
                          fontsize=8, color=_GREY, ha="center", va="bottom")
            labelled = epoch


def _commonest_errors(matrix, class_names):
    accuracy = 100 * np.trace(matrix) / max(matrix.sum(), 1)
    errors = matrix - np.diag(np.diag(matrix))
    commonest = np.argsort(errors, axis=None, kind="stable")[::-1][:3]
    pairs = [np.unravel_index(index, errors.shape) for index in commonest if errors.flat[index]]
    text = f"accuracy {accuracy:.2f}%"
    if pairs:
        text += "; commonest errors: " + ", ".join(
            f"{class_names[true]} as {class_names[predicted]} {errors[true, predicted]:,}"
            for true, predicted in pairs)
    return text


def _label_text(label, class_names):
    if label.ndim == 0:
        return class_names[int(label)]
    first, second = np.argsort(label)[::-1][:2]
    if label[first] > 0.995:
        return class_names[first]
    return f"{class_names[first]} {label[first]:.2f}\n{class_names[second]} {label[second]:.2f}"
