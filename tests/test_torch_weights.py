"""Weights in and out of PyTorch: one rule set, exact round trips, errors that list everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_twins import CNN3, ResNet, randomized

from jaxcifar import models, torch_weights
from jaxcifar.errors import UserError

SMALL = {"channels": (4, 6), "blocks": (2, 1), "stem_width": 4, "shortcut_kernel": 3}


def small_twin():
    torch.manual_seed(0)
    return randomized(ResNet(num_classes=7, **SMALL))


def small_variables():
    return torch_weights.from_torch(
        "resnet5m", small_twin().state_dict(), num_classes=7, **SMALL)


def test_state_dict_survives_the_round_trip_exactly():
    original = small_twin().state_dict()
    variables = torch_weights.from_torch("resnet5m", original, num_classes=7, **SMALL)
    back = torch_weights.to_torch("resnet5m", variables, num_classes=7, **SMALL)
    assert set(back) == set(original)
    for key, value in original.items():
        assert back[key].dtype == value.numpy().dtype
        np.testing.assert_array_equal(back[key], value.numpy(), err_msg=key)


def test_variables_survive_the_round_trip_exactly_and_load_into_torch():
    model = models.create("cnn3", hidden=[16])
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), images, train=False))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    state_dict = torch_weights.to_torch("cnn3", variables, hidden=[16])
    twin = CNN3(hidden=(16,))
    twin.load_state_dict({key: torch.from_numpy(value) for key, value in state_dict.items()})
    back = torch_weights.from_torch("cnn3", twin.state_dict(), hidden=[16])
    assert jax.tree.structure(back) == jax.tree.structure(dict(variables))
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))


def test_layouts_and_names():
    variables = small_variables()
    params, stats = variables["params"], variables["batch_stats"]
    assert params["layer2.0"]["shortcut.0"]["kernel"].shape == (3, 3, 4, 6)
    assert params["linear"]["kernel"].shape == (6, 7)
    assert stats["layer2.0"]["shortcut.1"]["var"].shape == (6,)
    key = torch_weights.torch_key(("batch_stats", "layer1.1", "bn2", "mean"))
    assert key == "layer1.1.bn2.running_mean"
    tracked = torch_weights.to_torch(
        "resnet5m", variables, num_classes=7, num_batches_tracked=50, **SMALL)
    assert tracked["bn1.num_batches_tracked"] == 50


def test_every_difference_is_listed_in_one_error():
    state_dict = small_twin().state_dict()
    del state_dict["bn1.bias"]
    state_dict["extra.weight"] = torch.zeros(2)
    state_dict["linear.weight"] = torch.zeros(10, 6)
    with pytest.raises(UserError) as raised:
        torch_weights.from_torch("resnet5m", state_dict, num_classes=7, **SMALL)
    message = str(raised.value)
    assert "missing bn1.bias (4,)" in message
    assert "unexpected extra.weight (2,)" in message
    assert "linear.weight has shape (10, 6), expected (7, 6)" in message
    assert message.count(";") == 2 and "\n" not in message


@pytest.mark.parametrize("extra", [{}, {"criterion.weight": torch.ones(7)}])
def test_a_part_that_all_keys_share_is_named_alone(extra):
    state_dict = {f"net.{key}": value for key, value in small_twin().state_dict().items()} | extra
    with pytest.raises(UserError, match=r"its keys begin with 'net.'. Save it without that") as raised:
        torch_weights.from_torch("resnet5m", state_dict, num_classes=7, **SMALL)
    advice = str(raised.value).partition("without that: ")[2]
    stripped = eval(advice, {"state_dict": state_dict})  # what the message says to do
    torch_weights.from_torch("resnet5m", stripped, num_classes=7, **SMALL)


def test_a_key_that_fits_by_chance_is_no_prefix():
    state_dict = {f"block.{key}": torch.zeros(1) for key in ("conv1.weight", "other.weight")}
    with pytest.raises(UserError, match="does not fit model 'resnet5m': missing "):
        torch_weights.from_torch("resnet5m", state_dict, num_classes=7, **SMALL)


def test_a_long_list_of_differences_is_cut():
    state_dict = small_twin().state_dict() | {f"extra.{i}": torch.zeros(1) for i in range(23)}
    with pytest.raises(UserError, match="unexpected extra.19 .1,.; and 3 more$"):
        torch_weights.from_torch("resnet5m", state_dict, num_classes=7, **SMALL)


def test_variables_of_another_model_are_refused():
    variables = small_variables()
    with pytest.raises(UserError, match=r"linear/kernel has shape \(6, 7\), expected \(6, 10\)"):
        torch_weights.to_torch("resnet5m", variables, **SMALL)


def test_half_precision_tensors_become_float32():
    state_dict = {key: value.bfloat16() if value.is_floating_point() else value
                  for key, value in small_twin().state_dict().items()}
    variables = torch_weights.from_torch("resnet5m", state_dict, num_classes=7, **SMALL)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
