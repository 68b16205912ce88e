"""The page of models: counts that are known, and a page that is up to date."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest
from test_zoo_mobile import ZOO
from twins_classic import MODELS

from jaxcifar import models
from jaxcifar.models import conv, counts
from jaxcifar.report import measured, models_page, parity_rows

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"


def test_convolutions_and_products_are_counted():
    image, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 6))
    grouped = jnp.zeros((3, 3, 2, 6))

    @jax.jit
    def function(x, kernel, grouped):
        y = conv.conv2d(x, kernel, padding=((1, 1), (1, 1)))
        z = conv.conv2d(x, grouped, stride=(2, 2), padding=((1, 1), (1, 1)), groups=2)
        return y.reshape(2, -1) @ jnp.zeros((8 * 8 * 6, 5)), z

    expected = 2 * 8 * 8 * 6 * 9 * 4 + 2 * 4 * 4 * 6 * 9 * 2 + 2 * 5 * 8 * 8 * 6
    assert counts.multiply_adds(function, image, kernel, grouped) == expected


def test_resnet18_does_the_work_that_its_layers_add_up_to():
    stem, head = 32 * 32 * 27 * 64, 512 * 10
    stages = 4 * 32 * 32 * 9 * 64 * 64  # four convolutions, no shortcut
    for width, size in ((128, 16), (256, 8), (512, 4)):
        stages += size * size * (9 * width * (width // 2 + 3 * width) + width * (width // 2))
    assert models_page.describe("resnet18")["multiply_adds"] == stem + stages + head


@pytest.fixture(scope="module")
def what_was_measured():
    return measured.accuracies(ROOT), measured.training_speeds(ROOT)


@pytest.mark.parametrize("name", ["resnet5m", "lenet", "mobilenet", "vit", "mlp_s"])
def test_the_page_has_the_current_line(name, what_was_measured):
    accuracies, speeds = what_was_measured
    line = models_page.line(name, accuracies.get(name, ""), speeds.get(name, ""))
    assert line in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_the_numbers_of_parameters_that_the_originals_have():
    counted = {name: count for name, (count, _) in MODELS.items()}
    counted |= {name: count for name, (_, _, count) in ZOO.items()}
    text = PAGE.read_text(encoding="utf-8")
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert len(counted) > 30
    for name, count in counted.items():
        assert lines[name].split(" | ")[2] == f"{count:,}", name


def test_the_page_has_every_model_with_what_was_measured_of_it(what_was_measured):
    accuracies, speeds = what_was_measured
    lines = {line.split("`")[1]: line for line in PAGE.read_text(encoding="utf-8").splitlines()
             if line.startswith("| `")}
    assert set(lines) == set(models.names())
    for name, line in lines.items():
        expected = f"| {accuracies.get(name, '')} | {speeds.get(name, '')} |"
        assert line.endswith(expected), f"{name}: scripts/models_page.py writes {expected}"


def test_multiply_adds_do_not_depend_on_how_a_convolution_is_computed():
    image = jax.ShapeDtypeStruct((1, 8, 8, 6), jnp.float32)
    for groups in (6, 2):
        kernel = jax.ShapeDtypeStruct((3, 3, 6 // groups, 6), jnp.float32)

        def convolve(x, k):
            return conv.conv2d(x, k, padding=((1, 1), (1, 1)), groups=groups)

        assert counts.multiply_adds(convolve, image, kernel) == 8 * 8 * 6 * 9 * 6 // groups


@pytest.fixture
def repository(tmp_path):
    """A repository with configs/ and no results yet."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "results" / "architectures").mkdir(parents=True)
    return tmp_path


def write_result(repository, row, *accuracies, epochs=2, config_hash=None, **values):
    known = parity_rows.recipes(repository)
    seeds = {str(seed): {"values": {"test_accuracy": value, **values}, "epochs": epochs}
             for seed, value in enumerate(accuracies)}
    path = repository / "results" / f"{row}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    config_hash = config_hash or known[row].hash
    path.write_text(json.dumps({"row": row, "config_hash": config_hash, "seeds": seeds}))


def test_the_best_recipe_of_a_model_as_registered_counts(repository):
    write_result(repository, "cifar100/cnn/flip", 31.0, 33.0, epochs=20)
    write_result(repository, "cifar100/cnn/crop", 36.0, epochs=20)  # of one seed only
    write_result(repository, "cifar100/own", 62.0, epochs=12)  # a resnet18 of other options
    write_result(repository, "googlenet/table1/resnet18", 50.0)
    expected = {"cifar100_cnn": "32.00 (20 epochs, 2 seeds, CIFAR-100, `cifar100/cnn/flip`)",
                "resnet18": "50.00 (2 epochs, 1 seed)"}
    assert measured.accuracies(repository) == expected
    write_result(repository, "cifar100/cnn/crop", 34.0, 35.0, epochs=20)
    expected["cifar100_cnn"] = "34.50 (20 epochs, 2 seeds, CIFAR-100, `cifar100/cnn/crop`)"
    assert measured.accuracies(repository) == expected
    write_result(repository, "cifar100/cnn/128", 90.0, config_hash="of an older configuration")
    write_result(repository, "cifar100/gone", 90.0, config_hash="of a row that was removed")
    assert measured.accuracies(repository) == expected


def test_where_there_is_validation_it_chooses_the_recipe(repository):
    cell = "architectures/cnn/b{}_lr0.001_l0_d0_none"
    write_result(repository, cell.format(64), 64.0, epochs=30, val_accuracy=66.0)
    write_result(repository, cell.format(128), 65.0, epochs=30, val_accuracy=65.0)
    assert measured.accuracies(repository)["cnn3"] == (
        f"64.00 (30 epochs, 1 seed, `{cell.format(64)}`)")


def test_speeds_are_those_of_our_training_steps(repository):
    row = {"model": "lenet", "kind": "step", "contender": "jaxcifar", "images_per_second": 1234.5,
           "ratio": {"torch_eager": 2.0}, "ratio_by_cpu_time": {"torch_eager": 1.5},
           "environment": {"device": "gpu X"}}
    alone = row | {"model": "vgg11", "ratio": {}, "ratio_by_cpu_time": {}}
    by_wall_time = row | {"model": "vgg16", "ratio_by_cpu_time": {}}
    ignored = [row | {"kind": "epoch"}, row | {"contender": "torch_eager"},
               {"model": "vgg13", "kind": "step", "contender": "jaxcifar", "error": "out of memory"}]
    (repository / "results" / "benchmark_x.json").write_text(
        json.dumps({"threads": 1, "rows": [*ignored, row, alone, by_wall_time, *ignored]}))
    assert measured.training_speeds(repository) == {
        "lenet": "1,234 on gpu X (1 core), 1.50x PyTorch", "vgg11": "1,234 on gpu X (1 core)",
        "vgg16": "1,234 on gpu X (1 core), 2.00x PyTorch"}
