"""The figures of the parity report: what they show, how far, in which colours."""

import math

import parity_fakes
import pytest
from parity_fakes import ROOT

from jaxcifar.report import parity_claims, parity_figures, parity_rows, published

KNOWN = parity_rows.recipes(ROOT)
BEST_CELL = "architectures/cnn/b128_lr0.001_l0_d0.5_basic"


def test_bands_go_as_far_as_every_seed(tmp_path):
    content = {"seeds": {}}
    for seed, (epochs, value) in enumerate(((30, 60.0), (32, 64.0))):
        content["seeds"] |= parity_fakes.result_of(
            tmp_path, KNOWN[BEST_CELL], seeds=(seed,), epochs=epochs, val_accuracy=value)["seeds"]
    curves = parity_figures.curves_of(content, "val_accuracy")
    mean, std = parity_figures.band(curves)
    assert curves.shape == (2, 30) and len(mean) == 30
    assert curves[:, -1] == pytest.approx([60, 64 * 0.98])
    assert mean[-1] == pytest.approx((60 + 64 * 0.98) / 2)
    assert std[-1] == pytest.approx((64 * 0.98 - 60) / math.sqrt(2))


def test_a_figure_shows_what_was_measured_and_no_more(tmp_path):
    results = {"resnet5m/model2": parity_fakes.result_of(tmp_path, KNOWN["resnet5m/model2"],
                                                         seeds=(0, 1), epochs=3)}
    drawn = parity_figures.write(tmp_path / "figures", results)
    assert drawn == ["resnet5m_losses"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["resnet5m_losses.png"]
    figure = parity_figures.draw(parity_figures.FIGURES[-1], results, tmp_path / "f.png")
    (axes,) = figure.axes
    assert axes.get_title() == "model 2"
    ours, seed, _, theirs = axes.lines[:4]
    assert len(seed.get_ydata()) == 3
    assert len(ours.get_ydata()) == 3 and len(theirs.get_ydata()) == 150
    assert theirs.get_ydata()[0] == published.reported_curve("resnet5m_model2")[0]["train_loss"]
    assert len(axes.lines) == 8 and len(axes.collections) == 2  # two bands
    assert parity_figures.write(tmp_path / "figures", results) == []  # nothing changed
    results["resnet5m/model2"]["seeds"].pop("1")
    assert parity_figures.write(tmp_path / "figures", results) == ["resnet5m_losses"]
    assert parity_figures.write(tmp_path / "figures", {}) == []
    assert not list((tmp_path / "figures").iterdir())


@pytest.mark.parametrize("figure", parity_figures.FIGURES, ids=lambda figure: figure.name)
def test_no_two_lines_of_a_panel_have_one_colour(figure):
    colours = parity_figures.colours_of(figure.panels)
    for panel in figure.panels:
        shown = [colours[label] % 7 for _, label in panel.lines]
        assert len(set(shown)) == len(shown), panel.title


def test_every_line_of_a_figure_is_a_row():
    for figure in parity_figures.FIGURES:
        for panel in figure.panels:
            assert [name for name, _ in panel.lines if name not in KNOWN] == []


def test_every_row_that_a_conclusion_compares_is_there():
    for claim in parity_claims.CLAIMS:
        assert [name for name, _ in claim.rows if name not in KNOWN] == []
        assert claim.report in {name.partition("/")[0] for name, _ in claim.rows}
