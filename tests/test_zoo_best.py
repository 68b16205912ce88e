"""configs/resnet5m_best.py: its networks beside torch twins, their randomness, its recipe."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_configs import load
from test_invariants import StopAfter, assert_same_bits
from test_zoo_classic import (FAST_COMPILE, assert_count_and_shapes, assert_same_logits,
                              assert_same_training, batch, compiled, make_pair, noise, training)
from twins_best import ShakeShake, WideResNet

from jaxcifar import config as config_lib
from jaxcifar import models, train
from jaxcifar.errors import UserError
from jaxcifar.models import counts, layers, shake_shake, wide_resnet

WIDE = {"depth": 28, "width": 3.5, "se_reduction": 8, "stochastic_depth": 0.1}
NETWORKS = [  # name, options, parameters, twin
    ("shake_shake26_2x32d", {}, 2_923_162, ShakeShake),
    ("shake_shake26_2x32d", {"width": 40}, 4_561_354, functools.partial(ShakeShake, width=40)),
    ("wide_resnet28_10", WIDE, 4_548_094, WideResNet),
]
SMALL_SHAKE = {"depth": 8, "width": 4}
SMALL_WIDE = {"depth": 10, "width": 0.5, "se_reduction": 4}
BEST = load("resnet5m_best")
FINAL = [name for name in BEST.VARIANTS if not name.startswith("select/")]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(("name", "options", "count", "twin"), NETWORKS)
def test_counts_names_and_shapes(name, options, count, twin):
    assert_count_and_shapes(name, options, count, twin)


@pytest.mark.parametrize(("name", "options", "twin"), [
    (name, options, twin) for name, options, _, twin in NETWORKS if options != {"width": 40}])
def test_logits_in_evaluation(name, options, twin, sample_images):
    torch.manual_seed(0)
    images = batch(sample_images, 2)
    pair = make_pair(name, options, with_halves(twin(), 2), images)
    assert_same_logits(pair, images)


def with_halves(twin, count):
    """Give a Shake-Shake twin the coefficients 1/2, for a pass that calibrates BatchNorms."""
    if isinstance(twin, ShakeShake):
        for block in twin.blocks():
            block.coefficients = torch.full((2, count), 0.5)
    return twin


def small_pair(name, options, twin, count=4):
    torch.manual_seed(0)
    return make_pair(name, options, with_halves(twin, count), noise(count))


def test_shake_shake_trains_as_the_twin_with_the_same_coefficients(monkeypatch):
    pair = small_pair("shake_shake26_2x32d", SMALL_SHAKE, ShakeShake(**SMALL_SHAKE))
    plain, drawn = shake_shake.shake, []

    def recorded(a, b, alpha, beta):
        drawn.append((alpha.ravel(), beta.ravel()))
        return plain(a, b, alpha, beta)
    monkeypatch.setattr(shake_shake, "shake", recorded)

    def step(variables, images, labels):
        drawn.clear()
        return training(pair.model(), variables, images, labels), list(drawn)
    args = pair.variables, noise(4), np.arange(4)
    (grads, (logits, new)), coefficients = compiled(step, *args)(*args)
    assert len({tuple(map(float, alpha)) for alpha, _ in coefficients}) == 3  # one draw per block
    for block, values in zip(pair.twin.blocks(), coefficients, strict=True):
        block.coefficients = [torch.from_numpy(np.array(v)).double() for v in values]
    assert_same_training(pair, grads, logits, new)


def test_a_wide_resnet_with_se_and_stochastic_depth_trains_as_the_twin(monkeypatch):
    options = SMALL_WIDE | {"stochastic_depth": 0.6}
    pair = small_pair("wide_resnet28_10", options, WideResNet(10, 0.5, 4))
    rates, kept = [], []

    class Recorded(layers.Dropout):
        @nn.compact
        def __call__(self, x, train):
            y = super().__call__(x, train)
            if self.broadcast_dims:
                rates.append(self.rate)
                kept.append(jnp.where(jnp.any(y != 0, (1, 2, 3)), 1 / (1 - self.rate), 0))
            return y
    monkeypatch.setattr(wide_resnet.layers, "Dropout", Recorded)

    def step(variables, images, labels):
        rates.clear(), kept.clear()
        return training(pair.model(), variables, images, labels), list(kept)
    args = pair.variables, noise(4), np.arange(4)
    (grads, (logits, new)), factors = compiled(step, *args)(*args)
    assert rates == pytest.approx([0.2, 0.4, 0.6])  # l / L of the last block's
    assert 0 < np.count_nonzero(factors) < 12, "some branches are left out, some are not"
    for block, factor in zip(pair.twin.blocks(), factors, strict=True):
        block.keep = torch.from_numpy(np.array(factor)).double()
    assert_same_training(pair, grads, logits, new)


def mixed(count, seed=0, train=True, dtype=jnp.float32):
    """Mix branches of 1 and 0; return the output and the gradients in both, [count, 2, 2, 3]."""
    ones = jnp.ones((count, 2, 2, 3), dtype)

    def total(a, b):
        rngs = {"dropout": jax.random.key(seed)}
        out = shake_shake.ShakeShake().apply({}, a, b, train, rngs=rngs)
        return out.astype(jnp.float32).sum(), out
    (to_a, to_b), out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(ones, 0 * ones)
    return [np.asarray(x, np.float32) for x in (out, to_a, to_b)]


def test_coefficients_are_uniform_per_image_and_independent_backward():
    out, to_a, to_b = mixed(4000)
    for values in (out, to_a, to_b):  # one number for each image
        np.testing.assert_array_equal(values, np.broadcast_to(values[:, :1, :1, :1], values.shape))
    np.testing.assert_allclose(to_a + to_b, 1, atol=1e-6)
    alpha, beta = out[:, 0, 0, 0], to_a[:, 0, 0, 0]
    grid = np.arange(1, 4001) / 4000
    for values in (alpha, beta):
        assert np.abs(np.sort(values) - grid).max() < 1.63 / np.sqrt(4000)  # Kolmogorov's 1%
    assert abs(np.corrcoef(alpha, beta)[0, 1]) < 0.05
    other = mixed(4000, seed=1)[0][:, 0, 0, 0]
    assert abs(np.corrcoef(alpha, other)[0, 1]) < 0.05


def test_an_image_s_coefficients_do_not_depend_on_the_batch_around_it():
    for long, short in zip(mixed(16), mixed(4)):
        np.testing.assert_array_equal(long[:4], short)


def test_evaluation_takes_the_mean_of_the_branches():
    for values in mixed(5, train=False):
        np.testing.assert_array_equal(values, np.full((5, 2, 2, 3), 0.5))


def test_coefficients_are_mixed_in_bfloat16_as_in_float32():
    ones = jnp.ones((5, 2, 2, 3), jnp.bfloat16)
    assert shake_shake.shake(ones, ones, jnp.float32(0.3), jnp.float32(0.3)).dtype == jnp.bfloat16
    for half, full in zip(mixed(5, dtype=jnp.bfloat16), mixed(5), strict=True):
        np.testing.assert_allclose(half, full, rtol=0, atol=2 ** -8)


def test_bfloat16_is_near_float32():
    pair = small_pair("shake_shake26_2x32d", SMALL_SHAKE, ShakeShake(**SMALL_SHAKE))
    images = noise(4)
    logits = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = pair.model(dtype)
        forward = compiled(lambda v, x: model.apply(v, x, train=False), pair.variables, images)
        logits.append(forward(pair.variables, images))
    scale = np.abs(logits[0]).max()
    assert logits[1].dtype == jnp.float32 and not np.array_equal(*logits)
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=0.1 * scale)


def test_two_devices_give_what_one_gives():
    pair = small_pair("shake_shake26_2x32d", SMALL_SHAKE, ShakeShake(**SMALL_SHAKE), 8)
    images, labels, variables = noise(8), np.arange(8), pair.variables

    def step(variables, images, labels, axis_name=None):
        with layers.batch_context(axis_name=axis_name, bn_axis_name=axis_name):
            grads, (logits, _) = training(pair.model(), variables, images, labels)
        return grads, logits
    one_grads, one = compiled(step, variables, images, labels)(variables, images, labels)
    shared = jax.pmap(functools.partial(step, axis_name="data"), "data", in_axes=(None, 0, 0),
                      devices=jax.devices()[:2])
    halves = variables, images.reshape(2, 4, 32, 32, 3), labels.reshape(2, 4)
    two_grads, two = shared.lower(*halves).compile(compiler_options=FAST_COMPILE)(*halves)
    np.testing.assert_allclose(two.reshape(8, 10), one, rtol=1e-4, atol=1e-4)
    largest = max(float(np.abs(grad).max()) for grad in jax.tree.leaves(one_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        np.mean(a, 0), b, rtol=1e-3, atol=1e-4 * largest), two_grads, one_grads)


def small_recipe():
    """Return the default with a network of 12,000 parameters, 3 epochs of 3 steps, less AutoAugment.

    (tests/test_invariants.py resumes a run with AutoAugment, which takes long to compile.)
    """
    config = BEST.get_config()
    config.augment = "crop(4)|flip|normalize|cutout(16)"
    config.model.update(SMALL_SHAKE)
    config.update(epochs=3, batch_size=40, save_every_epochs=1, eval_batch_size=50, num_devices=1,
                  compilation_cache=tiny.CACHE, tensorboard=False)
    config.schedule.warmup_epochs = 0.5
    return config


def test_the_recipe_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole, rows = tiny.fit(small_recipe(), tmp_path / "whole", monkeypatch)
    cosine = [0.1 * (1 + np.cos(np.pi * (step - 2) / 7)) for step in (3, 6)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.1, *cosine])
    with pytest.raises(train.Interrupted):
        tiny.fit(small_recipe(), tmp_path / "parts", monkeypatch, stop=StopAfter(5))
    parts, part_rows = tiny.fit(small_recipe(), tmp_path / "parts", monkeypatch)
    assert part_rows == rows
    assert_same_bits(parts.state, whole.state)
    assert whole.result["selection"] == {"rule": "last", "epoch": 3, "uses_test_set": False}
    assert parts.result["test_accuracy"] == whole.result["test_accuracy"]


@pytest.mark.parametrize("variant", FINAL)
def test_a_selection_run_differs_in_its_validation_set_only(variant):
    final, select = BEST.get_config(variant), BEST.get_config(f"select/{variant}")
    fields = [config_lib.flatten(config_lib.to_dict(c)) for c in (final, select)]
    assert config_lib.differences(*fields) == ["config.val_size: 5000 there, 0 here"]
    assert final.selection == "last" and not final.test_every_epoch
    assert final.max_params == 4_999_999


def test_the_docstring_says_the_sizes_and_the_cost():
    assert BEST.get_config().to_json() == BEST.get_config(FINAL[0]).to_json()
    for variant in ("shake", "wide"):
        config = BEST.get_config(variant)
        options = config.model.to_dict()
        model = models.create(options.pop("name"), **options)
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
        count = counts.multiply_adds(
            lambda v, x: model.apply(v, x, train=False), variables, image)
        assert round(count / 1e9, 2) == {"shake": 0.66, "wide": 0.65}[variant]
        assert round(6 * 50_000 * count * config.epochs / 150e12 / 60) == 13  # minutes
        assert f"{models.count_params(variables['params']):,}" in BEST.__doc__


@pytest.mark.parametrize(("name", "options", "message"), [
    ("shake_shake26_2x32d", {"depth": 28}, r"depth is 28: give 6 n \+ 2"),
    ("shake_shake26_2x32d", {"depth": 2}, r"depth is 2: give 6 n \+ 2"),
    ("shake_shake26_2x32d", {"width": 33}, "width is 33: give an even number"),
    ("shake_shake26_2x32d", {"width": 32.0}, "width is 32.0: give an integer"),
    ("wide_resnet28_10", {"width": 3.3}, "width is 3.3: give a number above 0 by which 16"),
    ("wide_resnet28_10", {"width": 0}, "width is 0: give a number above 0"),
    ("wide_resnet28_10", {"width": 1, "se_reduction": 32}, "channels // se_reduction is 0"),
    ("wide_resnet28_10", {"se_reduction": -1}, "se_reduction is -1"),
    ("wide_resnet28_10", {"stochastic_depth": 1.0}, "stochastic_depth is 1.0: give a number"),
])
def test_bad_options_are_one_line(name, options, message):
    model = models.create(name, **options)
    with pytest.raises(UserError, match=message) as raised:
        jax.eval_shape(lambda: model.init(
            jax.random.key(0), jnp.zeros((2, 32, 32, 3)), train=False))
    assert "\n" not in str(raised.value)
