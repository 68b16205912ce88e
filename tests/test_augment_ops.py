"""Every augmentation operation against Pillow, pixel for pixel.

The Pillow calls are those that torchvision's transforms make on PIL images, written out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jaxcifar import augment
from jaxcifar.augment import color, ops, pipeline, policies
from jaxcifar.augment.geometry import View

ENHANCERS = {"Brightness": ImageEnhance.Brightness, "Color": ImageEnhance.Color,
             "Contrast": ImageEnhance.Contrast, "Sharpness": ImageEnhance.Sharpness}


def pillow(image, name, magnitude):
    """Return what torchvision.transforms.autoaugment._apply_op makes of a PIL image."""
    level, pixels = magnitude, float(int(magnitude))
    matrices = {"ShearX": (1, level, 0, 0, 1, 0), "ShearY": (1, 0, 0, level, 1, 0),
                "TranslateX": (1, 0, -pixels, 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, -pixels)}
    if name in matrices:
        return image.transform(image.size, Image.AFFINE, matrices[name], Image.NEAREST)
    if name in ENHANCERS:
        return ENHANCERS[name](image).enhance(1.0 + magnitude)
    return {
        "Identity": lambda: image.copy(),
        "Rotate": lambda: image.rotate(magnitude, Image.NEAREST, fillcolor=(0, 0, 0)),
        "Posterize": lambda: ImageOps.posterize(image, int(magnitude)),
        "Solarize": lambda: ImageOps.solarize(image, magnitude),
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
    }[name]()


def expect_equal(function, reference, images, *parameters):
    """Assert function(image, *p) == reference(PIL image, *p) for every image and its parameters."""
    got = np.asarray(jax.jit(jax.vmap(function))(images, *map(jnp.asarray, parameters)))
    for i, image in enumerate(images):
        values = [p[i].item() for p in parameters]
        expected = np.asarray(reference(Image.fromarray(image), *values))
        np.testing.assert_array_equal(got[i], expected, err_msg=f"image {i}, parameters {values}")


@functools.cache
def every_operation(space):
    """Return every (operation, magnitude) of a space, both signs, as policies.Operation."""
    names = (*policies.SIGNED, *policies.UNSIGNED, *policies.PLAIN, "Invert")
    bins, wide = {"autoaugment": (10, False), "randaugment": (31, False),
                  "trivialaugment": (31, True)}[space]
    operations = []
    for name in names:
        for magnitude in policies.magnitudes(name, bins, (32, 32), wide).tolist():
            operations.append(policies.Operation(name, magnitude))
            if name in policies.SIGNED:
                operations.append(policies.Operation(name, -magnitude))
    return tuple(operations)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # the program traced for each, run here
@pytest.mark.parametrize("space", ["autoaugment", "randaugment", "trivialaugment"])
def test_every_policy_operation_and_bin_equals_pillow(space, backend, sample_images, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    operations = every_operation(space)
    rows = policies.make_rows(operations, (32, 32))
    each = (2 if space == "autoaugment" else 1) if backend == "gpu" else 6  # images
    numbers = np.repeat(np.arange(len(operations), dtype=np.int32), each)
    chosen = sample_images[np.arange(len(numbers)) * 37 % len(sample_images)]

    @jax.jit
    def apply(images, numbers):
        return pipeline._each(lambda x, n: policies.apply(rows, View(x), n[None]).read(),
                              images, numbers)

    got = np.asarray(apply(chosen, numbers))
    for image, number, result in zip(chosen, numbers, got, strict=True):
        expected = np.asarray(pillow(Image.fromarray(image), *operations[number]))
        np.testing.assert_array_equal(result, expected, err_msg=str(operations[number]))


def test_magnitudes_are_torchvisions():
    of = functools.partial(policies.magnitudes, shape=(32, 32))
    assert of("Posterize", 10).tolist() == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
    assert of("Posterize", 31, wide=True).tolist()[-1] == 2
    np.testing.assert_allclose(of("Solarize", 10), 255 - 255 / 9 * np.arange(10), rtol=1e-6)
    np.testing.assert_allclose(of("ShearX", 10), np.arange(10) / 30, rtol=1e-6)
    np.testing.assert_allclose(of("Rotate", 10), np.arange(10) / 0.3, rtol=1e-6)
    np.testing.assert_allclose(of("Color", 10), np.arange(10) / 10, rtol=1e-6)
    assert [int(m) for m in of("TranslateX", 10)] == [0, 1, 3, 4, 6, 8, 9, 11, 12, 14]
    assert of("TranslateY", 31, wide=True)[-1] == 32 and of("Rotate", 31, wide=True)[-1] == 135
    assert of("Brightness", 31, wide=True)[-1] == np.float32(0.99)
    assert of("Equalize", 10).tolist() == [0]


def test_magnitudes_equal_torch_linspace_to_the_last_bit():
    torch = pytest.importorskip("torch")
    for bins in (2, 10, 11, 31, 32):
        for limit in (0.3, 0.9, 0.99, 30.0, 135.0, 150.0 / 331.0 * 32):
            expected = torch.linspace(0.0, limit, bins).numpy()
            np.testing.assert_array_equal(policies._linspace(0.0, limit, bins), expected)
        np.testing.assert_array_equal(policies._linspace(255.0, 0.0, bins),
                                      torch.linspace(255.0, 0.0, bins).numpy())


@pytest.mark.parametrize("name", ENHANCERS)
def test_enhancers_equal_pillow_for_any_factor(name, sample_images):
    function = {"Brightness": ops.brightness, "Color": ops.saturation, "Contrast": ops.contrast,
                "Sharpness": ops.sharpness}[name]
    factor = np.random.default_rng(1).uniform(0, 2.5, len(sample_images)).astype(np.float32)
    factor[:4] = 0, 1, 2, 0.5
    expect_equal(function, lambda i, f: ENHANCERS[name](i).enhance(f), sample_images, factor)


def test_blend_equals_pillow_for_every_pair_of_values():
    base, image = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2, indexing="ij")
    blend = jax.jit(color.blend)
    factors = np.random.default_rng(2).uniform(0, 3, 40).astype(np.float32)
    for factor in [*factors, *(1 + np.linspace(-0.9, 0.9, 19, dtype=np.float32)), 1e-40]:
        expected = Image.blend(Image.fromarray(base), Image.fromarray(image), float(factor))
        np.testing.assert_array_equal(blend(base, image, factor), np.asarray(expected))


def test_table_operations_equal_pillow(sample_images):
    bits = np.arange(len(sample_images), dtype=np.int32) % 8 + 1
    expect_equal(ops.posterize, ImageOps.posterize, sample_images, bits)
    threshold = np.arange(len(sample_images), dtype=np.int32)
    expect_equal(ops.solarize, ImageOps.solarize, sample_images, threshold)
    expect_equal(ops.invert, ImageOps.invert, sample_images)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
def test_histogram_operations_equal_pillow(size, backend, sample_images, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    images = np.tile(sample_images[:24], (1, 1, 2, 1))[:, :size[0], :size[1]]
    # Channels of narrow range, where the float64 table of autocontrast falls short of integers.
    images = np.concatenate([images, images // 3 + 7, images // 29, images % 2 * 255])
    expect_equal(ops.autocontrast, ImageOps.autocontrast, images)
    expect_equal(ops.equalize, ImageOps.equalize, images)


def test_autocontrast_table_equals_float64_for_every_range():
    low, high = np.array([(i, j) for i in range(256) for j in range(i, 256)]).T
    ramp = np.arange(256)
    scale = (255.0 / np.maximum(high - low, 1))[:, None]
    expected = np.clip(np.trunc(ramp * scale + -low[:, None] * scale), 0, 255)
    expected = np.where((high == low)[:, None], ramp, expected)

    @jax.jit
    @jax.vmap
    def table(low, high):  # of an image of two pixels, one at each end
        below = jnp.arange(256) > low
        return color.autocontrast_table((below + (jnp.arange(256) > high).astype(int))[None], 2)[0]

    np.testing.assert_array_equal(table(low, high), expected)


def adjust_hue(image, shift):
    """torchvision's adjust_hue of a Pillow image, by an integer shift."""
    hue, saturation, value = image.convert("HSV").split()
    moved = np.asarray(hue) + np.int32(shift).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")


