"""The committed results hold the published numbers, and the checks that say so can fail."""

import dataclasses
import json
import math
import shutil

import parity_fakes
import pytest
import tiny
from parity_fakes import ROOT

from jaxcifar import config as config_lib
from jaxcifar.errors import UserError
from jaxcifar.report import (parity_figures, parity_judge, parity_page, parity_results, parity_rows,
                             published)

KNOWN = parity_rows.recipes(ROOT)
COUNTED = parity_rows.read_counts(ROOT)
BEST_CELL = "architectures/cnn/b128_lr0.001_l0_d0.5_basic"
QUICK = ("architectures/mlp_s", "architectures/vit", "cifar100/nn", "googlenet/table2/k5_0_5",
         "resnet5m/channels/32-64-128-372")


def number(row, metric, epoch=None, source="report"):
    """Return one published number of a row."""
    wanted = (metric, epoch, source)
    found = [n for n in KNOWN[row].numbers if (n.metric, n.epoch, n.source) == wanted]
    assert len(found) == 1, found
    return found[0]


def problems(root):
    """Return everything that is wrong with a repository's results and page, a list of lines."""
    known = parity_rows.recipes(root)
    counted, results = parity_rows.read_counts(root), parity_results.read(root)
    found = [f"counts.json: {name}" for name in {*known, *counted}
             if counted.get(name, {}).get("config_hash") != getattr(known.get(name), "hash", "")]
    if found:
        return found
    judged = parity_judge.verdicts(known, counted, results, parity_judge.read_notes(root))
    found += parity_results.stale(results, known) + parity_judge.failures(judged)
    if (root / "docs" / "parity.md").read_text(encoding="utf-8") != parity_page.page(
            known, results, judged):
        found.append("docs/parity.md is not what --report-only writes")
    current = parity_results.fresh(results, known)
    found += [f"docs/figures/{figure.name}.png" for figure in parity_figures.FIGURES
              if parity_figures.drawn_from(root / "docs" / "figures" / f"{figure.name}.png")
              != parity_figures.digest(figure, current)]
    for name, content in results.items():
        found += [f"{name} seed {seed}: parameters" for seed, record in content["seeds"].items()
                  if name in counted and record["params"] != counted[name]["params"]]
    return found


