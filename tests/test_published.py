"""The published numbers: a configuration for each, a number for each configuration, spot checks."""

import pytest
from test_configs import ALL

from jaxcifar import config as config_lib
from jaxcifar.errors import UserError
from jaxcifar.report import published

SELECTED = {"last", "best_val_loss", "best_val_accuracy", "best_test_accuracy"}
METRICS = {"train_loss", "train_accuracy", "val_accuracy", "test_loss", "test_accuracy",
           "kaggle_accuracy", "params", "imagenet_params", "minutes", "seconds_per_epoch", "seconds",
           "pflops"}
GRID = "configs/architectures.py:cnn/"

# Rows without a configuration: the figures of other codebases stand beside ours and are no recipe of
# a report.
WITHOUT_CONFIG = {"peer": [""]}
# Configurations without a number: an alias, what the text claims and the code did not run, what is
# in no report, and the cells of the grid of which the report prints curves or nothing.
ALIASES = {"configs/architectures.py:cnn": f"{GRID}b128_lr0.001_l0_d0.5_basic",
           "configs/architectures.py:cnn_plain": f"{GRID}b128_lr0.001_l0_d0.5_none"}
SPEEDRUN = {f"configs/speedrun.py:{v}" for v in ("94", "94_sgd", "96", "96_selected")}
STANDIN = {f"configs/finetune_standin.py:{v}" for v in ("pretrain", "frozen", "whole", "scratch")}
BEST = {spec for spec in ALL if spec.startswith("configs/resnet5m_best.py:")}
PYTORCH_CIFAR = {spec for spec in ALL if spec.startswith("configs/pytorch_cifar.py:")}
OWN = set()  # a fork's own files: "configs/mine.py:wide"
WITHOUT_NUMBER = {*OWN, "configs/quickstart.py", "configs/se_resnet_search.py", *STANDIN, *SPEEDRUN,
                  "configs/architectures.py:vit/depth6", *BEST, *ALIASES, *PYTORCH_CIFAR}
CELLS = [f"{GRID}b128_lr0.001_l0_{cell}" for cell in (
    "d0_none", "d0.5_none", "d0.5_basic", "d0.5_basic_erasing")]


def find(variant, metric, epoch=None, source="report"):
    """Return the one row of a variant (without "configs/") and a metric."""
    found = [row for row in published.rows(variant=f"configs/{variant}", metric=metric)
             if row.source == source and epoch in (None, row.epoch)]
    assert len(found) == 1, found
    return found[0]


def test_every_row_has_a_configuration_or_says_what_it_needs():
    needs = {}
    for row in published.rows():
        if row.needs:
            needs.setdefault(row.needs, []).append(row.variant)
            assert row.variant not in ALL, f"{row.variant} exists: its row needs nothing more"
        else:
            assert row.variant in ALL, f"{row.variant} has a published number and no configuration"
    needs = {need: list(dict.fromkeys(variants)) for need, variants in needs.items()}
    assert needs == WITHOUT_CONFIG


def test_every_configuration_has_a_row():
    with_number = {row.variant for row in published.rows()}
    silent = set(ALL) - with_number - WITHOUT_NUMBER
    cells = {spec for spec in ALL if spec.startswith(GRID)}
    assert len(cells) == 2 * 3 * 2 * 2 * 3
    assert silent == cells - set(CELLS)
    assert not WITHOUT_NUMBER & with_number


@pytest.mark.parametrize(("alias", "spec"), ALIASES.items())
def test_an_alias_is_the_same_run(alias, spec):
    assert config_lib.config_hash(ALL[alias]) == config_lib.config_hash(ALL[spec])


@pytest.mark.parametrize("row", published.rows(),
                         ids=lambda row: f"{row.variant.removeprefix('configs/')}-{row.metric}")
