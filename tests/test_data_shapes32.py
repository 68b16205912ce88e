"""shapes32: deterministic, balanced, and beyond a linear classifier."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxcifar.data import builders, shapes32, specs


@pytest.fixture(scope="module")
def drawn():
    """Both splits in full."""
    return {split: shapes32.generate(specs.SHAPES32, split) for split in specs.SPLITS}


def test_counts_and_types(drawn):
    assert len(set(specs.SHAPES32.class_names)) == specs.SHAPES32.num_classes == 10
    for split, count in (("train", 10_000), ("test", 2_000)):
        arrays = drawn[split]
        assert arrays.images.shape == (count, 32, 32, 3) and arrays.images.dtype == np.uint8
        assert arrays.labels.dtype == np.int32
        specs.verify_split(specs.SHAPES32, split, arrays, "shapes32")
        assert len(np.unique(arrays.images.reshape(count, -1)[:, :99], axis=0)) == count


def test_same_arrays_every_time(drawn):
    again = shapes32.generate(specs.SHAPES32, "test")
    np.testing.assert_array_equal(again.images, drawn["test"].images)
    np.testing.assert_array_equal(again.labels, drawn["test"].labels)
    # the frozen stream of RandomState: pictures as published (statistics, since the last bit of a
    # cosine may differ from one processor to another)
    assert drawn["train"].labels[:12].tolist() == [1, 8, 0, 1, 3, 1, 0, 0, 7, 0, 8, 8]
    mean = drawn["train"].images[:200].mean(axis=(0, 1, 2))
    np.testing.assert_allclose(mean, [130.4325, 128.3094, 130.0723], atol=0.01)


def test_a_linear_classifier_stays_below_60_percent(drawn):
    """Ridge regression on the pixels, at the best of several strengths: 16%; chance is 10%."""
    def design(images):
        return np.c_[images.reshape(len(images), -1) / 127.5 - 1, np.ones(len(images))].astype("f4")

    x, y = design(drawn["train"].images), np.eye(10, dtype="f4")[drawn["train"].labels]
    test, gram, right = design(drawn["test"].images), x.T @ x, x.T @ y
    best = 0.0
    for strength in (1e2, 1e3, 1e4):
        weights = np.linalg.solve(gram + strength * np.eye(len(gram), dtype="f4"), right)
        best = max(best, ((test @ weights).argmax(1) == drawn["test"].labels).mean())
    assert 0.1 < best < 0.3


@pytest.mark.parametrize("name", specs.SHAPES32.class_names)
def test_every_shape_is_large_and_differs_from_the_others(name):
    """Its area is a third of its circle's or more, it stays in 1.25 radii, and is unlike others."""
    axis = np.linspace(-1.3, 1.3, 131)
    u, v = np.meshgrid(axis, axis)
    inside = {n: f(u, v) < 0 for n, f in shapes32._DISTANCES.items()}
    area = inside[name].mean() * 2.6**2
    assert 0.9 < area < 2.4
    assert not inside[name][np.hypot(u, v) > 1.25].any()
    for other, mask in inside.items():
        if other != name:
            assert (mask & inside[name]).sum() / (mask | inside[name]).sum() < 0.9


def test_distances_are_in_units_of_the_radius():
    """Near the edge the value is the distance, so that edges are one pixel wide at every size."""
    rng = np.random.RandomState(0)
    u, v = rng.uniform(-1, 1, (2, 4000))
    step = 1e-5
    for name, distance in shapes32._DISTANCES.items():
        near = np.abs(distance(u, v)) < 0.08
        slope = np.hypot(distance(u + step, v) - distance(u - step, v),
                         distance(u, v + step) - distance(u, v - step)) / (2 * step)
        assert np.median(slope[near]) == pytest.approx(1, abs=1e-3), name


def test_an_unknown_shape_is_refused():
    with pytest.raises(KeyError):
        shapes32.draw(np.random.RandomState(0), ["blob"])


def test_it_is_a_tfds_builder(monkeypatch, tmp_path):
    """TFDS finds and prepares it by name, as any of its own."""
    small = dataclasses.replace(specs.SHAPES32, train_per_class=3, test_per_class=1)
    monkeypatch.setitem(specs.SPECS, "shapes32", small)
    builder = tfds.builder("shapes32", data_dir=tmp_path, file_format="array_record")
    assert isinstance(builder, builders.Shapes32)
    builder.download_and_prepare()
    source = tfds.data_source("shapes32", data_dir=tmp_path, split="train")
    expected = shapes32.generate(small, "train")
    by_id = sorted(source, key=lambda example: example["id"])
    np.testing.assert_array_equal([e["image"] for e in by_id], expected.images)
    np.testing.assert_array_equal([e["label"] for e in by_id], expected.labels)
    assert builder.info.features["label"].names == list(small.class_names)
