"""The speedrun's first layer: its precision in a network of bfloat16; its bias."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_configs import load
from test_speedrun import NUM_TRAIN, small_config

from jaxcifar.models import conv, speedrun_net
from jaxcifar.speedrun import trainer as trainer_lib
from jaxcifar.speedrun import rival, torch_network, training


@pytest.fixture(scope="module")
def whitened():
    """Return images float32 [64, 32, 32, 3], as smooth as photographs, and what whitens them."""
    coarse = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    images = jax.image.resize(coarse, (64, 32, 32, 3), "cubic")
    kernel = speedrun_net.whitening_kernel(images, 5e-4)
    return images, {"kernel": kernel, "bias": jnp.linspace(-0.3, 0.3, 24)}


def test_the_first_layer_is_a_convolution_and_so_are_its_gradients(whitened):
    images, params = whitened
    layer = speedrun_net.Whitening(draw_bias=True, dtype=jnp.float32)
    drawn = layer.init(jax.random.key(0), images)["params"]
    assert jax.tree.map(jnp.shape, drawn) == {"kernel": (2, 2, 3, 24), "bias": (24,)}

    def product(params, images):
        return layer.apply({"params": params}, images)

    def convolution(params, images):
        return conv.conv2d(images, params["kernel"]) + params["bias"]

    with jax.default_matmul_precision("highest"):
        results = []
        for function in (product, convolution):
            y, pull = jax.vjp(function, params, images)
            results.append((y, *pull(jnp.sin(y))))
    assert results[0][0].shape == (64, 31, 31, 24)
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def noise(outputs, exact):
    """Return each filter's root mean square error over that of its values, [24]."""
    outputs = np.asarray(outputs.astype(jnp.float32), np.float64)
    squares = [(x**2).mean((0, 1, 2)) for x in (outputs - exact, exact)]
    return np.sqrt(squares[0] / squares[1])


def test_a_network_of_bfloat16_whitens_in_float32(whitened):
    images, params = whitened
    params = params | {"bias": jnp.zeros(24)}
    model = speedrun_net.SpeedrunNet(channels=(4,), dtype=jnp.bfloat16)
    variables = model.init({"params": jax.random.key(0)}, images, train=False)
    variables["params"]["whiten"] = params
    _, seen = model.apply(variables, images, train=False, mutable=["intermediates"],
                          capture_intermediates=lambda module, _: module.name == "whiten")
    outputs = seen["intermediates"]["whiten"]["__call__"][0]
    assert outputs.dtype == jnp.bfloat16
    exact = (np.asarray(speedrun_net.patches(images), np.float64)
             @ np.asarray(params["kernel"], np.float64).reshape(12, 24))
    half = conv.conv2d(images.astype(jnp.bfloat16), params["kernel"].astype(jnp.bfloat16))
    assert noise(outputs, exact).max() < 0.003, "of the result's rounding alone"
    assert noise(half, exact).max() > 5 * noise(outputs, exact).max()


def test_its_images_arrive_in_float32():
    config = small_config()
    config.dtype = "bfloat16"
    run = training.create(config, NUM_TRAIN, 10)
    seen = []

    class Model:
        def apply(self, variables, images, **options):
            seen.append(images.dtype)
            return run.task.model.apply(variables, images, **options)

    spied = dataclasses.replace(run, task=dataclasses.replace(run.task, model=Model()))
    images = jax.ShapeDtypeStruct((NUM_TRAIN, 32, 32, 3), jnp.uint8)
    labels, seed = (jax.ShapeDtypeStruct(shape, jnp.uint32) for shape in ((NUM_TRAIN,), ()))
    prepared, state = jax.eval_shape(functools.partial(training.start, run), seed, images, labels)
    jax.eval_shape(functools.partial(training.step, spied, True), state, prepared, seed, seed)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    jax.eval_shape(functools.partial(trainer_lib.logits_of, spied, kind="all views"),
                   variables, images, jax.ShapeDtypeStruct((16,), jnp.int32))
    assert len(seen) == 7 and set(seen) == {jnp.dtype("float32")}


@pytest.mark.parametrize("variant", ["94", "94_sgd", "96", "96_selected"])
def test_its_bias_starts_and_goes_on_as_published(variant):
    """Muon's recipe draws it, and has a rate of its own that falls; SGD's start at 0."""
    run = training.create(load("speedrun").get_config(variant), 50_000, 10)
    spec = rival.specification(run, runs=1, platform="cpu", compile_mode="off")
    assert len(spec["bias_shares"]) == run.bias_steps
    share = np.array(spec["bias_shares"])
    for which in (run, run.proxy) if run.proxy else (run,):
        model = which.task.model.clone(channels=(4,))
        first = model.init({"params": jax.random.key(0)}, jnp.zeros((1, 32, 32, 3)), train=False)
        ours = np.asarray(first["params"]["whiten"]["bias"])
        twin = torch_network.create(**spec["model"] | {"channels": (4,)})
        for bias in (ours, twin.whiten.bias.detach().numpy()):
            if variant == "94":
                assert 0.2 < np.abs(bias).max() < 12**-0.5 and len(set(bias.tolist())) == 24
            else:
                assert (bias == 0).all()
    if variant == "94":
        rates = 0.24 * (1 - np.arange(75) / 75)
        np.testing.assert_allclose(share * spec["rates"][:75], rates, rtol=1e-5)
    else:
        np.testing.assert_array_equal(share, 1)
