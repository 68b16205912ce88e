"""The batches of an epoch: every example once, in the epoch's order, each with keys of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxcifar import epoch, metrics, parallel, programs
from jaxcifar.state import create_state
from jaxcifar.task import create_task

NUM_TRAIN = 50
SMALL = {"model": {"name": "lenet"}, "augment": "", "precision": "highest"}


def seen(batch_size, num_devices, num_epochs=2, seed=0):
    """Return for each epoch (its order, [(labels, keys of images, mix key, dropout key), ...])."""
    task = create_task(tiny.tiny_config(batch_size=batch_size, **SMALL), NUM_TRAIN, 10)

    def keys_instead(images, labels, keys, batch_key, *, axis_name=None, mask=None):
        real = labels >= 0 if mask is None else mask > 0
        return (jax.random.key_data(keys), jax.random.key_data(batch_key)), (labels, real)

    state = create_state(task, seed).on_device()
    task = dataclasses.replace(task, augment=keys_instead)
    data = {"images": jnp.zeros((NUM_TRAIN, 1), jnp.uint8), "labels": jnp.arange(NUM_TRAIN)}

    def parts(size, state, permutation, axis_name):
        batch = epoch.train_batch(task, size, state, data, permutation, axis_name, num_devices)
        return batch.images, batch.targets, jax.random.key_data(batch.key)

    def batch_of(size, at, permutation):
        if num_devices == 1:
            (keys, mix), (labels, real), dropout = parts(size, at, permutation, None)
        else:
            each = jax.pmap(lambda _: parts(size, at, permutation, "data"), "data",
                            devices=jax.devices()[:num_devices])(np.arange(num_devices))
            (keys, mix), (labels, real), dropout = jax.tree.map(np.asarray, each)
            assert len(np.unique(mix, axis=0)) == len(np.unique(dropout, axis=0)) == 1
            mix, dropout = mix[0], dropout[0]
        keep = np.ravel(real)
        return (np.ravel(labels)[keep], np.reshape(keys, (-1, 2))[keep], np.asarray(mix),
                np.asarray(dropout))

    epochs = []
    for number in range(num_epochs):
        first = number * task.steps_per_epoch
        order = epoch.order(task, state.replace(epoch=np.int32(number)))
        sizes = [batch_size] * task.full_steps + [task.tail_size] * (task.tail_size > 0)
        assert len(sizes) == task.steps_per_epoch
        epochs.append((np.asarray(order), [
            batch_of(size, state.replace(epoch=np.int32(number), step=np.int32(first + i)), order)
            for i, size in enumerate(sizes)]))
    return epochs


one_device = functools.cache(seen)


def rows_of(arrays):
    return [tuple(map(int, row)) for row in np.concatenate([np.atleast_2d(a) for a in arrays])]


@pytest.mark.parametrize(("batch_size", "num_devices"), [(16, 1), (25, 1), (16, 4), (16, 8)])
def test_an_epoch_sees_every_example_once_in_its_order(batch_size, num_devices):
    # Batches of 16: a last one of 2, of which most of the devices see padding only.
    orders = []
    for order, batches in seen(batch_size, num_devices):
        labels = np.concatenate([batch[0] for batch in batches])
        np.testing.assert_array_equal(labels, order)
        np.testing.assert_array_equal(np.sort(labels), np.arange(NUM_TRAIN))
        orders.append(order)
    assert not np.array_equal(*orders), "every epoch has an order of its own"
    assert not np.array_equal(orders[0], one_device(16, 1, seed=1)[0][0]), "and so has every seed"


def test_no_random_key_comes_twice():
    keys = {"image": [], "mix": [], "dropout": []}
    for _, batches in one_device(16, 1):
        for _, images, mix, dropout in batches:
            keys["image"].append(images)
            keys["mix"].append(mix)
            keys["dropout"].append(dropout)
    rows = {name: rows_of(arrays) for name, arrays in keys.items()}
    assert [len(found) for found in rows.values()] == [2 * NUM_TRAIN, 8, 8]
    together = sum(rows.values(), [])
    assert len(set(together)) == len(together)
    other = rows_of(batch[1] for _, batches in one_device(16, 1, seed=1) for batch in batches)
    assert not set(other) & set(together), "another seed, other keys"


@pytest.mark.parametrize(("batch_size", "num_devices"), [(25, 1), (16, 4), (16, 8)])
def test_an_examples_key_is_that_of_its_place_in_the_epoch(batch_size, num_devices):
    for (_, ours), (_, theirs) in zip(seen(batch_size, num_devices), one_device(16, 1), strict=True):
        assert rows_of(b[1] for b in ours) == rows_of(b[1] for b in theirs)
        if batch_size == 16:
            for part in (2, 3):
                assert rows_of(b[part] for b in ours) == rows_of(b[part] for b in theirs)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(("size", "num_devices"), [(8, 1), (24, 2), (32, 4), (104, 8)])
def test_every_held_out_example_is_in_the_confusion_matrix_once(size, num_devices, on_cpu,
                                                                monkeypatch):
    monkeypatch.setattr(programs, "runs_on_cpu", lambda devices: on_cpu)
    dataset = tiny.tiny_dataset()
    data = {"images": dataset.test_images, "labels": dataset.test_labels}
    config = tiny.tiny_config(eval_batch_size=size, num_devices=num_devices, **SMALL)
    task = create_task(config, NUM_TRAIN, 10)
    devices = parallel.create(config)
    compiled = programs.Programs(task, devices)
    state = create_state(task, 0)
    logits = task.model.apply(state.variables(), task.normalize(data["images"]), train=False)
    predicted = np.argmax(np.asarray(logits), axis=-1)
    assert len(set(predicted)) > 1, "a network that predicts one class shows less"
    live, data = devices.replicate((state.on_device(), data))
    for first, stop in ((0, 20), (20, 50), (49, 50), (0, 50)):
        found = compiled.evaluate(live, data, (first, stop))
        expected = np.zeros((10, 10), int)
        np.add.at(expected, (dataset.test_labels[first:stop], predicted[first:stop]), 1)
        np.testing.assert_array_equal(found["confusion"], expected)
        assert np.sum(found["sums"]["count"]) == stop - first
        accuracy = metrics.finalize(found["sums"], "test")["test_accuracy"]
        assert accuracy == pytest.approx(100 * np.trace(expected) / (stop - first))