def with_result(tmp_path, row, change=lambda content: None, **values):
    """Return a repository whose only result is one of `row`, changed, with a current page."""
    root = parity_fakes.repository(tmp_path / "root")
    content = parity_fakes.result_of(tmp_path / "runs", KNOWN[row], **values)
    for record in content["seeds"].values():
        record["params"] = COUNTED[row]["params"]
    change(content)
    path = parity_results.path_of(root, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    parity_page.write(root, say=lambda line: None)
    return root


def test_the_committed_results_hold():
    assert problems(ROOT) == []


@pytest.mark.parametrize("row", sorted({*QUICK, *parity_results.read(ROOT)}))
def test_the_committed_counts_are_the_networks(row):
    """Of every measured row: an option's default is not in the configuration nor in its hash."""
    made = parity_rows.count(KNOWN[row].config)
    assert {key: COUNTED[row][key] for key in made} == made, (
        f"the network is another one: remove results/{row}.json and the row in results/counts.json, "
        "and measure it again")


def test_without_results_nothing_fails(tmp_path):
    assert problems(parity_fakes.repository(tmp_path / "root")) == []


def test_a_result_within_its_tolerance_passes(tmp_path):
    assert problems(with_result(tmp_path, "cifar100/nn", test_accuracy=25.01)) == []


def test_a_regression_fails_until_a_note_allows_it_and_beyond_its_limit(tmp_path):
    root = with_result(tmp_path, "cifar100/nn", test_accuracy=24.9)
    (line,) = problems(root)
    assert line.startswith("cifar100/nn test_accuracy after epoch 20: 24.9 (1 value(s))")
    assert "worst allowed 25;" in line
    notes = root / "results" / "notes.csv"
    without = notes.read_text()
    notes.write_text(f"{without}cifar100/nn,test_accuracy,20,report,24.5,the report trained longer\n")
    parity_page.write(root, say=lambda line: None)
    assert problems(root) == []
    text = (root / "docs" / "parity.md").read_text()
    assert "- `nn`: outside: the report trained longer." in text and "| no: see below |" in text
    notes.write_text(f"{without}cifar100/nn,test_accuracy,20,report,24.95,the report trained longer\n")
    parity_page.write(root, say=lambda line: None)
    (line,) = problems(root)
    assert "24.9 (1 value(s))" in line and "worst allowed 24.95;" in line
    assert "| **NO** |" in (root / "docs" / "parity.md").read_text()


def test_a_note_on_a_number_that_holds_fails(tmp_path):
    root = with_result(tmp_path, "cifar100/nn", test_accuracy=25.5)
    with (root / "results" / "notes.csv").open("a") as file:
        file.write("cifar100/nn,test_accuracy,20,report,20,the report trained longer\n")
    parity_page.write(root, say=lambda line: None)
    assert "trained longer" not in (root / "docs" / "parity.md").read_text()
    (line,) = problems(root)
    assert line.startswith("cifar100/nn test_accuracy after epoch 20: 25.5")
    assert line.endswith("it holds: remove its line in results/notes.csv")


def test_a_count_that_may_differ_may_not_differ_otherwise():
    wrong = {**COUNTED, "architectures/mlp_s": {**COUNTED["architectures/mlp_s"], "params": 5_000_000}}
    notes = parity_judge.read_notes(ROOT)
    assert parity_judge.failures(parity_judge.verdicts(KNOWN, COUNTED, {}, notes)) == []
    found = parity_judge.failures(parity_judge.verdicts(KNOWN, wrong, {}, notes))
    assert any("architectures/mlp_s params: 5,000,000" in line and "worst allowed 5,411,110" in line
               for line in found)


def test_a_result_of_another_configuration_fails(tmp_path):
    def change(content):
        content["config_hash"] = "0123456789ab"
    root = with_result(tmp_path, "cifar100/nn", change, test_accuracy=99.0)
    (line,) = problems(root)
    assert "results/cifar100/nn.json" in line and "0123456789ab" in line
    assert "| stale |" in (root / "docs" / "parity.md").read_text()


def test_a_seed_of_another_configuration_fails(tmp_path):
    def change(content):
        content["seeds"]["0"]["run_hash"] = "0123456789ab"
    (line,) = problems(with_result(tmp_path, "cifar100/nn", change, test_accuracy=26.0))
    assert "seed 0" in line


def test_a_configuration_that_changes_makes_its_result_stale(tmp_path):
    root = with_result(tmp_path, "cifar100/nn", test_accuracy=26.0)
    path = root / "configs" / "cifar100.py"
    path.write_text(path.read_text().replace('"adam", 1e-4', '"adam", 2e-4'))
    assert "counts.json: cifar100/nn" in problems(root)
    parity_rows.counts(root, parity_rows.recipes(root))
    assert any("results/cifar100/nn.json: measured with" in line for line in problems(root))


def test_a_network_of_another_size_fails(tmp_path):
    def change(content):
        content["seeds"]["0"]["params"] += 1
    assert problems(with_result(tmp_path, "cifar100/nn", change, test_accuracy=26.0)) == [
        "cifar100/nn seed 0: parameters"]


def test_an_edited_page_or_figure_fails(tmp_path):
    root = with_result(tmp_path, "cifar100/nn", test_accuracy=26.0)
    page, figure = root / "docs" / "parity.md", root / "docs" / "figures" / "cifar100_networks.png"
    page.write_text(page.read_text().replace("26.00", "36.00"))
    shutil.copy(figure, root / "docs" / "figures" / "resnet5m_losses.png")
    assert problems(root) == ["docs/parity.md is not what --report-only writes",
                              "docs/figures/resnet5m_losses.png"]
    parity_page.write(root, say=lambda line: None)
    assert problems(root) == []
    figure.unlink()
    assert problems(root) == ["docs/figures/cifar100_networks.png"]


@pytest.mark.parametrize(("row", "metric", "epoch", "ours", "held"), [
    ("architectures/vit", "kaggle_accuracy", None, 53.08, True),  # 54.08, 1 point
    ("architectures/vit", "kaggle_accuracy", None, 53.07, False),
    ("architectures/vit", "kaggle_accuracy", None, 90.0, True),  # better is fine
    ("architectures/vit", "kaggle_accuracy", None, math.nan, False),
    ("googlenet/table3/k5_0_5/lr0.2_wd5e-4", "test_accuracy", 10, 79.03, True),  # 80.03, 10 epochs
    ("googlenet/table3/k5_0_5/lr0.2_wd5e-4", "test_accuracy", 10, 79.02, False),
    ("googlenet/table1/resnet18", "test_accuracy", 2, 43.47, True),  # 53.47, two epochs
    ("googlenet/table1/resnet18", "test_accuracy", 2, 43.46, False),
    ("googlenet/table1/resnet18", "test_accuracy", 2, 75.0, True),
    ("googlenet/table2/k5", "test_accuracy", 8, 73.39, True),  # 78.39, 8 epochs
    ("googlenet/table2/k5", "test_accuracy", 8, 73.38, False),
    ("cifar100/cnn/32", "test_accuracy", 20, 27.0, True),  # 28-30: the lower end
    ("cifar100/cnn/32", "test_accuracy", 20, 26.99, False),
    ("architectures/mlp_l", "val_accuracy", None, 9.0, True),  # 10, "does not train"
    ("architectures/mlp_l", "val_accuracy", None, 11.0, True),
    ("architectures/mlp_l", "val_accuracy", None, 11.01, False),
    ("cifar100/cnn/128", "train_loss", 20, 0.21, True),  # 0.160 + 0.05
    ("cifar100/cnn/128", "train_loss", 20, 0.211, False),
    ("cifar100/cnn/128", "train_loss", 20, 0.01, True),
    ("resnet5m/model4", "test_loss", None, 0.588, True),  # 0.535 + 10%
    ("resnet5m/model4", "test_loss", None, 0.589, False),
    ("googlenet/table1/resnet18", "train_loss", 1, 2.37, True),  # 1.978 + 20%
    ("googlenet/table1/resnet18", "train_loss", 1, 2.38, False),
    ("googlenet/table1/senet18", "train_loss", 2, 1.333, True),  # 1.033 + 0.3
    ("googlenet/table1/senet18", "train_loss", 2, 1.334, False),
    ("googlenet/table1/resnet18", "params", None, 11173962, True),
    ("googlenet/table1/resnet18", "params", None, 11173963, False),
    ("architectures/finetune/resnet18", "imagenet_params", None, 11689512, True),  # 11.7 M
    ("architectures/finetune/resnet18", "imagenet_params", None, 11181642, False),
    ("resnet5m/channels/32-64-128-256", "params", None, 2750000, True),  # printed as 2.8
    ("resnet5m/channels/32-64-128-256", "params", None, 2749999, False),
    ("googlenet/table1/resnet18", "minutes", 2, 1.0, None),
])
def test_tolerance(row, metric, epoch, ours, held):
    assert parity_judge.holds(number(row, metric, epoch), ours, KNOWN[row].config.epochs) is held


def test_no_tolerance_is_looser_than_the_rule():
    for name, recipe in KNOWN.items():
        for entry in recipe.numbers:
            worst, epochs = parity_judge.limit(entry, recipe.config.epochs), entry.epoch
            if entry.metric.endswith("_accuracy"):
                trained = epochs or recipe.config.epochs
                points = 1.0 if trained >= 10 else 5.0 if trained > 2 else 10.0
                assert entry.value - worst == pytest.approx(points), name


def test_verdicts_are_means_over_the_seeds(tmp_path):
    row = "cifar100/cnn/32"
    content = parity_fakes.result_of(tmp_path, KNOWN[row], seeds=(0, 1, 2))
    for seed, value in enumerate((26.0, 28.0, 30.5)):
        content["seeds"][str(seed)]["curves"]["test_accuracy"][19] = value
    (verdict,) = [v for v in parity_judge.verdicts(KNOWN, COUNTED, {row: content}, {})
                  if v.row == row]
    assert verdict.ours == (26.0, 28.0, 30.5) and verdict.status == parity_judge.WITHIN
    assert verdict.mean == pytest.approx(28.1667, abs=1e-4)
    assert verdict.std == pytest.approx(2.2546, abs=1e-4)  # n - 1
    assert verdict.difference == 0  # inside 28-30
    below = dataclasses.replace(verdict, ours=(26.0,))
    assert below.difference == -2 and below.std is None
    assert dataclasses.replace(verdict, ours=(31.0,)).difference == 1


def test_every_metric_is_read_where_it_was_measured(tmp_path):
    row = "googlenet/table1/resnet18"
    content = parity_fakes.result_of(tmp_path, KNOWN[row], test_accuracy=60.0, train_loss=2.0)
    record = content["seeds"]["0"]
    assert parity_judge.value_of(number(row, "test_accuracy", 1), record) == pytest.approx(59.4)
    assert parity_judge.value_of(number(row, "train_loss", 2), record) == 2.0
    assert parity_judge.value_of(number(row, "minutes", 2), record) == pytest.approx(5 / 60)
    content = parity_fakes.result_of(tmp_path, KNOWN[BEST_CELL], test_accuracy=72.0,
                                     val_accuracy=70.0)
    record = content["seeds"]["0"]
    assert parity_judge.value_of(number(BEST_CELL, "kaggle_accuracy"), record) == 72.0
    assert parity_judge.value_of(number(BEST_CELL, "val_accuracy"), record) == 70.0


def test_notes_must_name_a_number_and_give_a_reason(tmp_path):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "notes.csv"
    for line in ("cifar100/nn,test_accuracy,20,report,20,",
                 "cifar100/nn,test_accuracy,20,report,,why",
                 "cifar100/nn,test_accuracy,20,report,low,why",
                 "cifar100/none,test_accuracy,20,report,20,why",
                 "cifar100/nn,test_accuracy,19,report,20,why"):
        path.write_text(f"row,metric,epoch,source,worst,reason\n{line}\n")
        with pytest.raises(UserError, match="every line names one published number"):
            parity_judge.read_notes(tmp_path)


def test_the_page_says_what_is_missing():
    text = parity_page.page(KNOWN, {}, parity_judge.verdicts(KNOWN, COUNTED, {}, {}))
    assert "| `finetune/resnet18` |" in text and "| needs ImageNet weights |" in text
    assert text.count("nothing of it is measured yet") == len(parity_figures.FIGURES)
    assert "Nothing was measured yet." in text and "](figures/" not in text
    for recipe in KNOWN.values():
        assert (f"--rows='{recipe.name}'`" in text) == recipe.needs_run, recipe.name
    published_numbers = [n for n in published.rows() if n.needs != "peer"]
    assert sum(line.startswith("| ") and line.count("|") == 9 and "published" not in line
               and "---" not in line for line in text.splitlines()) == len(published_numbers)


@pytest.mark.parametrize(("row", "metric", "epoch", "ours", "better"), [
    ("cifar100/nn", "test_accuracy", 20, 27.0, False),  # 26
    ("cifar100/nn", "test_accuracy", 20, 27.01, True),
    ("cifar100/cnn/32", "test_accuracy", 20, 31.0, False),  # 28-30
    ("cifar100/cnn/32", "test_accuracy", 20, 31.01, True),
    ("cifar100/cnn/128", "train_loss", 20, 0.111, False),  # 0.160 - 0.05
    ("cifar100/cnn/128", "train_loss", 20, 0.109, True),
    ("googlenet/table1/resnet18", "params", None, 20_000_000, False),
])
def test_better_by_more_than_the_tolerance(row, metric, epoch, ours, better):
    verdict = parity_judge.Verdict(number(row, metric, epoch), row, parity_judge.WITHIN, (ours,),
                                   epochs=KNOWN[row].config.epochs)
    assert parity_judge.is_better(verdict) is better


def test_a_conclusion_stands_beside_the_rows_that_it_speaks_of(tmp_path):
    cell, text = "architectures/cnn/b128_lr0.001_l{}_d0_none", "| CNN: any L2 hurts much |"
    results = {cell.format(0): parity_fakes.result_of(tmp_path, KNOWN[cell.format(0)],
                                                      train_accuracy=90.0, val_accuracy=66.0)}
    assert text not in parity_page.page(KNOWN, results, [])  # nothing to compare it with
    results[cell.format(0.01)] = parity_fakes.result_of(
        tmp_path, KNOWN[cell.format(0.01)], train_accuracy=50.0, val_accuracy=49.0)
    page = parity_page.page(KNOWN, results, [])
    assert (f"{text} dropout 0, augmentation none, L2 0 | 90.00 (1) | 66.00 (1) |\n"
            "|  | dropout 0, augmentation none, L2 0.01 | 50.00 (1) | 49.00 (1) |\n") in page
    assert "| CNN: dropout reduces overfitting |" not in page


def test_the_summary_counts_every_number_once(tmp_path):
    results = {row: parity_fakes.result_of(tmp_path, KNOWN[row], test_accuracy=value)
               for row, value in (("cifar100/nn", 26.0), ("cifar100/cnn/32", 2.0))}
    judged = parity_judge.verdicts(KNOWN, COUNTED, results, {})
    text = parity_page.page(KNOWN, results, judged)
    assert "| cifar100 | 0 of 0 | 16 | 1 of 2 | 0 of 0 | 0 | 0 | 0 | 1 | 12 | 2 | 0 |" in text
    assert "| 26 | 25.00 | 26.00 (1) | +0.00 | yes |" in text
    assert "| 28-30 | 27.00 | 2.00 (1) | -26.00 | **NO** |" in text


def test_the_summary_keeps_short_runs_and_recounts_apart(tmp_path):
    row = "googlenet/table1/mobilenet"
    results = {row: parity_fakes.result_of(tmp_path, KNOWN[row], test_accuracy=60.0,
                                           train_loss=1.2)}
    text = parity_page.page(KNOWN, results, parity_judge.verdicts(KNOWN, COUNTED, results, {}))
    (line,) = [line for line in text.splitlines() if line.startswith("| googlenet |")]
    printed = [v for v in KNOWN.values() if v.name.startswith("googlenet/")
               for v in v.numbers if v.metric == "params" and v.source != "recount"]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1].endswith(f" of {len(printed)}")
    assert cells[3:5] == ["0 of 0", "8 of 8"]


