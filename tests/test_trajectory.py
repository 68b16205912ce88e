"""Fifty training steps beside torch: same weights, same batches, same losses and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from torch_twins import TWINS, randomized, timm_decay

from jaxcifar import steps, torch_weights
from jaxcifar.state import create_state
from jaxcifar.task import create_task

OPTIONS = {"channels": (4, 8), "blocks": (1, 1), "stem_width": 4, "shortcut_kernel": 1}
STEPS, BATCH = 50, 16

OPTIMIZERS = {
    "sgd": (dict(name="sgd", momentum=0.9, weight_decay=5e-4, learning_rate=0.02),
            lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=5e-4)),
    "nesterov": (dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4,
                      learning_rate=0.02),
                 lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)),
    "adam": (dict(name="adam", weight_decay=5e-4, learning_rate=1e-3),
             lambda p: torch.optim.Adam(p, 1e-3, weight_decay=5e-4)),
    # A decay of 0.01 would move the weights by less than what float32 leaves open.
    "adamw": (dict(name="adamw", weight_decay=0.5, learning_rate=1e-3),
              lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.5)),
}


def batches():
    """Return float32 images [50, 16, 32, 32, 3] and labels int [50, 16]."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (STEPS, BATCH)).astype(np.int32)
    images = rng.normal(0, 1, (STEPS, BATCH, 32, 32, 3)).astype(np.float32)
    return images + (labels / 10)[..., None, None, None].astype(np.float32), labels


def torch_trajectory(make_optimizer, *, label_smoothing=0.0, max_grad_norm=0.0, accumulate_steps=1,
                     ema_decay=0.0, ema_warmup=True, make_scheduler=None):
    """Train the twin; return its start, end and averaged state_dicts and its losses [50].

    make_optimizer: list of parameters -> torch optimizer. make_scheduler: optimizer -> scheduler.
    """
    torch.manual_seed(0)
    twin = randomized(TWINS["resnet5m"](num_classes=10, **OPTIONS)).train()
    start = {k: v.clone() for k, v in twin.state_dict().items()}
    average = {k: v.clone() for k, v in start.items()}
    optimizer = make_optimizer(list(twin.parameters()))
    scheduler = make_scheduler and make_scheduler(optimizer)
    losses = []
    for i, (images, labels) in enumerate(zip(*batches(), strict=True), 1):
        logits = twin(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
        loss = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(labels).long(), label_smoothing=label_smoothing)
        (loss / accumulate_steps).backward()
        losses.append(loss.item())
        if i % accumulate_steps:
            continue
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        weight = 1 - timm_decay(ema_decay, i // accumulate_steps, warmup=ema_warmup)
        for key, value in twin.state_dict().items():
            average[key] = torch.lerp(average[key].float(), value.float(), weight)
    return start, twin.state_dict(), average, np.array(losses)


def jax_trajectory(optimizer, start, **fields):
    """Train from the twin's start by steps.train_step; return what `torch_trajectory` returns."""
    config = tiny.tiny_config(epochs=1, batch_size=BATCH, **fields)
    config.model.update(OPTIONS)
    config.optimizer.momentum = 0.0
    config.optimizer.update(optimizer)
    task = create_task(config, num_train=STEPS * BATCH, num_classes=10)
    variables = torch_weights.from_torch("resnet5m", start, **OPTIONS)
    state = create_state(task, 0).replace(**variables).on_device()
    state = state.replace(opt_state=task.tx.init(state.params))

    @jax.jit
    def step(state, images, labels):
        batch = steps.Batch(images, labels, None, BATCH, jax.random.key(0))
        state, sums = steps.train_step(task, state, batch)
        return state, sums["loss_sum"] / sums["count"]

    losses = []
    with jax.default_matmul_precision("highest"):
        for images, labels in zip(*batches(), strict=True):
            state, loss = step(state, jnp.asarray(images), jnp.asarray(labels))
            losses.append(float(loss))
    end = {"params": state.params, "batch_stats": state.batch_stats}
    average = state.ema if config.ema_decay else end
    return (start, torch_weights.to_torch("resnet5m", end, **OPTIONS),
            torch_weights.to_torch("resnet5m", average, **OPTIONS), np.array(losses))


def assert_close(ours, theirs, start):
    """Compare state_dicts: every tensor within 2% of the way that torch's has gone since the start."""
    for key, value in theirs.items():
        if key.endswith("num_batches_tracked"):
            continue
        value = value.numpy()
        moved = np.abs(value - start[key].numpy()).max()
        error = np.abs(ours[key] - value).max()
        assert error <= 0.02 * moved + 1e-6, f"{key}: {error} off after a way of {moved}"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_follow_torch(name):
    options, make_optimizer = OPTIMIZERS[name]
    start, end, _, losses = torch_trajectory(make_optimizer)
    _, our_end, _, our_losses = jax_trajectory(options, start)
    assert losses[-5:].mean() < losses[:5].mean() - 0.05, "the trajectory goes somewhere"
    np.testing.assert_allclose(our_losses, losses, rtol=2e-3)
    assert_close(our_end, end, start)


def groups(parameters):
    """Return torch's parameter groups: weight decay for kernels only."""
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]


def test_fifty_steps_with_every_option_follow_torch():
    options = {"label_smoothing": 0.1, "max_grad_norm": 0.5, "accumulate_steps": 2, "ema_decay": 0.9}
    start, end, average, losses = torch_trajectory(
        lambda p: torch.optim.SGD(groups(p), 0.05, momentum=0.9), **options)
    optimizer = {"name": "sgd", "momentum": 0.9, "learning_rate": 0.05, "weight_decay": 0.02,
                 "decay_exclude": "bias$|scale$"}
    _, our_end, our_average, our_losses = jax_trajectory(optimizer, start, **options)
    np.testing.assert_allclose(our_losses, losses, rtol=2e-3)
    assert_close(our_end, end, start)
    assert_close(our_average, average, start)
    assert any((average[k] - end[k]).abs().max() > 0.01 for k in end), "an average of its own"


def test_fifty_steps_of_a_cycle_follow_torch():
    options = {"ema_decay": 0.95, "ema_warmup": False}
    start, end, average, losses = torch_trajectory(
        lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True),
        make_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.04, total_steps=STEPS), **options)
    optimizer = {"name": "sgd", "momentum": 0.9, "nesterov": True, "learning_rate": 0.04}
    _, our_end, our_average, our_losses = jax_trajectory(
        optimizer, start, schedule__name="one_cycle", schedule__cycle_momentum=True, **options)
    np.testing.assert_allclose(our_losses, losses, rtol=2e-3)
    assert_close(our_end, end, start)
    assert_close(our_average, average, start)
