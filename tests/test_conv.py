"""Every way of computing a convolution against the plain one: values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcifar.models import conv

CASES = [  # height, width, channels, features, kernel, stride, padding
    (8, 8, 16, 6, (3, 3), (1, 1), ((1, 1), (1, 1))),
    (6, 7, 16, 5, (5, 3), (1, 1), ((2, 2), (1, 1))),
    (6, 6, 16, 5, (2, 2), (1, 1), ((0, 1), (0, 1))),
    (5, 5, 16, 3, (3, 3), (1, 1), ((4, 3), (3, 4))),
    (8, 8, 3, 8, (3, 3), (1, 1), ((1, 1), (1, 1))),
    (7, 9, 5, 6, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (9, 8, 5, 6, (3, 2), (2, 3), ((1, 0), (0, 1))),
    (8, 8, 16, 6, (1, 1), (2, 2), ((0, 0), (0, 0))),
    (2, 2, 16, 6, (3, 3), (1, 1), ((1, 1), (1, 1))),  # a map smaller than the filters
    (4, 3, 16, 6, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (1, 3, 5, 6, (3, 5), (1, 2), ((1, 1), (2, 2))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_xlas_own(case):
    height, width, channels, features, kernel, stride, padding = case
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, height, width, channels)).astype(np.float32)
    w = rng.normal(size=(*kernel, channels, features)).astype(np.float32)

    def plain(x, w):
        return lax.conv_general_dilated(
            x, w, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def both(x, w):
        ours, pullback = jax.vjp(
            lambda x, w: conv.conv2d(x, w, stride=stride, padding=padding), x, w)
        expected, expected_pullback = jax.vjp(plain, x, w)
        cotangent = jax.random.normal(jax.random.key(0), ours.shape)
        direct = conv.filter_gradient(x, cotangent, kernel, stride, padding)
        expected_grads = expected_pullback(cotangent)
        return (ours, *pullback(cotangent), direct), (expected, *expected_grads, expected_grads[1])

    actual, expected = jax.jit(both)(x, w)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("cached,chunks", [(1, 12), (4, 3), (5, 3), (6, 2), (99, 2)])
def test_the_gradient_of_filters_is_a_sum_over_chunks_of_images(monkeypatch, stride, cached, chunks):
    padding, kernel = ((1, 1), (1, 1)), (3, 3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 8, 8, 16)).astype(np.float32)  # two models, twelve images each
    dy = rng.normal(size=(2, 12, 8 // stride[0], 8 // stride[1], 24)).astype(np.float32)

    def gradient(x, dy):
        return conv.filter_gradient(x, dy, kernel, stride, padding)

    whole = jax.vmap(gradient)(x, dy)
    wide, narrow = (24, 16) if stride == (1, 1) else (16, 24)
    image = 4 * (3 * wide + narrow) * dy.shape[2] * dy.shape[3]
    monkeypatch.setattr(conv, "_CACHED_BYTES", cached * image)
    jaxpr = jax.make_jaxpr(gradient)(x[0], dy[0])
    lengths = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert lengths == [chunks], "a loop whatever the size: XLA materialises what it works on"
    np.testing.assert_allclose(jax.vmap(gradient)(x, dy), whole, rtol=1e-5, atol=1e-4)


GROUPED_CASES = [  # height, width, channels, features, groups, kernel, stride, padding
    (8, 8, 6, 6, 6, (3, 3), (1, 1), ((1, 1), (1, 1))),
    (7, 9, 6, 6, 6, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (8, 8, 6, 6, 6, (5, 3), (2, 1), ((2, 2), (0, 1))),
    (8, 7, 4, 12, 4, (3, 3), (2, 2), ((1, 1), (1, 1))),  # three filters a channel
    (5, 5, 4, 4, 4, (3, 3), (1, 1), ((4, 3), (3, 4))),
    (8, 8, 4, 4, 4, (1, 1), (2, 2), ((0, 0), (0, 0))),
    (8, 8, 96, 48, 24, (3, 3), (1, 1), ((1, 1), (1, 1))),  # three convolutions of eight groups
    (9, 8, 64, 96, 4, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (6, 6, 12, 6, 3, (1, 1), (1, 1), ((0, 0), (0, 0))),  # too narrow: one convolution
    (6, 6, 56, 112, 7, (3, 3), (1, 1), ((1, 1), (1, 1))),  # four groups, then three
]


@pytest.mark.parametrize("case", GROUPED_CASES, ids=str)
def test_grouped_values_and_gradients_equal_xlas_own(case):
    height, width, channels, features, groups, kernel, stride, padding = case
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, height, width, channels)).astype(np.float32)
    w = rng.normal(size=(*kernel, channels // groups, features)).astype(np.float32)

    def value_and_gradients(convolve):
        y, pullback = jax.vjp(convolve, x, w)
        return y, *pullback(jax.random.normal(jax.random.key(0), y.shape))

    actual = jax.jit(value_and_gradients, static_argnums=0)(
        lambda x, w: conv.conv2d(x, w, stride=stride, padding=padding, groups=groups))
    expected = jax.jit(value_and_gradients, static_argnums=0)(
        lambda x, w: lax.conv_general_dilated(
            x, w, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_bfloat16_gradients_have_the_operands_types():
    x, w = jnp.ones((2, 8, 8, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 4), jnp.bfloat16)
    padding = ((1, 1), (1, 1))
    y, pullback = jax.vjp(lambda x, w: conv.conv2d(x, w, padding=padding), x, w)
    dx, dw = pullback(jnp.ones_like(y))
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dw[1, 1], 128)  # 2 * 8 * 8, exact in bfloat16


def test_bfloat16_depthwise_gradients_are_summed_in_float32():
    x, w = jnp.ones((2, 32, 32, 4), jnp.bfloat16), jnp.ones((3, 3, 1, 4), jnp.bfloat16)
    y, pullback = jax.vjp(
        lambda x, w: conv.conv2d(x, w, padding=((1, 1), (1, 1)), groups=4), x, w)
    dx, dw = pullback(jnp.ones_like(y))
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dw[1, 1], 2048)  # a bfloat16 sum of ones stops at 256


def test_bfloat16_depthwise_convolutions_are_rounded_once():
    rng = np.random.default_rng(0)
    x, dy, w = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in (
        (2, 12, 12, 4), (2, 12, 12, 4), (7, 7, 1, 4)))

    def both(x, w, dy):
        y, pullback = jax.vjp(
            lambda x: conv.conv2d(x, w, padding=((3, 3), (3, 3)), groups=4), x)
        return y, *pullback(dy)

    for half, full in zip(both(x, w, dy), both(*(a.astype(jnp.float32) for a in (x, w, dy))),
                          strict=True):
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_the_backend_chooses_the_form(monkeypatch, groups):
    def gradient_text():
        w = jnp.ones((3, 3, 16 // groups, 16))
        x = jnp.ones((2, 8, 8, 16))
        function = jax.grad(lambda w: jnp.sum(conv.conv2d(x, w, groups=groups) ** 2))
        return str(jax.make_jaxpr(function)(w))
    own = f"feature_group_count={groups}" if groups > 1 else "rhs_dilation=(1, 1)"
    on_cpu = gradient_text()
    assert ("dot_general" in on_cpu) == (groups != 16)
    assert f"feature_group_count={groups}\n" not in on_cpu or groups == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = gradient_text()
    assert "dot_general" not in on_gpu and own in on_gpu


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_cpus_forms_work_for_several_models_at_once(groups):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 6, 6, 8)).astype(np.float32)
    w = rng.normal(size=(2, 3, 3, 8 // groups, 8)).astype(np.float32)

    def gradient(x, w):
        return jax.grad(lambda w: jnp.sum(
            conv.conv2d(x, w, padding=((1, 1), (1, 1)), groups=groups) ** 2))(w)

    together = jax.jit(jax.vmap(gradient))(x, w)
    for i in range(2):
        np.testing.assert_allclose(together[i], gradient(x[i], w[i]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_several_seeds_have_convolutions_of_their_own(backend, groups, shared, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # by which the form is chosen
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 6, 6, 16)).astype(np.float32)[0 if shared else slice(None)]
    w = rng.normal(size=(3, 3, 3, 16 // groups, 32)).astype(np.float32)
    dy = rng.normal(size=(3, 2, 6, 6, 32)).astype(np.float32)

    def both(x, w, dy):
        y, pullback = jax.vjp(
            lambda x, w: conv.conv2d(x, w, padding=((1, 1), (1, 1)), groups=groups), x, w)
        return y, *pullback(dy)

    def together(x, w, dy):
        with conv.seeds_apart():
            return jax.vmap(both, in_axes=(None if shared else 0, 0, 0))(x, w, dy)

    alone = [both(x if shared else x[i], w[i], dy[i]) for i in range(3)]
    for actual, *expected in zip(jax.jit(together)(x, w, dy), *alone, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    counts = [int(n) for n in re.findall(r"feature_group_count=(\d+)",
                                         str(jax.make_jaxpr(together)(x, w, dy)))]
    assert max(counts, default=1) <= groups, counts  # none in the depthwise form on CPU
