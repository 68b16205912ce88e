"""What a speedrun's network sees: batches, flips, squares, and the views of a test image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_speedrun import NUM_TEST, NUM_TRAIN, small_run

from jaxcifar import parallel
from jaxcifar.speedrun import images as images_lib
from jaxcifar.speedrun import trainer as trainer_lib
from jaxcifar.speedrun import training


@pytest.fixture(scope="module")
def dataset():
    return tiny.tiny_dataset(NUM_TRAIN, NUM_TEST)


@dataclasses.dataclass(frozen=True)
class LinearModel:
    """Stands for a network: logits are a fixed matrix times the pixels."""

    weights: np.ndarray
    dtype = jnp.float32

    def apply(self, variables, images, train):
        return images.reshape(len(images), -1) @ (self.weights * variables["scale"])


def prepared_with_ids(run, seed):
    """Return a Prepared of random images whose labels are their numbers, and these images."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (NUM_TRAIN, 32, 32, 3)).astype(np.uint8)
    steps, options = run.total_steps, run.config.speedrun
    return training.Prepared(
        images_lib.order(seed, NUM_TRAIN, run.config.batch_size, steps),
        images_lib.first_flips(seed, NUM_TRAIN), images_lib.pad(images, options.translate),
        jnp.arange(NUM_TRAIN)), images


def test_a_batch_is_translated_and_flipped_in_turn():
    run = small_run(translate=2)
    prepared, images = prepared_with_ids(run, 5)
    config, sides, shifts = run.config, {}, set()
    batch = jax.jit(functools.partial(training.batch, run))
    for number in range(run.total_steps):
        seen, ids = batch(prepared, jnp.uint32(5), jnp.int32(number))
        pixels = np.asarray(seen * jnp.array(config.std) + jnp.array(config.mean)) * 255
        for image, i in zip(np.rint(pixels), np.asarray(ids)):
            wide = np.pad(images[i], ((2, 2), (2, 2), (0, 0)), mode="reflect")
            found = [(side, (y, x)) for side in (1, -1) for y in range(5) for x in range(5)
                     if np.array_equal(image[:, ::side], wide[y:y + 32, x:x + 32])]
            assert len(found) == 1
            sides.setdefault(int(i), []).append((number // 6, found[0][0]))
            shifts.add(found[0][1])
    assert len(shifts) == 25
    twice = [dict(seen) for seen in sides.values() if len(seen) == 2]
    assert len(twice) > 30 and all(s[0] == -s[1] for s in twice)
    assert 0.25 < np.mean([s[0] == 1 for s in twice]) < 0.75


def test_epochs_are_permutations_without_their_partial_batch():
    order = np.asarray(images_lib.order(jnp.uint32(1), NUM_TRAIN, 16, 15))
    assert order.shape == (15, 16)
    epochs = order[:6].ravel(), order[6:12].ravel()
    assert all(len(set(epoch)) == 96 for epoch in epochs)
    assert not np.array_equal(*epochs)
    assert not np.array_equal(order, images_lib.order(jnp.uint32(2), NUM_TRAIN, 16, 15))


def test_cutout_lies_inside():
    corners = images_lib.squares(jax.random.key(0), 300, (9, 9), 4)
    images = images_lib.cut_out(jnp.ones((300, 9, 9, 3)), corners, 4)
    zeros = np.asarray(images == 0)
    assert (zeros.sum((1, 2, 3)) == 4 * 4 * 3).all()
    corners = {(int(z[..., 0].any(1).argmax()), int(z[..., 0].any(0).argmax())) for z in zeros}
    assert {c for pair in corners for c in pair} == set(range(6)) and len(corners) > 30


def linear_run(run):
    rng = np.random.default_rng(0)
    model = LinearModel(rng.normal(0, 0.02, (32 * 32 * 3, 10)).astype(np.float32))
    return dataclasses.replace(run, task=dataclasses.replace(run.task, model=model))


def explicit_views(run, images):
    """Return logits [6, N, 10] of the views, made by numpy, and their weights."""
    seen = np.asarray(run.task.normalize(images))
    padded = np.pad(seen, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    views = [seen, padded[:, :32, :32], padded[:, 2:, 2:]]
    views = np.stack([*views, *(view[:, :, ::-1] for view in views)])
    logits = views.reshape(6, len(images), -1) @ run.task.model.weights
    return logits, np.array([2, 1, 1] * 2) / 8


@pytest.mark.parametrize("rolled", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_augmented_evaluation_equals_the_explicit_mean(dataset, share, rolled):
    run = linear_run(small_run(tta_share=share))
    logits, weights = explicit_views(run, dataset.test_images)
    plain, mean = logits[0], np.tensordot(weights, logits, 1)
    if share < 1:
        probabilities = np.sort(np.asarray(jax.nn.softmax(plain)), 1)
        certain = np.argsort(probabilities[:, -1] - probabilities[:, -2])[12:]
        mean[certain] = plain[certain]
    trainer = trainer_lib.Trainer(run, parallel.create(run.config), rolled=rolled)
    for labels in (mean.argmax(1), plain.argmax(1)):  # of 30, in batches of 16
        found = trainer.evaluate({"scale": jnp.float32(1)}, (dataset.test_images, labels))
        assert found["accuracy"] == pytest.approx(100 * np.mean(plain.argmax(1) == labels))
        assert found["accuracy_tta"] == pytest.approx(100 * np.mean(mean.argmax(1) == labels))
    assert 0 < (plain.argmax(1) != mean.argmax(1)).sum() < 30
