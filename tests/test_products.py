"""The CPU's way of computing matrix products against the plain one: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcifar.models import products


@pytest.mark.parametrize("shape,features", [((5, 3), 7), ((2, 8), 3), ((4, 5, 7), 3), ((2, 3, 4, 6), 6)], ids=str)
def test_linear_has_the_values_and_gradients_of_the_plain_product(shape, features):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (shape[-1], features))
    cotangent = jax.random.normal(keys[2], (*shape[:-1], features))

    def all_of(product):
        y, pullback = jax.vjp(lambda x, kernel: product(jnp.tanh(x), kernel), x, kernel)
        return (y, *pullback(cotangent))

    for actual, expected in zip(all_of(products.linear), all_of(jnp.matmul), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_linear_over_a_leading_axis_of_kernels():
    x, kernels = jnp.arange(6.0).reshape(2, 3), jnp.arange(24.0).reshape(2, 3, 4)
    gradient = jax.grad(lambda kernel, x: (products.linear(x, kernel) ** 2).sum())
    together = jax.vmap(gradient, (0, None))(kernels, x)
    for kernel, one in zip(kernels, together, strict=True):
        np.testing.assert_allclose(one, 2 * x.T @ (x @ kernel), rtol=1e-6)


def test_gradients_of_bfloat16_products_are_summed_in_float32():
    rows = 4096
    x, dy = jnp.ones((rows, 3), jnp.bfloat16), jnp.full((rows, 2), 1.0078125, jnp.bfloat16)
    total = products.contract(x, dy)
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, np.full((3, 2), rows * 1.0078125))
    kernel = jnp.ones((3, 2), jnp.bfloat16)
    gradient = jax.grad(lambda k: products.linear(x, k).astype(jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16 and (gradient == rows).all()
