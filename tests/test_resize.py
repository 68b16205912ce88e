"""Resize, center crop and crops of another size: Pillow's pixels, and what held-out images get."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcifar import augment
from jaxcifar.augment.resize import resize
from jaxcifar.errors import UserError

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def pillow(images, size, interpolation):
    """PIL.Image.resize of uint8 [N, H, W, 3] to (height, width)."""
    how = getattr(Image.Resampling, interpolation.upper())
    return np.stack([np.asarray(Image.fromarray(x).resize(size[::-1], how)) for x in images])


def prepared(spec, images, evaluation="auto"):
    """Held-out images as uint8 again."""
    out = jax.jit(augment.evaluation(evaluation, spec, MEAN, STD))(images)
    return np.round(np.asarray(out) * 255).astype(np.uint8)


def augmented(spec, images, seed=0):
    """Training images as uint8 again, and the drawn parameters."""
    made = augment.build(spec, MEAN, STD, 10)
    keys = jax.random.split(jax.random.key(seed), len(images))
    out, _ = jax.jit(made)(images, jnp.zeros(len(images), jnp.int32), keys, jax.random.key(1))
    return np.round(np.asarray(out) * 255).astype(np.uint8), made.sample(keys, images.shape[1:])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(224, 224), (256, 256), (384, 384), (40, 40), (64, 48), (11, 20)])
def test_resize_is_pillows(sample_images, size, interpolation):
    images = sample_images[::8]
    ours = jax.jit(functools.partial(resize, size=size, interpolation=interpolation))(images)
    np.testing.assert_array_equal(ours, pillow(images, size, interpolation))


def test_an_int_is_the_length_of_the_shorter_side():
    made = augment.build("resize(20)", MEAN, STD, 10)
    assert made.output_shape((32, 48, 3)) == (20, 30, 3)  # torchvision: int(20 * 48 / 32)
    assert made.output_shape((48, 32, 3)) == (30, 20, 3)
    assert augment.build("resize((20, 24))", MEAN, STD, 10).output_shape((32, 48, 3)) == (20, 24, 3)


def test_the_transform_of_imagenet_weights(sample_images):
    images = sample_images[:6]
    whole = pillow(images, (256, 256), "bilinear")
    np.testing.assert_array_equal(prepared("resize(256)|center_crop(224)", images),
                                  whole[:, 16:240, 16:240])


@pytest.mark.parametrize(("size", "top"), [(27, 2), (29, 2), (32, 0)])
def test_center_crop_rounds_as_torchvision(sample_images, size, top):
    # torchvision: int(round((32 - size) / 2)), Python's round to even
    assert top == round((32 - size) / 2)
    np.testing.assert_array_equal(prepared(f"center_crop({size})", sample_images[:3]),
                                  sample_images[:3, top:top + size, top:top + size])


def test_center_crop_pads_what_is_too_small(sample_images):
    made = prepared("center_crop(37)", sample_images[:2])
    # torchvision pads (37 - 32) // 2 before and (37 - 32 + 1) // 2 after
    np.testing.assert_array_equal(made, np.pad(sample_images[:2], ((0, 0), (2, 3), (2, 3), (0, 0))))


def test_a_crop_of_enlarged_images(sample_images):
    images = np.repeat(sample_images[:8], 8, axis=0)
    made, parameters = augmented("resize(40)|crop(0, size=32)", images)
    places = np.asarray(parameters[1])
    assert places.min() == 0 and places.max() == 8 and len(set(map(tuple, places))) > 30
    whole = pillow(images, (40, 40), "bilinear")
    expected = np.stack([x[top:top + 32, left:left + 32] for x, (top, left) in zip(whole, places)])
    np.testing.assert_array_equal(made, expected)


def test_the_place_in_the_string_decides_what_is_enlarged(sample_images):
    images = sample_images[:16]
    first, parameters = augmented("crop(4)|resize(64)", images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    places = np.asarray(parameters[0])
    small = np.stack([x[top:top + 32, left:left + 32] for x, (top, left) in zip(padded, places)])
    np.testing.assert_array_equal(first, pillow(small, (64, 64), "bilinear"))
    last, _ = augmented("resize(64)|crop(4)", images)
    assert first.shape == last.shape and (first != last).any()


def test_random_operations_see_the_enlarged_image(sample_images):
    images = np.repeat(sample_images[:1], 64, axis=0)
    made, parameters = augmented("resize(64)|cutout(16)|normalize", images)
    assert made.shape == (64, 64, 64, 3)
    assert np.asarray(parameters[1].top).max() > 40
    both = augment.build("resize(48)|autoaugment|mixup(1.0)", MEAN, STD, 10)
    shape = jax.eval_shape(both, images, jnp.zeros(64, jnp.int32),
                           jax.random.split(jax.random.key(0), 64), jax.random.key(1))
    assert shape[0].shape == (64, 48, 48, 3)


def test_held_out_images_take_no_random_operation(sample_images):
    images = sample_images[:4]
    spec = "resize(40)|crop(0, size=32)|flip|autoaugment|normalize|cutout(8)"
    np.testing.assert_array_equal(prepared(spec, images), pillow(images, (40, 40), "bilinear"))
    np.testing.assert_array_equal(prepared(spec, images, ""), images)
    np.testing.assert_array_equal(prepared(spec, images, "resize(8)"),
                                  pillow(images, (8, 8), "bilinear"))
    assert prepared("crop(4)|flip", images).tolist() == images.tolist()


@pytest.mark.parametrize(("spec", "message"), [
    ("resize(0)", "size is a whole number >= 1"),
    ("resize(64, 'nearest')", "interpolation is one of bilinear, bicubic"),
    ("normalize|resize(64)", "resize works on uint8 images; put it before normalize"),
    ("center_crop((2, 2, 2))", "size is a whole number"),
    ("normalize|center_crop(40)", "center_crop"),
])
def test_what_cannot_be_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        augment.build(spec, MEAN, STD, 10)


def test_evaluation_refuses_randomness():
    with pytest.raises(UserError, match="evaluation 'flip|resize.8.': flip is random"):
        augment.evaluation("flip|resize(8)", "", MEAN, STD)
