"""Layers against torch's own: values, gradients, running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jaxcifar.models import layers


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def assert_close(actual, expected, scale=1e-5):
    """Compare within `scale` of the expected array's largest entry."""
    expected = np.asarray(expected)
    atol = scale * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def compare(function, torch_function, x):
    """Compare values and input gradients of a function of maps, under one random cotangent."""
    ours, pullback = jax.vjp(jax.jit(function), jnp.asarray(x))
    inputs = nchw(x).requires_grad_()
    theirs = torch_function(inputs)
    assert_close(ours, nhwc(theirs))
    cotangent = draw(*ours.shape, seed=7)
    theirs.backward(nchw(cotangent))
    assert_close(pullback(cotangent)[0], nhwc(inputs.grad))


@pytest.mark.parametrize("kernel,stride,padding,groups,bias", [
    (3, 1, 1, 1, False), (3, 2, 1, 1, True), (1, 2, 0, 1, False), (2, 2, 0, 1, True),
    (5, 1, 2, 1, False), (3, 1, 1, 4, True), (3, 2, 1, 8, False),
    ((1, 3), (1, 2), (0, 1), 2, True)])
def test_convolution(kernel, stride, padding, groups, bias):
    x = draw(2, 8, 8, 8)
    twin = torch.nn.Conv2d(8, 16, kernel, stride, padding, groups=groups, bias=bias)
    layer = layers.Conv(16, kernel, stride, padding, groups, use_bias=bias)
    params = {"kernel": np.moveaxis(twin.weight.detach().numpy(), (0, 1), (-1, -2))}
    if bias:
        params["bias"] = twin.bias.detach().numpy()
    compare(lambda x: layer.apply({"params": params}, x), twin, x)
    cotangent = draw(*layer.apply({"params": params}, x).shape, seed=5)
    grads = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x) * cotangent))(params)
    twin.zero_grad()
    twin(nchw(x)).backward(nchw(cotangent))
    assert_close(grads["kernel"], np.moveaxis(twin.weight.grad.numpy(), (0, 1), (-1, -2)))
    if bias:
        assert_close(grads["bias"], twin.bias.grad.numpy())


def test_linear():
    x, twin = draw(5, 12), torch.nn.Linear(12, 7)
    params = {"kernel": twin.weight.detach().numpy().T, "bias": twin.bias.detach().numpy()}
    assert_close(layers.Linear(7).apply({"params": params}, x), twin(torch.from_numpy(x)).detach())