def test_hue_equals_pillow():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
    images[8:16] //= 20  # small values: exact hues, gray pixels and ties between channels
    images[16:24, ..., 0] = images[16:24, ..., 1]
    factor = np.linspace(-0.5, 0.5, len(images))
    shift = np.trunc(factor * 255).astype(np.int32)

    expect_equal(ops.hue, adjust_hue, images, shift)
    green, blue = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2, indexing="ij")
    for red in (0, 1, 85, 170, 255):
        image = np.stack([np.full_like(green, red), green, blue], -1)
        got = np.stack(jax.jit(color.rgb_to_hsv)(image), -1)
        np.testing.assert_array_equal(got, Image.fromarray(image).convert("HSV"))
        got = jax.jit(color.hsv_to_rgb)(*(image[..., c].astype(np.int32) for c in range(3)))
        np.testing.assert_array_equal(got, Image.fromarray(image, "HSV").convert("RGB"))


@pytest.mark.parametrize("limit", [5, 180])
def test_rotation_by_any_angle_differs_in_under_one_pixel_of_1000(limit, sample_images):
    angles = np.random.default_rng(limit).uniform(-limit, limit, 200).astype(np.float32)
    images = sample_images[:200] | 1  # no zeros, so that the fill is told from the image
    got = np.asarray(jax.jit(jax.vmap(ops.rotate))(images, angles))
    expected = np.stack([Image.fromarray(i).rotate(float(a)) for i, a in zip(images, angles)])
    different = (got != expected).any(-1)
    assert different.mean() <= 1e-3, different.sum()
    assert (expected == 0).any() and (got[0] != images[0]).any()


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
def test_crop_equals_pad_then_crop(mode, sample_images):
    padding = 5
    top, left = np.random.default_rng(4).integers(0, 2 * padding + 1, (2, 64), dtype=np.int32)
    top[:2], left[:2] = (0, 2 * padding), (2 * padding, 0)

    def pad_and_crop(image, top, left):
        if mode == "constant":
            padded = ImageOps.expand(image, border=padding, fill=(0, 0, 0))
        else:
            border = (padding, padding)
            padded = Image.fromarray(np.pad(np.asarray(image), (border, border, (0, 0)), mode))
        return padded.crop((left, top, left + 32, top + 32))

    expect_equal(lambda x, i, j: ops.crop(x, i, j, padding, mode), pad_and_crop,
                 sample_images[:64], top, left)


