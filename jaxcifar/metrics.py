"""Loss and accuracy as sums over examples, divided once, on the host, at the end.

Never a mean of means: the same numbers whatever the batch size, the padding and the device count.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcifar.errors import UserError


def cross_entropy(logits, targets, label_smoothing=0.0):
    """Return the cross entropy of each example, float32 [N], computed in float32.

    Args:
      logits: [N, C], any float dtype.
      targets: class indices, int [N], or class probabilities, float [N, C] (mixup, cutmix).
      label_smoothing: s in targets * (1 - s) + s / C.

    Source: torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=s).
    """
    num_classes = logits.shape[-1]
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets = jax.nn.one_hot(targets, num_classes)
    targets = targets.astype(jnp.float32) * (1 - label_smoothing) + label_smoothing / num_classes
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def batch_sums(logits, targets, mask=None, *, label_smoothing=0.0, top5=False):
    """Return the sums of one batch, a dict of scalars that `add` adds and `finalize` divides.

    Args:
      logits, targets, label_smoothing: as `cross_entropy`; against soft targets a prediction is
        correct where it is the most probable class.
      mask: [N], nonzero for a real example, 0 for padding (whose values, NaN included, do not
        count); None: all real.
      top5: also count the examples whose class is among the five largest logits ("correct5").

    Returns:
      float32 "loss_sum" and "loss_error" (its rounding error, see `add`), int32 "correct", "count"
      and with `top5` "correct5". All may be summed over devices with jax.lax.psum.
    """
    real = jnp.ones(logits.shape[:1], bool) if mask is None else mask > 0
    labels = targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)
    losses = cross_entropy(logits, targets, label_smoothing)
    sums = {
        "loss_sum": jnp.sum(jnp.where(real, losses, 0.0)),
        "loss_error": jnp.zeros([], jnp.float32),
        "correct": _count((jnp.argmax(logits, axis=-1) == labels) & real),
        "count": _count(real),
    }
    if top5:
        best = jax.lax.top_k(logits, 5)[1]
        sums["correct5"] = _count((best == labels[:, None]).any(axis=-1) & real)
    return sums


def add(a, b):
    """Return the sums of `a` and `b`: exact counts, and a loss as if summed in double precision.

    The rounding error of every float32 addition is kept in "loss_error" (Knuth's two-sum) and
    added back by `finalize`: thousands of batches lose no digit, in whatever order they come.
    """
    total = jax.tree.map(jnp.add, a, b)
    x, y, s = a["loss_sum"], b["loss_sum"], total["loss_sum"]
    y_in_s = s - x
    lost = (x - (s - y_in_s)) + (y - y_in_s)
    return {**total, "loss_error": total["loss_error"] + lost}


def finalize(sums, prefix):
    """Return {"<prefix>_loss": mean, "<prefix>_accuracy": percent, ...} as Python floats.

    Args:
      sums: from `batch_sums`, `add`; leading axes (one entry per step or per device) are summed in
        float64. With "correct5" the result has "<prefix>_accuracy_top5".
      prefix: "train", "val" or "test".

    Raises:
      UserError: the sums hold no example.
    """
    totals = {name: np.sum(np.asarray(x, np.float64)) for name, x in sums.items()}
    count = totals["count"]
    if count == 0:
        raise UserError(f"no {prefix} examples to average over: the {prefix} set must not be empty")
    result = {
        f"{prefix}_loss": float((totals["loss_sum"] + totals["loss_error"]) / count),
        f"{prefix}_accuracy": float(100 * totals["correct"] / count),
    }
    if "correct5" in totals:
        result[f"{prefix}_accuracy_top5"] = float(100 * totals["correct5"] / count)
    return result


def confusion(labels, predictions, num_classes, mask=None):
    """Return the confusion matrix, int32 [num_classes, num_classes]: rows true, columns predicted.

    `labels` and `predictions` are int [N]; `mask` as in `batch_sums`.
    """
    real = jnp.ones(labels.shape, jnp.int32) if mask is None else (mask > 0).astype(jnp.int32)
    matrix = jnp.zeros((num_classes, num_classes), jnp.int32)
    return matrix.at[labels, predictions].add(real)


def _count(flags):
    return jnp.sum(flags, dtype=jnp.int32)