def test_the_command_beside_a_row_trains_it(tmp_path):
    row = "cifar100/nn"
    for seeds in ((0,), (0, 1, 2)):
        results = {row: parity_fakes.result_of(tmp_path, KNOWN[row], seeds, test_accuracy=26.0)}
        text = parity_page.page(KNOWN, results, parity_judge.verdicts(KNOWN, COUNTED, results, {}))
        assert ("| yes | `python -m jaxcifar.main --config=configs/cifar100.py:nn "
                f"--seeds={','.join(map(str, seeds))}` |") in text
        assert "| not measured | `python scripts/parity.py --rows='cifar100/cnn/32'` |" in text


def test_seeds_far_apart_are_named(tmp_path):
    row = "cifar100/nn"
    results = {row: parity_fakes.result_of(tmp_path, KNOWN[row], (0, 1), test_accuracy=26.0)}
    for value, cell in ((27.0, "26.50 +- 0.71 (2)"), (46.0, "36.00 +- 14.14 (2: 26.00, 46.00)")):
        results[row]["seeds"]["1"]["curves"]["test_accuracy"][19] = value
        text = parity_page.page(KNOWN, results, parity_judge.verdicts(KNOWN, COUNTED, results, {}))
        assert f"| {cell} |" in text


def test_seeds_that_stopped_at_different_epochs_are_told_apart(tmp_path):
    content = parity_fakes.result_of(tmp_path, KNOWN[BEST_CELL], (0, 1, 2))
    for seed, epochs in enumerate((37, 30, 37)):
        content["seeds"][str(seed)]["epochs"] = epochs
    results = {BEST_CELL: content}
    text = parity_page.page(KNOWN, results, parity_judge.verdicts(KNOWN, COUNTED, results, {}))
    assert f"| `{BEST_CELL}` | 0, 1, 2 | 37, 30, 37 |" in text


