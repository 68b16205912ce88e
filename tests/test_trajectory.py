"""Fifty training steps beside torch: same weights, same batches, same losses and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from torch_twins import TWINS, randomized

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
    "adamw": (dict(name="adamw", weight_decay=0.01, learning_rate=1e-3),
              lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.01)),
}


def batches():
    """Return float32 images [50, 16, 32, 32, 3] and labels int [50, 16]."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (STEPS, BATCH)).astype(np.int32)
    images = rng.normal(0, 1, (STEPS, BATCH, 32, 32, 3)).astype(np.float32)
    return images + (labels / 10)[..., None, None, None].astype(np.float32), labels


def torch_trajectory(make_optimizer):
    """Train the twin; return its start and end state_dicts and its losses [50]."""
    torch.manual_seed(0)
    twin = randomized(TWINS["resnet5m"](num_classes=10, **OPTIONS)).train()
    start = {k: v.clone() for k, v in twin.state_dict().items()}
    optimizer = make_optimizer(twin.parameters())
    losses = []
    for images, labels in zip(*batches(), strict=True):
        optimizer.zero_grad()
        logits = twin(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return start, twin.state_dict(), np.array(losses)


def jax_trajectory(options, start):
    """Train from the twin's start by steps.train_step; return the end state_dict and the losses."""
    config = tiny.tiny_config(epochs=1, batch_size=BATCH)
    config.model.update(OPTIONS)
    config.optimizer.momentum = 0.0
    config.optimizer.update(options)
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
    return torch_weights.to_torch("resnet5m", end, **OPTIONS), np.array(losses)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_follow_torch(name):
    options, make_optimizer = OPTIMIZERS[name]
    start, end, losses = torch_trajectory(make_optimizer)
    ours, our_losses = jax_trajectory(options, start)
    assert losses[-5:].mean() < losses[:5].mean() - 0.05, "the trajectory goes somewhere"
    np.testing.assert_allclose(our_losses, losses, rtol=2e-3)
    for key, value in end.items():
        if key.endswith("num_batches_tracked"):
            continue
        value = value.numpy()
        moved = np.abs(value - start[key].numpy()).max()
        error = np.abs(ours[key] - value).max()
        assert error <= 0.02 * moved + 1e-6, f"{key}: {error} off after a way of {moved}"