@pytest.mark.parametrize("shape", [(6, 4, 4, 3), (10, 3)], ids=["2d", "1d"])
def test_batch_norm_over_three_steps_and_in_evaluation(shape):
    twin = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(3)
    with torch.no_grad():
        twin.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        twin.bias.copy_(torch.tensor([0.1, -0.3, 1.0]))
    variables = {
        "params": {"scale": twin.weight.detach().numpy(), "bias": twin.bias.detach().numpy()},
        "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    layer = layers.BatchNorm()
    for step in range(3):
        x = draw(*shape, seed=step) * 3 + 2
        y, new = layer.apply(variables, x, True, mutable=["batch_stats"])
        variables = variables | new
        assert_close(y, nhwc(twin(nchw(x))))
        assert_close(variables["batch_stats"]["mean"], twin.running_mean)
        assert_close(variables["batch_stats"]["var"], twin.running_var)
    twin.eval()
    assert_close(layer.apply(variables, x, False), nhwc(twin(nchw(x))))


def test_batch_norm_gradients():
    x, twin = draw(6, 4, 4, 3) * 2 + 1, torch.nn.BatchNorm2d(3)
    variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
                 "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}

    def apply(params, x):
        return layers.BatchNorm().apply(
            variables | {"params": params}, x, True, mutable=["batch_stats"])[0]
    compare(lambda x: apply(variables["params"], x), twin, x)
    cotangent = draw(*x.shape, seed=7)
    grads = jax.grad(lambda p: jnp.sum(apply(p, x) * cotangent))(variables["params"])
    assert_close(grads["scale"], twin.weight.grad)
    assert_close(grads["bias"], twin.bias.grad)


def test_batch_norm_without_affine_parameters():
    layer, x = layers.BatchNorm(affine=False), draw(6, 4, 4, 3)
    variables = layer.init(jax.random.key(0), x, False)
    assert set(variables) == {"batch_stats"}
    y, _ = layer.apply(variables, x, True, mutable=["batch_stats"])
    assert_close(y, nhwc(torch.nn.BatchNorm2d(3, affine=False)(nchw(x))))


def test_layer_norm():
    x, twin = draw(4, 5, 8) * 3 + 1, torch.nn.LayerNorm(8)
    variables = layers.LayerNorm().init(jax.random.key(0), x)
    assert_close(layers.LayerNorm().apply(variables, x), twin(torch.from_numpy(x)).detach())


WINDOWS = [(2, None, 0), (3, 2, 1), (3, 1, 1), (4, None, 0), (3, None, 0), (5, 2, 2),
           ((2, 3), (1, 2), (0, 1))]


@pytest.mark.parametrize("kernel,stride,padding", WINDOWS)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_max_pool(kernel, stride, padding, ties):
    x = draw(2, 8, 9, 3)
    if ties:  # equal values: the gradient goes where torch sends it
        x = np.round(np.maximum(x, 0))
    compare(lambda x: layers.max_pool(x, kernel, stride, padding),
            lambda x: F.max_pool2d(x, kernel, stride, padding), x)


def test_max_pool_of_windows_of_more_than_256_entries():
    x = draw(1, 34, 34, 2)
    compare(lambda x: layers.max_pool(x, 17), lambda x: F.max_pool2d(x, 17), x)


def test_max_pool_passes_nan_on():
    x = draw(1, 4, 4, 1)
    x[0, 1, 0, 0] = x[0, 2, 2, 0] = x[0, 2, 3, 0] = np.nan
    assert np.isnan(layers.max_pool(jnp.asarray(x), 2)).sum() == 2
    compare(lambda x: layers.max_pool(x, 2), lambda x: F.max_pool2d(x, 2), x)


@pytest.mark.parametrize("kernel,stride,padding", WINDOWS)
def test_avg_pool(kernel, stride, padding):
    compare(lambda x: layers.avg_pool(x, kernel, stride, padding),
            lambda x: F.avg_pool2d(x, kernel, stride, padding), draw(2, 8, 9, 3))


@pytest.mark.parametrize("size", [1, 4, 3, (2, 5)])
def test_adaptive_avg_pool(size):
    compare(lambda x: layers.adaptive_avg_pool(x, size),
            lambda x: F.adaptive_avg_pool2d(x, size), draw(2, 8, 8, 3))


def test_global_avg_pool_and_flatten():
    x = draw(2, 4, 4, 3)
    assert_close(layers.global_avg_pool(x), F.adaptive_avg_pool2d(nchw(x), 1)[:, :, 0, 0])
    assert_close(layers.flatten(jnp.asarray(x)), torch.flatten(nchw(x), 1))


@pytest.mark.parametrize("layer,twin", [
    (layers.Conv(64, 3), torch.nn.Conv2d(16, 64, 3)),
    (layers.Linear(256), torch.nn.Linear(300, 256))], ids=["Conv", "Linear"])
def test_initial_spread_is_torchs(layer, twin):
    shape = (1, 8, 8, 16) if isinstance(twin, torch.nn.Conv2d) else (1, 300)
    params = layer.init(jax.random.key(0), jnp.zeros(shape))["params"]
    torch.manual_seed(0)
    twin.reset_parameters()
    for ours, theirs in ((params["kernel"], twin.weight), (params["bias"], twin.bias)):
        theirs = theirs.detach().numpy()
        rel = 4 / np.sqrt(theirs.size)
        assert np.std(ours) == pytest.approx(np.std(theirs), rel=rel)
        assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=rel)
