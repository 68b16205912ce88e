"""The page of models: counts that are known, and a page that is up to date."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxcifar import models
from jaxcifar.models import conv
from jaxcifar.report import models_page

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "models.md"


def test_convolutions_and_products_are_counted():
    image, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 6))
    grouped = jnp.zeros((3, 3, 2, 6))

    @jax.jit
    def function(x, kernel, grouped):
        y = conv.conv2d(x, kernel, padding=((1, 1), (1, 1)))
        z = conv.conv2d(x, grouped, stride=(2, 2), padding=((1, 1), (1, 1)), groups=2)
        return y.reshape(2, -1) @ jnp.zeros((8 * 8 * 6, 5)), z

    expected = 2 * 8 * 8 * 6 * 9 * 4 + 2 * 4 * 4 * 6 * 9 * 2 + 2 * 5 * 8 * 8 * 6
    assert models_page.multiply_adds(function, image, kernel, grouped) == expected


def test_resnet18_does_the_work_that_its_layers_add_up_to():
    stem, head = 32 * 32 * 27 * 64, 512 * 10
    stages = 4 * 32 * 32 * 9 * 64 * 64  # four convolutions, no shortcut
    for width, size in ((128, 16), (256, 8), (512, 4)):
        stages += size * size * (9 * width * (width // 2 + 3 * width) + width * (width // 2))
    assert models_page.describe("resnet18")["multiply_adds"] == stem + stages + head


@pytest.mark.parametrize("name", ["resnet5m", "lenet", "mobilenet", "vit", "mlp_s"])
def test_the_page_has_the_current_line(name):
    assert models_page.line(name) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_every_model():
    text = PAGE.read_text(encoding="utf-8")
    assert [n for n in models.names() if f"| `{n}` |" not in text] == []


def test_multiply_adds_do_not_depend_on_how_a_convolution_is_computed():
    image = jax.ShapeDtypeStruct((1, 8, 8, 6), jnp.float32)
    for groups in (6, 2):
        kernel = jax.ShapeDtypeStruct((3, 3, 6 // groups, 6), jnp.float32)

        def convolve(x, k):
            return conv.conv2d(x, k, padding=((1, 1), (1, 1)), groups=groups)

        assert models_page.multiply_adds(convolve, image, kernel) == 8 * 8 * 6 * 9 * 6 // groups
