"""Every way of computing a convolution against the plain one: values and gradients."""

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


def test_bfloat16_gradients_have_the_operands_types():
    x, w = jnp.ones((2, 8, 8, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 4), jnp.bfloat16)
    padding = ((1, 1), (1, 1))
    y, pullback = jax.vjp(lambda x, w: conv.conv2d(x, w, padding=padding), x, w)
    dx, dw = pullback(jnp.ones_like(y))
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dw[1, 1], 128)  # 2 * 8 * 8, exact in bfloat16


def test_the_backend_chooses_the_form(monkeypatch):
    def gradient_text(groups=1):
        w = jnp.ones((3, 3, 16 // groups, 16))
        x = jnp.ones((2, 8, 8, 16))
        function = jax.grad(lambda w: jnp.sum(conv.conv2d(x, w, groups=groups) ** 2))
        return str(jax.make_jaxpr(function)(w))
    assert "dot_general" in gradient_text()
    assert "dot_general" not in gradient_text(groups=2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "dot_general" not in gradient_text()
