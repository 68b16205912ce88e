"""The plots of a run, its header, and the published curves."""

import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from jaxcifar.errors import UserError
from jaxcifar.report import plots, published
from jaxcifar.report import run as run_report
from jaxcifar.task import create_task


def rows(count, **columns):
    made = []
    for epoch in range(1, count + 1):
        made.append({"epoch": epoch, "train_loss": 2.0 / epoch, "train_accuracy": 100 - 60 / epoch,
                     "val_loss": 2.2 / epoch, "val_accuracy": 100 - 65 / epoch,
                     **{key: value(epoch) for key, value in columns.items()}})
    return made


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_colour(image, hexadecimal):
    colour = [int(hexadecimal[i:i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(image.astype(int) - colour).max(axis=-1) < 6).sum() > 20


def test_curves_overlay_the_reported_ones(tmp_path):
    path = tmp_path / "curves.png"
    reference = published.reported_curve("resnet5m_model1")
    figure = plots.curves(rows(30), path, title="resnet5m", reference=reference)
    loss, accuracy = figure.axes
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        lines = {line.get_label().rsplit(" ", 1)[0]: line for line in axes.lines}
        assert list(lines) == ["train", "train reported", "val", "val reported"]
        assert len(lines["val"].get_ydata()) == 30
        np.testing.assert_array_equal(lines["val reported"].get_ydata(),
                                      [row[f"val_{metric}"] for row in reference])
        assert lines["val"].get_color() == lines["val reported"].get_color()
        assert lines["val"].get_linestyle() != lines["val reported"].get_linestyle()
        assert axes.get_xlim()[1] >= 150
        assert len(axes.get_legend().get_texts()) == 4
    assert accuracy.get_legend().get_texts()[-1].get_text() == "val reported 94.64%"
    image = pixels(path)
    assert image.shape == (644, 1540, 3)
    assert has_colour(image, "#0072B2") and has_colour(image, "#D55E00")
    assert not has_colour(image, "#009E73")  # no test curve


def test_curves_of_one_epoch_are_visible_points(tmp_path):
    figure = plots.curves(rows(1), tmp_path / "curves.png", title="quickstart")
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert figure.axes[0].get_xlim() == (0.5, 1.5)
    assert [tick for tick in figure.axes[0].get_xticks() if 0.5 <= tick <= 1.5] == [1]
    assert has_colour(pixels(tmp_path / "curves.png"), "#D55E00")


@pytest.mark.parametrize("made", [
    [],
    [{"epoch": 1, "step": 3}],
    [{"epoch": 1, "train_loss": None, "train_accuracy": None}],
])
def test_curves_without_any_value(tmp_path, made):
    figure = plots.curves(made, tmp_path / "curves.png", title="nothing yet")
    assert [len(axes.lines) for axes in figure.axes] == [0, 0]
    assert pixels(tmp_path / "curves.png").std() > 0  # axes and title are drawn


@pytest.mark.parametrize(("losses", "bottom"), [((2.302, 2.311), False), ((2.3, 0.4), True)])
def test_the_loss_is_inside_its_axes(losses, bottom, tmp_path):
    rows = [{"epoch": 1, "train_loss": losses[0], "val_loss": losses[1]}]
    low, high = plots.curves(rows, tmp_path / "c.png", title="t").axes[0].get_ylim()
    room = 0.02 * (high - low)
    assert low + room < min(losses) and max(losses) < high - room and (low == 0) == bottom


def test_curves_with_gaps_and_a_test_column(tmp_path):
    made = rows(6, test_loss=lambda e: None if e == 3 else 1.0, val_accuracy=lambda _: None)
    loss, accuracy = plots.curves(made, tmp_path / "curves.png", title="gaps").axes
    assert [line.get_label().split()[0] for line in loss.lines] == ["train", "val", "test"]
    assert np.isnan(loss.lines[2].get_ydata()).tolist() == [False, False, True] + 3 * [False]
    assert [line.get_label().split()[0] for line in accuracy.lines] == ["train"]


def marks(figure):
    axes = figure.axes[0]
    lines = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    return lines, [text.get_text() for text in axes.texts]


def test_changes_of_the_learning_rate_are_marked(tmp_path):
    path = tmp_path / "curves.png"

    def rate(epoch):
        return 1e-3 if epoch < 20 else 1e-4 if epoch < 40 else 1e-5 if epoch < 42 else 1e-6
    figure = plots.curves(rows(60, learning_rate=rate), path, title="plateau")
    # Four rates, three changes; the last follows too closely for a text of its own.
    assert marks(figure) == ([19.5, 39.5, 41.5], ["lr 0.001", "0.0001", "1e-05"])
    figure = plots.curves(rows(60, learning_rate=np.cos), path, title="a smooth schedule")
    assert marks(figure) == ([], [])
    figure = plots.curves(rows(60, learning_rate=lambda _: 0.1), path, title="constant")
    assert marks(figure) == ([], [])


def test_confusion_matrix_of_10_classes_has_every_count(tmp_path):
    names = [f"class {i}" for i in range(10)]
    matrix = np.diag(np.full(10, 90))
    matrix[3, 5], matrix[9, 1] = 1010, 7
    figure = plots.confusion_matrix(matrix, names, tmp_path / "m.png", title="test set")
    axes = figure.axes[0]
    cells = {text.get_position(): text for text in axes.texts}
    assert len(cells) == 12
    assert cells[5, 3].get_text() == "1,010" and cells[1, 9].get_text() == "7"
    assert cells[0, 0].get_color() == "white" and cells[1, 9].get_color() == "black"
    shown = np.asarray(axes.images[0].get_array())
    assert shown[0, 0] == 100 and shown[3, 5] == pytest.approx(100 * 1010 / 1100)
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert axes.get_title() == ("test set\naccuracy 46.95%; commonest errors: "
                                "class 3 as class 5 1,010, class 9 as class 1 7")
    assert min(pixels(tmp_path / "m.png").shape[:2]) > 1000


def test_confusion_matrix_of_100_classes_is_legible(tmp_path):
    names = [f"class_{i}" for i in range(100)]
    figure = plots.confusion_matrix(np.eye(100, dtype=int) * 100, names, tmp_path / "m.png",
                                    title="CIFAR-100")
    axes = figure.axes[0]
    assert len(axes.texts) == 0 and axes.get_title().endswith("accuracy 100.00%")
    assert min(pixels(tmp_path / "m.png").shape[:2]) > 2000
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == names
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in zip(boxes, boxes[1:], strict=False))


def test_confusion_matrix_with_an_absent_class(tmp_path):
    figure = plots.confusion_matrix([[0, 0], [2, 2]], ["a", "b"], tmp_path / "m.png", title="t")
    assert np.asarray(figure.axes[0].images[0].get_array()).tolist() == [[0, 0], [50, 50]]


def test_samples_show_images_with_their_names(tmp_path, sample_images):
    labels = np.arange(20) % 3
    figure = plots.samples(sample_images[:20], labels, ["cat", "dog", "ship"], tmp_path / "s.png",
                           title="what the network sees")
    axes, = figure.axes
    assert [text.get_text() for text in axes.texts] == [("cat", "dog", "ship")[i] for i in labels]
    for shown, image in zip(axes.images, sample_images[:20], strict=True):
        np.testing.assert_array_equal(shown.get_array(), image)
    assert pixels(tmp_path / "s.png").std() > 20


def test_samples_accept_floats_and_mixed_labels(tmp_path, sample_images, caplog):
    images = sample_images[:2].astype(np.float32) / 255
    images[0, 0, 0] = (-0.5, 0.5, 1.5)
    figure = plots.samples(images, np.array([[0.3, 0.7], [1.0, 0.0]]), ["cat", "dog"],
                           tmp_path / "s.png", title="mixup", columns=2)
    axes, = figure.axes
    assert [text.get_text() for text in axes.texts] == ["dog 0.70\ncat 0.30", "cat"]
    assert np.asarray(axes.images[0].get_array())[0, 0].tolist() == [0, 0.5, 1]
    assert not caplog.records  # matplotlib would warn of values that it has to clip


def test_plots_leave_pyplot_alone_and_name_an_unwritable_path(tmp_path):
    pyplot_before = "matplotlib.pyplot" in sys.modules
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*curves\.png"):
        plots.curves(rows(2), tmp_path / "file" / "curves.png", title="t")
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before


def test_published_curves_end_where_the_reports_say():
    assert published.curve_names() == [f"resnet5m_model{i}" for i in range(1, 7)]
    last = [published.reported_curve(name)[-1] for name in published.curve_names()]
    assert [row["val_accuracy"] for row in last] == [94.64, 94.40, 94.34, 86.97, 93.30, 93.79]
    for name in published.curve_names():
        curve = published.reported_curve(name)
        assert [row["epoch"] for row in curve] == list(range(1, 151))
        assert all(isinstance(row["epoch"], int) for row in curve)
        assert all(0 <= row["train_accuracy"] <= 100 and row["val_loss"] > 0 for row in curve)


def test_an_unknown_curve_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'resnet5m_model2'"):
        published.reported_curve("resnet5m_modle2")


@pytest.mark.parametrize(("fields", "text"), [
    ({"schedule__name": "constant"}, "constant schedule"),
    # After 2 of 200 epochs of 4 steps, and at the end of the whole half period:
    ({"schedule__name": "cosine"}, "cosine schedule, 0.02 at the end"),
    ({"schedule__name": "cosine", "schedule__t_max": 2}, "cosine schedule, 0.01 at the end"),
    ({"schedule__name": "plateau", "schedule__patience": 3},
     "plateau schedule on val_loss, 3 epochs of patience"),
])
def test_the_header_says_where_the_schedule_ends(fields, text):
    config = tiny.tiny_config(**fields)
    assert run_report.scheduled(create_task(config, 100, 10)) == text
