"""Data selection in a speedrun: what the proxy keeps, what the network then sees, what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_configs import load
from test_speedrun import NUM_TRAIN, largest_difference, small_config

from jaxcifar import parallel
from jaxcifar import train as train_lib
from jaxcifar.errors import UserError
from jaxcifar.models import conv
from jaxcifar.speedrun import driver, proxy, training
from jaxcifar.speedrun import trainer as trainer_lib


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def selected():
    """Return (Trainer of the loop form, training images and labels, test images and labels).

    48 steps; small batches need a higher rate than the recipe's.
    """
    config = small_config("96_selected", translate=1, cutout=4, proxy_channels=(4, 4))
    config.batch_size = config.eval_batch_size = 64
    config.model.update(channels=(8, 12), bn_momentum=0.4)
    config.speedrun.update(epochs=8.0, whiten_bias_epochs=8.0)
    config.optimizer.learning_rate *= 30
    train_lib.configure_jax(config)
    trainer = trainer_lib.Trainer(
        training.create(config, 400, 10), parallel.create(config), rolled=False)
    splits = driver._splits(tiny.tiny_dataset(400, 128))
    return trainer, *jax.tree.map(jnp.asarray, splits)


@pytest.fixture(scope="module")
def chosen(selected):
    """Return (Prepared with what the proxy kept, its State before every batch)."""
    trainer, train, _ = selected
    seed = jnp.uint32(3)
    prepared, _ = trainer._start(seed, *train)
    states, step = [], trainer._proxy[2]

    def remembering(state, *rest):
        states.append(state)
        return step(state, *rest)

    look = trainer._proxy[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_proxy", [
            trainer._proxy[0], lambda state, *rest: (states.append(state), look(state, *rest))[1],
            remembering])
        kept = trainer._select(prepared, seed, train[0])
    return prepared.replace(kept=kept), states


def test_the_largest_losses_of_every_batch_are_kept(selected, chosen):
    run, (prepared, states) = selected[0].run, chosen
    assert run.total_steps == len(states) == 48 and run.keep == 32
    assert run.proxy.task.model.channels == (4, 4) and run.proxy.task.model.depth == 2
    whole = prepared.replace(kept=None)
    losses = jax.jit(lambda state, number: training.losses(
        run.proxy, state.params, state,
        *training.batch(run.proxy, whole, jnp.uint32(3), number))[0])
    for number in (0, 1, 4, 5, 47):
        each = np.asarray(losses(states[number], jnp.int32(number)))
        kept = prepared.kept[number]
        np.testing.assert_allclose(np.sort(each[kept]), np.sort(each)[-32:], rtol=1e-5)
        assert len(set(kept.tolist())) == 32 and each.std() > 1e-3


def test_the_proxy_takes_a_step_on_every_fourth_batch(chosen):
    states = chosen[1]
    moved = [largest_difference(a.params, b.params) > 1e-5 for a, b in zip(states, states[1:9])]
    assert moved == [True, False, False, False] * 2
    for state in states[::8]:
        np.testing.assert_array_equal(state.params["whiten"]["bias"],
                                      states[0].params["whiten"]["bias"])


def test_the_network_sees_what_was_kept_as_the_proxy_saw_it(selected, chosen):
    run, prepared = selected[0].run, chosen[0]
    assert run.config.speedrun.cutout and run.config.speedrun.translate
    batch = jax.jit(functools.partial(training.batch, run))
    for number in (0, 5):
        kept = np.asarray(prepared.kept[number])
        everything, some = (batch(p, jnp.uint32(3), jnp.int32(number))
                            for p in (prepared.replace(kept=None), prepared))
        for a, b in zip(everything, some, strict=True):
            assert len(a) == 64 and len(b) == 32
            np.testing.assert_array_equal(np.asarray(a)[kept], b)


def test_the_rolled_form_keeps_the_same(selected, chosen):
    """6 batches in groups of 4: what is beyond the last is cut off."""
    trainer, train, _ = selected
    prepared, run = chosen[0], dataclasses.replace(
        trainer.run, total_steps=6)  # the proxy's own rates fall as before
    rolled = jax.jit(functools.partial(proxy.select, run))(
        prepared.replace(kept=None), jnp.uint32(3), train[0])
    np.testing.assert_array_equal(np.sort(rolled, 1), np.sort(prepared.kept[:6], 1))


def test_it_learns(selected):
    trainer, train, test = selected
    found = trainer.evaluate(trainer.train(3, train), test)
    assert found["accuracy"] > 25  # of ten classes, after 48 steps


def operations(run, function, *args):
    with conv.plain_convolutions():  # of a loop, as in a gradient of filters, one turn is counted
        return jax.jit(functools.partial(function, run)).lower(*args).cost_analysis()["flops"]


def test_it_costs_little_more_than_half():
    """The recipe's own networks, lowered and not compiled: the operations of four batches."""
    config = load("speedrun").get_config("96_selected")
    config.batch_size = 64
    run = training.create(config, 50_000, 10)
    images, labels = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((50_000, 32, 32, 3), jnp.uint8), ((50_000,), jnp.int32)))
    seed, number = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    prepared, state = jax.eval_shape(functools.partial(training.start, run), seed, images, labels)
    small = jax.eval_shape(functools.partial(training.initial, run.proxy), seed, images)
    step = functools.partial(training.step, train_bias=False)

    def of(run, prepared):
        return operations(run, lambda run, *args: step(run, state=args[0], prepared=args[1],
                                                       seed=args[2], number=args[3]),
                          state, prepared, seed, number)

    whole = of(run, prepared)
    half = of(run, prepared.replace(
        kept=jax.ShapeDtypeStruct((run.total_steps, run.keep), jnp.int32)))
    asked = (small, prepared, seed, number)
    extra = operations(run, proxy.step, *asked) + 3 * operations(run, proxy.look, *asked)
    assert 0.48 < half / whole < 0.52
    assert extra < 0.06 * 4 * whole


def test_numbers_that_no_speedrun_can_have_are_explained():
    config = small_config("96_selected")
    config.speedrun.keep_share = 1.5
    with pytest.raises(UserError, match="keep_share = 1.5: must be above 0 and at most 1"):
        training.create(config, NUM_TRAIN, 10)
    config = small_config("96_selected")
    config.eval_batch_size = 0
    with pytest.raises(UserError, match="eval_batch_size = 0: must be at least 1 in a speedrun"):
        training.create(config, NUM_TRAIN, 10)
