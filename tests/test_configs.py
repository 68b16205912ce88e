"""Every configuration file and variant: valid, and its model builds."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxcifar import config as config_lib
from jaxcifar import models
from jaxcifar.errors import UserError
from jaxcifar.report import published
from jaxcifar.task import create_task

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
PARAMS = {"model1": 4951338, "model2": 4915754, "model3": 4988586, "model4": 4951338,
          "model5": 4970154, "model6": 4951338}


def load(name):
    """Import configs/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def every_variant():
    """Return (file, variant) of every configuration there is."""
    cases = []
    for path in sorted(CONFIGS.glob("*.py")):
        module = load(path.stem)
        cases += [(path.stem, variant) for variant in getattr(module, "VARIANTS", (None,))]
    return cases


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_a_configuration_builds(name, variant):
    module = load(name)
    config = module.get_config(variant) if variant else module.get_config()
    config_lib.validate(config)
    task = create_task(config, num_train=45_000, num_classes=10)
    shapes = jax.eval_shape(lambda: task.model.init(
        {"params": jax.random.key(0)}, jnp.zeros((2, 32, 32, 3)), train=False))
    if variant in PARAMS and name == "resnet5m":
        assert models.count_params(shapes["params"]) == PARAMS[variant]
    logits = jax.eval_shape(lambda v: task.model.apply(v, jnp.zeros((2, 32, 32, 3)), train=False),
                            shapes)
    assert logits.shape == (2, 10)
    if config.reference_curve:
        assert len(published.reported_curve(config.reference_curve)) == config.epochs


def test_resnet5m_takes_704_steps_of_64():
    config = load("resnet5m").get_config()
    task = create_task(config, num_train=45_000, num_classes=10)
    assert (task.steps_per_epoch, task.tail_size) == (704, 8)


def test_configuration_files_stay_short_and_say_how_to_run_them():
    for path in CONFIGS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60, path.name
        assert f"--config=configs/{path.name}" in text, path.name


@pytest.mark.parametrize(("change", "message"), [
    ({"selection": "best_val_los"}, "did you mean 'best_val_loss'"),
    ({"epochs": 0}, "config.epochs = 0: must be at least 1"),
    ({"dtype": "float16"}, "there are: float32, bfloat16"),
    ({"val_size": 0, "selection": "best_val_loss"}, "config.selection"),
    ({"steps_per_call": "many"}, "config.steps_per_call"),
    ({"label_smoothing": 1.0}, r"config.label_smoothing = 1.0: must be in \[0, 1\)"),
])
def test_a_wrong_value_is_named(change, message):
    config = config_lib.default()
    config.update(change)
    with pytest.raises(UserError, match=message):
        config_lib.validate(config)


@pytest.mark.parametrize(("change", "message"), [
    ({"model.name": "resnet5n"}, "did you mean 'resnet5m'"),
    ({"optimizer.name": "adan"}, "did you mean 'adam'"),
    ({"schedule.name": "cosin"}, "did you mean 'cosine'"),
    ({"augment": "flop"}, "flip"),
    ({"schedule.gamma": 0.5}, "config.schedule.gamma = 0.5 has no effect on schedule 'constant'"),
    ({"max_params": 1000}, "more than config.max_params = 1,000"),
])
def test_a_wrong_name_is_named(change, message):
    config = config_lib.default()
    for path, value in change.items():
        *parents, name = path.split(".")
        target = config
        for parent in parents:
            target = target[parent]
        target[name] = value
    with pytest.raises(UserError, match=message):
        config_lib.validate(config)
        create_task(config, num_train=100, num_classes=10)


def test_an_unknown_field_suggests_the_nearest():
    config = config_lib.default().unlock()
    config.batch_sise = 64
    with pytest.raises(UserError, match="unknown field in config 'batch_sise'.*'batch_size'"):
        config_lib.validate(config)


def test_the_hash_sees_results_not_speed():
    config, other = config_lib.default(), config_lib.default()
    other.num_devices, other.steps_per_call, other.data_dir = 8, "16", "elsewhere"
    assert config_lib.config_hash(config) == config_lib.config_hash(other)
    other.seed = 1
    assert config_lib.config_hash(config) != config_lib.config_hash(other)