def test_a_row_agrees_with_its_configuration(row):
    assert row.metric in METRICS
    assert row.upper is None or row.upper > row.value
    assert 0 < row.value <= (100 if row.metric.endswith("accuracy") else float("inf"))
    assert row.source in ("report", "log", "recount")
    if row.needs:
        return
    config = ALL[row.variant]
    assert row.variant.startswith(f"configs/{row.report}.py:")
    if row.measured in SELECTED:
        of_last_epoch = row.measured == "last" and row.epoch == config.epochs
        assert row.measured == config.selection or of_last_epoch
        assert not row.metric.startswith("val_") or config.val_size
    else:
        assert row.measured == ("counted" if row.is_count else "clock")
    if row.epoch:
        assert row.epoch <= config.epochs
        assert config.test_every_epoch or not row.metric.startswith("test_")
        assert row.table == "table1" or row.epoch == config.epochs


def test_a_number_occurs_once():
    keys = [(row.variant, row.metric, row.epoch, row.source)
            for row in published.rows() if row.needs != "peer"]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("variant", "metric", "epoch", "value"), [
    ("googlenet.py:table1/senet18", "train_loss", 1, 1.571),
    ("googlenet.py:table1/densenet121", "test_accuracy", 2, 62.91),
    ("googlenet.py:table1/mobilenetv2", "params", None, 2296922),
    ("googlenet.py:table2/k3_k5_0_5_p2_k5", "test_accuracy", 8, 68.03),
    ("googlenet.py:table3/k5_0_5/lr0.1_wd5e-3", "test_accuracy", 10, 43.01),
    ("googlenet.py:table3/0_5_v5/lr0.05_wd5e-5", "train_accuracy", 10, 89.91),
    ("resnet5m.py:model1", "test_accuracy", None, 94.63),
    ("resnet5m.py:model4", "test_loss", None, 0.535),
    ("resnet5m.py:model6", "val_accuracy", 150, 93.79),
    ("resnet5m.py:optimizer/adamw", "test_accuracy", None, 76.26),
    ("resnet5m.py:shortcut/k3", "test_accuracy", None, 81.21),
    ("resnet5m.py:blocks/4332", "test_accuracy", None, 92.90),
    ("cifar100.py:cnn/256", "train_loss", 20, 0.077),
    ("cifar100.py:cnn/crop", "test_accuracy", 20, 39),
    ("cifar100.py:own", "test_accuracy", None, 60),
    ("se_resnet.py:best", "test_accuracy", None, 84.098),
    ("architectures.py:cnn/b128_lr0.001_l0_d0.5_basic", "kaggle_accuracy", None, 72.52),
    ("architectures.py:finetune/mobilenet_v3_small", "kaggle_accuracy", None, 83.16),
])
def test_a_number_is_the_report_s(variant, metric, epoch, value):
    assert find(variant, metric, epoch).value == value


def test_what_is_not_exact_says_so():
    assert find("resnet5m.py:model6", "test_accuracy", source="log").value == 92.92
    filters = find("cifar100.py:cnn/32", "test_accuracy")
    assert (filters.value, filters.upper, filters.approximate) == (28, 30, True)
    assert find("architectures.py:vit", "val_accuracy").approximate
    assert not find("architectures.py:vit", "kaggle_accuracy").approximate
    assert find("googlenet.py:long", "test_accuracy").approximate


def test_rows_are_filtered_by_report():
    expected = {
        "googlenet": 6 * 10 + (7 * 2 + 2) + 10 * 2 + 2,  # tables 1, 2 (two recounts), 3, long run
        "resnet5m": 6 * 3 + 3 + 3 + 5 * 2 + (3 * 2 + 1) + (7 * 2 + 1),
        "cifar100": 16,
        "se_resnet": 1,
        "architectures": 5 + 5 + 2 + 7,  # experiments 1 to 4
        "peers": 14 + 11,
    }
    counts = {report: len(published.rows(report)) for report in expected}
    assert counts == expected
    assert sum(counts.values()) == len(published.rows())
    with pytest.raises(UserError, match="unknown report 'resnet5'.*did you mean 'resnet5m'"):
        published.rows("resnet5")
