"""Which epoch's parameters count, and when to stop: pure functions of what was measured so far.

A history is float64 [epochs, 4], one row per epoch and one column per name in `COLUMNS`, NaN where
nothing was measured. Epochs are counted from 1.
"""

import numpy as np

COLUMNS = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")


def empty_history(epochs):
    """Return a history of NaN, float64 [epochs, 4]."""
    return np.full((epochs, len(COLUMNS)), np.nan)


def record(history, epoch, row):
    """Return a copy of the history with an epoch's row (a dict) entered; epoch counts from 1."""
    history = np.array(history)
    history[epoch - 1] = [row.get(name, np.nan) for name in COLUMNS]
    return history


def best_epoch(history, rule):
    """Return the first epoch with the best value, counted from 1, or None when there is none.

    Args:
      history: see the module. rule: "best_" + a column; a loss is best when lowest.
    """
    column = rule.removeprefix("best_")
    values = np.array(history[:, COLUMNS.index(column)])
    if column.endswith("loss"):
        values = -values
    values[~np.isfinite(values)] = -np.inf
    return int(np.argmax(values)) + 1 if np.any(values > -np.inf) else None


def kept_rule(config):
    """Return the rule by which a run keeps its best checkpoint, or None when nothing is compared."""
    if config.selection != "last":
        return config.selection
    return "best_val_accuracy" if config.val_size else None


def is_over(history, epoch, config):
    """Return whether no epoch follows `epoch` (counted from 1): it is the last, or early stopping's."""
    return epoch >= config.epochs or should_stop(history, epoch, config)


def should_stop(history, epoch, config):
    """Return whether early stopping ends the run after `epoch` (counted from 1).

    The rule of the architectures report: from `min_epochs` on, stop when the best of the last
    `window` validation accuracies is the oldest of them.
    """
    window, minimum = config.early_stopping.window, config.early_stopping.min_epochs
    if not window or epoch < max(window, minimum):
        return False
    recent = history[epoch - window:epoch, COLUMNS.index("val_accuracy")]
    return bool(recent[0] >= np.max(recent))