def test_hflip_equals_pillow(sample_images):
    expect_equal(ops.hflip, lambda i: i.transpose(Image.FLIP_LEFT_RIGHT), sample_images[:8])


def test_erase_sets_the_rectangle_and_nothing_else(sample_images):
    image = sample_images[0]
    for top, left, height, width in [(3, 4, 5, 6), (-4, 28, 8, 8), (0, 0, 0, 9)]:
        expected = image.copy()
        expected[max(top, 0):max(top + height, 0), max(left, 0):left + width] = (1, 2, 3)
        got = ops.erase(image, top, left, height, width, jnp.array([1.0, 2.0, 3.0]))
        assert got.dtype == jnp.uint8
        np.testing.assert_array_equal(got, expected)


def test_normalize_is_to_tensor_and_normalize(sample_images):
    mean, std = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2023, 0.1994, 0.2010])
    expected = (sample_images.astype(np.float32) / np.float32(255) - mean) / std
    got = jax.jit(lambda x: augment.normalize(x, mean, std))(sample_images)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    plain = augment.normalize(sample_images, (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(plain, sample_images / 255, rtol=1e-6)
    assert augment.normalize(sample_images, mean, std, jnp.bfloat16).dtype == jnp.bfloat16


def replay(image, operations, parameters, rotated):
    """Return uint8 image after the drawn parameters, by Pillow, one operation after the other.

    rotated: this project's rotated image, to be used for the steps after a rotation; the second
    result says whether Pillow's was the same.
    """
    same = True
    picture = Image.fromarray(image)
    for op, drawn in zip(operations, parameters, strict=True):
        name = type(op).__name__
        if name == "Rotation":
            same = np.array_equal(picture.rotate(float(drawn)), rotated)
            picture = Image.fromarray(rotated)
        elif name == "Flip" and drawn:
            picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
        elif name == "Crop":
            top, left = map(int, drawn)
            picture = ImageOps.expand(picture, border=op.padding, fill=(0, 0, 0))
            picture = picture.crop((left, top, left + 32, top + 32))
        elif name in ("AutoAugment", "RandAugment", "TrivialAugment"):
            table = {"AutoAugment": lambda: policies.autoaugment((32, 32)),
                     "RandAugment": lambda: policies.randaugment(9, 31, (32, 32)),
                     "TrivialAugment": lambda: policies.trivialaugment(31, (32, 32))}[name]()
            for number in drawn:
                picture = pillow(picture, *table.operations[number])
        elif name == "ColorJitter":
            names = ("brightness", "contrast", "saturation", "hue")
            active = [i for i, name in enumerate(names) if name in op.describe()]
            assert len(active) == len(drawn.order)
            for number in (active[place] for place in drawn.order):
                enhancer = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
                picture = (adjust_hue(picture, drawn.shift) if number == 3 else
                           enhancer[number](picture).enhance(float(drawn.factor[number])))
    return np.asarray(picture), same


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("spec", [
    "rotation(5)|flip|crop(2)|autoaugment",
    "crop(4)|trivialaugment|flip|randaugment|color_jitter(0.8,0.8,0.8)|crop(1)",
    "color_jitter(0.8,0,0.8,0.3)|flip",
])
def test_pipeline_equals_pillow_one_operation_after_the_other(
        spec, backend, sample_images, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    function = augment.build(spec, (0, 0, 0), (1 / 255,) * 3, 10)
    sample_images = sample_images[:96 if backend == "gpu" else 256]
    keys = jax.random.split(jax.random.key(7), len(sample_images))
    labels = jnp.zeros(len(keys), jnp.int32)
    got, _ = jax.jit(lambda x, k: function(x, labels, k, k[0]))(sample_images, keys)
    got = np.rint(np.asarray(got)).astype(np.uint8)
    parameters = jax.device_get(jax.jit(lambda k: function.sample(k, (32, 32, 3)))(keys))
    rotated = sample_images
    if "rotation" in spec:
        rotated = np.asarray(jax.jit(jax.vmap(ops.rotate))(sample_images, parameters[0]))
    operations = function.operations[:-1]  # without Normalize
    agreed = 0
    for i, image in enumerate(sample_images):
        drawn = [jax.tree.map(lambda x: x[i], p) for p in parameters[:-1]]  # noqa: B023
        expected, same = replay(image, operations, drawn, rotated[i])
        agreed += same
        np.testing.assert_array_equal(got[i], expected, err_msg=f"image {i}: {drawn}")
    assert agreed >= 0.9 * len(sample_images), f"{agreed} rotations equal Pillow's entirely"
