"""Cross entropy against torch; sums that no batch size, padding or length of run changes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcifar import metrics
from jaxcifar.errors import UserError


def batch(n=64, num_classes=10, scale=4.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (n, num_classes)).astype(np.float32)
    return logits, rng.integers(0, num_classes, n).astype(np.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_cross_entropy_and_gradient_equal_torch(smoothing, soft, scale):
    torch = pytest.importorskip("torch")
    logits, targets = batch(scale=scale)
    if soft:
        targets = np.random.default_rng(1).dirichlet(np.ones(10), 64).astype(np.float32)
    ours = metrics.cross_entropy(jnp.asarray(logits), jnp.asarray(targets), smoothing)
    assert ours.shape == (64,) and ours.dtype == jnp.float32
    x = torch.tensor(logits, requires_grad=True)
    y = torch.tensor(targets) if soft else torch.tensor(targets).long()
    theirs = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)(x, y)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda z: metrics.cross_entropy(z, jnp.asarray(targets), smoothing).mean())
    theirs.mean().backward()
    np.testing.assert_allclose(gradient(jnp.asarray(logits)), x.grad.numpy(), atol=1e-8, rtol=1e-5)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits, targets = batch()
    low = jnp.asarray(logits, jnp.bfloat16)
    ours = metrics.cross_entropy(low, jnp.asarray(targets), 0.1)
    assert ours.dtype == jnp.float32
    same = metrics.cross_entropy(low.astype(jnp.float32), jnp.asarray(targets), 0.1)
    np.testing.assert_array_equal(ours, same)


def test_batch_sums_count_real_examples_only():
    logits, targets = batch()
    padded = np.concatenate([logits, np.full((5, 10), np.nan, np.float32)])
    labels = np.concatenate([targets, np.zeros(5, np.int32)])
    mask = np.arange(69) < 64
    plain = metrics.batch_sums(jnp.asarray(logits), jnp.asarray(targets), top5=True)
    for kind in (np.float32, bool):
        masked = jax.jit(metrics.batch_sums, static_argnames="top5")(
            padded, labels, mask.astype(kind), top5=True
        )
        assert masked["count"] == 64 and masked["count"].dtype == jnp.int32
        assert masked["correct"] == plain["correct"] == (logits.argmax(1) == targets).sum()
        np.testing.assert_allclose(masked["loss_sum"], plain["loss_sum"], rtol=1e-6)
    rank = (logits > logits[np.arange(64), targets][:, None]).sum(1)
    assert plain["correct5"] == masked["correct5"] == (rank < 5).sum()


def test_soft_targets_are_counted_by_their_largest_class():
    logits, targets = batch()
    soft = 0.7 * np.eye(10, dtype=np.float32)[targets] + 0.3 * np.eye(10, dtype=np.float32)[3]
    hard = metrics.batch_sums(jnp.asarray(logits), jnp.asarray(targets), top5=True)
    mixed = metrics.batch_sums(jnp.asarray(logits), jnp.asarray(soft), top5=True)
    assert mixed["correct"] == hard["correct"] and mixed["correct5"] == hard["correct5"]
    assert mixed["loss_sum"] != hard["loss_sum"]


@pytest.mark.parametrize("size", [1, 7, 50, 100])
def test_the_batch_size_does_not_change_the_result(size):
    logits, targets = batch(100, seed=2)
    total = None
    for start in range(0, 100, size):
        n = min(size, 100 - start)
        padded = np.zeros((size, 10), np.float32), np.zeros(size, np.int32)
        padded[0][:n], padded[1][:n] = logits[start : start + n], targets[start : start + n]
        sums = metrics.batch_sums(*map(jnp.asarray, padded), jnp.arange(size) < n)
        total = sums if total is None else metrics.add(total, sums)
    result = metrics.finalize(total, "val")
    assert set(result) == {"val_loss", "val_accuracy"}
    assert all(type(value) is float for value in result.values())
    assert result["val_accuracy"] == 100.0 * (logits.argmax(1) == targets).mean()
    losses = metrics.cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    exact = np.asarray(losses, np.float64).mean()
    assert abs(result["val_loss"] / exact - 1) < 2e-7  # the sum within one batch is in float32


def test_sums_of_many_batches_lose_no_digit():
    """60,000 losses added one by one in float32: plain addition is wrong by 1e-5, this by 1e-9."""
    losses = np.random.default_rng(3).gamma(2.0, 0.1, 60_000).astype(np.float32)
    zero = {"loss_sum": 0.0, "loss_error": 0.0, "correct": 0, "count": 0}
    zero = {k: jnp.asarray(v, jnp.float32 if "loss" in k else jnp.int32) for k, v in zero.items()}

    def step(total, loss):
        one = {**zero, "loss_sum": loss, "correct": jnp.int32(1), "count": jnp.int32(1)}
        return (metrics.add(total[0], one), total[1] + loss), None

    (sums, plain), _ = jax.jit(lambda x: jax.lax.scan(step, (zero, jnp.float32(0)), x))(losses)
    exact = math.fsum(losses.astype(np.float64)) / len(losses)
    result = metrics.finalize(sums, "train")
    assert sums["count"] == 60_000 and result["train_accuracy"] == 100.0
    assert abs(result["train_loss"] / exact - 1) < 1e-9
    assert abs(float(plain) / len(losses) / exact - 1) > 1e-7  # the plain sum does lose digits
    stacked = {k: np.stack([v, v]) for k, v in sums.items()}
    assert metrics.finalize(stacked, "train") == result


def test_no_examples_is_an_error():
    logits, targets = batch(4)
    sums = metrics.batch_sums(jnp.asarray(logits), jnp.asarray(targets), jnp.zeros(4), top5=True)
    with pytest.raises(UserError, match="no test examples"):
        metrics.finalize(sums, "test")


def test_finalize_reports_top5():
    logits, targets = batch(200, 100)
    sums = metrics.batch_sums(jnp.asarray(logits), jnp.asarray(targets), top5=True)
    result = metrics.finalize(sums, "test")
    assert result["test_accuracy_top5"] == 100 * int(sums["correct5"]) / 200
    assert result["test_accuracy_top5"] > result["test_accuracy"]


def test_sums_add_over_devices():
    logits, targets = batch(64)
    split = jnp.asarray(logits).reshape(8, 8, 10), jnp.asarray(targets).reshape(8, 8)
    sums = jax.pmap(lambda x, y: jax.lax.psum(metrics.batch_sums(x, y), "d"), axis_name="d")(*split)
    whole = metrics.batch_sums(jnp.asarray(logits), jnp.asarray(targets))
    assert sums["correct"][0] == whole["correct"] and sums["count"][0] == 64
    np.testing.assert_allclose(sums["loss_sum"][0], whole["loss_sum"], rtol=1e-6)


def test_confusion_counts_pairs():
    rng = np.random.default_rng(4)
    labels, predictions = rng.integers(0, 10, (2, 3000)).astype(np.int32)
    mask = (rng.random(3000) < 0.9).astype(np.float32)
    expected = np.zeros((10, 10), np.int64)
    np.add.at(expected, (labels[mask > 0], predictions[mask > 0]), 1)
    ours = jax.jit(metrics.confusion, static_argnums=2)(labels, predictions, 10, mask)
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, expected)
    everything = metrics.confusion(jnp.asarray(labels), jnp.asarray(predictions), 10)
    assert everything.sum() == 3000
    assert everything[2, 7] == ((labels == 2) & (predictions == 7)).sum()
