"""Augmentation specifications: what they mean, what is wrong with one, and how it is described."""

import pytest
from test_augment_pipeline import build

from jaxcifar import augment
from jaxcifar.augment import pipeline
from jaxcifar.errors import UserError


def test_parse_keeps_the_order_and_reads_arguments():
    operations = augment.parse("crop(4, padding_mode='reflect')|flip|normalize|cutout(16)")
    names = [type(op).__name__ for op in operations]
    assert names == ["Crop", "Flip", "Normalize", "Cutout"]
    assert operations[0].padding == 4 and operations[0].padding_mode == "reflect"
    assert augment.parse("random_erasing(p=0.25, scale=[0.1, 0.2])")[0].scale == (0.1, 0.2)
    assert hash(operations) == hash(augment.parse(
        "crop(4,'reflect') | flip() | normalize | cutout(length=16)"))
    for name in pipeline.REGISTRY:
        assert name in pipeline.signature(name)


def test_normalize_goes_after_images_and_before_the_batch():
    def names(spec):
        return [type(op).__name__ for op in augment.parse(spec)]

    assert names("") == names("  ") == ["Normalize"]
    assert names("flip|cutout(8)") == ["Flip", "Cutout", "Normalize"]
    assert names("flip|mixup(0.2)|cutmix(1.0)") == ["Flip", "Normalize", "Mixup", "Cutmix"]


@pytest.mark.parametrize("spec, parts", [
    ("rotate(5)", ["unknown augmentation 'rotate'", "did you mean 'rotation'", "there are"]),
    ("RandomCrop(32)", ["torchvision's is crop(padding", "there are: rotation"]),
    ("random_horizontal_flip", ["torchvision's is flip(p=0.5) here"]),
    ("crop({[]: 1})", ["arguments are literal", "usage: crop("]),
    ("cutout(1)", ["length is a whole number >= 2"]),
    ("xyzzy", ["unknown augmentation 'xyzzy'", "there are: rotation"]),
    ("crop", ["crop", "missing", "usage: crop(padding, padding_mode='constant', size=0)"]),
    ("crop(2.5)", ["crop(2.5)", "whole number", "usage: crop("]),
    ("crop(2, mode='edge')", ["unexpected keyword argument 'mode'", "usage: crop("]),
    ("crop(2, 'wrap')", ["padding_mode is one of constant, edge", "usage"]),
    ("flip(1.5)", ["probability", "usage: flip(p=0.5)"]),
    ("flip(p=x)", ["literal", "usage: flip(p=0.5)"]),
    ("rotation(-3)", ["degrees", "usage: rotation(degrees)"]),
    ("color_jitter(hue=0.7)", ["hue", "usage: color_jitter(brightness=0"]),
    ("randaugment(2, 31)", ["magnitude", "usage: randaugment(num_ops=2"]),
    ("random_erasing(scale=(0.3, 0.1))", ["scale", "usage: random_erasing(p=0.5"]),
    ("random_erasing(value='random')", ["before normalize", "0..255"]),
    ("mixup(0)", ["alpha", "usage: mixup(alpha)"]),
    ("flip|", ["cannot be read", "separated by |"]),
    ("flip, crop(4)", ["not a name"]),
    ("normalize|autoaugment", ["autoaugment works on uint8", "before normalize"]),
    ("normalize|flip|normalize", ["more than once"]),
    ("mixup(0.2)|flip", ["flip comes after mixup or cutmix"]),
    ("mixup(0.2)|normalize", ["normalize comes after mixup"]),
])
def test_bad_specifications_say_what_is_wrong(spec, parts):
    with pytest.raises(UserError) as caught:
        build(spec)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_describe_has_a_line_for_each_operation():
    assert "14x14 pixels" in augment.describe("cutout(15)")[0]
    lines = augment.describe("rotation(5)|flip|crop(2)|autoaugment|random_erasing|mixup(0.2)")
    assert len(lines) == 7
    parts = ["[-5, 5] degrees", "p=0.5", "padding 2 (zeros)", "25 sub-policies", "0.02 to 0.33",
             "normalised", "alpha=0.2"]
    for line, part in zip(lines, parts, strict=True):
        assert part in line
