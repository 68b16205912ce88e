"""What a search declares: its checks, the fields of its trials, the search of the report; files."""

import os
import pathlib
import runpy
import subprocess
import sys

import pytest
from test_configs import load
from test_tune import RATES, recipe, search

from jaxcifar import config as config_lib
from jaxcifar import tune
from jaxcifar.errors import UserError
from jaxcifar.report import study as report
from jaxcifar.search_space import Choice, Float, Int, Search
from jaxcifar.task import create_task

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("entries", "message"), [
    ({"space": {}}, "nothing varies"),
    ({"space": {"optimizer.learning_rat": Float(0, 1)}}, "did you mean 'optimizer.learning_rate'"),
    ({"space": {"batch_size": Float(2, 1)}}, "batch_size = .*low must be at most high"),
    ({"space": {"batch_size": Int(0, 4, log=True)}}, "above 0 with log"),
    ({"space": {"batch_size": Choice(8, 8)}}, "give different values"),
    ({"space": {"o": Choice(a={"optimizer.nam": "sgd"})}}, "did you mean 'optimizer.name'"),
    ({"trial": {"epoch": 1}}, "unknown config field of search_space 'epoch'"),
    ({"trial": {"optimizer.learning_rate": 1.0}}, "in the space and in `trial`"),
    ({"objective": "test_accuracy"}, "there are: train_loss, .*never looks at the test set"),
    ({"trial": {"val_size": 0}}, "unknown objective of search_space 'val_loss'"),
    ({"epoch": "first"}, "unknown epoch of search_space 'first'"),
    ({"pruner": "mean"}, "unknown pruner of search_space 'mean'.*did you mean 'median'"),
])
def test_a_wrong_declaration_is_named(entries, message):
    with pytest.raises(UserError, match=message):
        Search(**({"space": RATES} | entries)).check(recipe())


def test_a_value_of_the_wrong_type_is_named():
    chosen = Search({"batch_size": Choice("many")})
    with pytest.raises(UserError, match="config.batch_size = 'many'"):
        chosen.trial_config(recipe(), {"batch_size": "many"})


def test_fields_of_every_trial_from_the_command_line():
    chosen = tune.with_trial_fields(search(), ["epochs=3", "dtype=bfloat16", "mean=[0, 0, 0.5]"])
    config = chosen.trial_config(recipe(), {name: 0.5 for name in RATES})
    assert (config.epochs, config.dtype, config.epoch_fraction) == (3, "bfloat16", 0.5)
    assert tuple(config.mean) == (0, 0, 0.5)
    with pytest.raises(UserError, match="--trial=epochs: write --trial=FIELD=VALUE"):
        tune.with_trial_fields(search(), ["epochs"])


def test_a_file_without_a_search(tmp_path):
    with pytest.raises(UserError, match="configs/quickstart.py declares no search"):
        tune.load_search(str(ROOT / "configs/quickstart.py"))
    path = tmp_path / "config.py"
    path.write_text("def search_space(variant):\n    return variant\n")
    with pytest.raises(UserError, match="returns str, and must return"):
        tune.load_search(f"{path}:wide")


def test_the_search_of_the_report():
    module = load("se_resnet_search")
    chosen = module.search_space()
    chosen.check(module.get_config())
    space = {name.removeprefix("space "): text for name, text in chosen.to_dict().items()}
    assert space == {
        "model.C1": "16, 32", "model.C2": "32, 64", "model.C3": "64, 128", "model.C4": "128, 256",
        "model.filter_size": "3, 5", "model.shortcut_kernel": "1, 3", "model.pool_size": "2, 4",
        "optimizer.learning_rate": "1e-05 to 0.01, log-uniform", "batch_size": "8, 16, 32",
        "optimizer": "adam (optimizer.name=adam); "
                     "sgd (optimizer.name=sgd, optimizer.momentum=0.9)",
        "objective": "lowest train_loss of the last epoch", "pruner": "median",
        "every trial": "epochs=5, epoch_fraction=0.25, accumulate_steps=4, dtype=bfloat16"}
    assert chosen.trials == 20
    reported = load("se_resnet").get_config()
    reported.selection, reported.test_every_epoch = "last", False
    assert config_lib.to_dict(module.get_config()) == config_lib.to_dict(reported)
    best = {"model.C1": 16, "model.C2": 32, "model.C3": 128, "model.C4": 256,
            "model.filter_size": 3, "model.shortcut_kernel": 1, "model.pool_size": 4,
            "optimizer.learning_rate": 0.00037167893563643987, "batch_size": 16,
            "optimizer": "adam"}
    assert config_lib.to_dict(chosen.full_config(module.get_config(), best)) == (
        config_lib.to_dict(module.get_config()))
    task = create_task(chosen.trial_config(module.get_config(), best | {"optimizer": "sgd"}),
                       50_000, 10)
    assert task.steps_per_epoch == 781 and task.config.optimizer.momentum == 0.9


def test_the_configuration_file_of_any_configuration_reads_back(tmp_path):
    for name, variant in (("architectures", "vit"), ("resnet5m", "model6"), ("cifar100", None)):
        module = load(name)
        config = module.get_config(*[variant] if variant else [])
        path = tmp_path / "config.py"
        path.write_text(report.config_source(config, "Doc."))
        assert config_lib.to_dict(runpy.run_path(str(path))["get_config"]()) == (
            config_lib.to_dict(config))


def test_the_command_line():
    def command(*words):
        return subprocess.run(
            [sys.executable, "-m", "jaxcifar.tune", *words], cwd=ROOT, timeout=120,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    printed = command("--config=configs/se_resnet_search.py", "--space", "--trials=7",
                      "--trial=dtype=float32")
    assert printed.returncode == 0 and "accumulate_steps=4, dtype=float32" in printed.stdout
    assert "1e-05 to 0.01, log-uniform" in printed.stdout
    assert printed.stdout.split()[-1] == "7"
    refused = command("--config=configs/quickstart.py", "--space")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: configs/quickstart.py declares no search")