def test_every_commit_of_a_run_is_named(tmp_path):
    row = "cifar100/nn"
    content = parity_fakes.result_of(tmp_path, KNOWN[row])
    folder = tmp_path / row / "seed0"
    result = json.loads((folder / "result.json").read_text())
    result["earlier_environments"] = [{**result["environment"], "git_commit": "f" * 40,
                                       "git_dirty": True}]
    (folder / "result.json").write_text(json.dumps(result))
    content["seeds"]["0"] = parity_results.record(folder)[1]
    text = parity_page.page(KNOWN, {row: content},
                            parity_judge.verdicts(KNOWN, COUNTED, {row: content}, {}))
    assert "| 0.10.2 | ffffffff, 01234567+ |" in text


def test_a_real_run_is_collected_by_its_configuration(tmp_path, monkeypatch):
    small = {"model": config_lib.model("lenet"), "epochs": 1, "augment": ""}
    config = tiny.tiny_config(seed=3, **small)
    for plot in ("samples", "write_plots"):  # half the time, and nothing of them is read
        monkeypatch.setattr(f"jaxcifar.report.run.{plot}", lambda *_: None)
    tiny.fit(config, tmp_path / "runs" / "anything" / "here", monkeypatch)
    recipe = parity_rows.Recipe("x/tiny", "configs/x.py:tiny", tiny.tiny_config(**small),
                                parity_rows.hash_of(config), (), ())
    said = []
    merged = parity_results.collect(tmp_path, {"x/tiny": recipe}, tmp_path / "runs",
                                    say=said.append)
    assert merged == 1 and said == ["x/tiny seed 3: merged"]
    results = parity_results.read(tmp_path)
    record = results["x/tiny"]["seeds"]["3"]
    rows = tiny.rows(tmp_path / "runs" / "anything" / "here")
    assert record["curves"]["train_loss"] == [round(row["train_loss"], 4) for row in rows]
    assert record["values"]["val_accuracy"] == round(rows[-1]["val_accuracy"], 4)
    assert record["params"] > 0 and record["device"]["platform"] == "cpu"
    assert record["versions"]["jax"] and record["seconds"] > 0 and record["seconds_per_epoch"] > 0
    assert parity_results.stale(results, {"x/tiny": recipe}) == []
    assert json.loads((tmp_path / "runs" / "anything" / "here" / "result.json").read_text())[
        "test_accuracy"] == pytest.approx(record["values"]["test_accuracy"], abs=1e-4)
