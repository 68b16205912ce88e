"""Selection rules and early stopping, on histories whose answer is known."""

import numpy as np
import pytest
import tiny

from jaxcifar import selection


def history(**columns):
    """Return a history with the given columns (lists over epochs)."""
    epochs = len(next(iter(columns.values())))
    made = selection.empty_history(epochs + 2)
    for name, values in columns.items():
        made[:epochs, selection.COLUMNS.index(name)] = values
    return made


@pytest.mark.parametrize(("rule", "columns", "epoch"), [
    ("best_val_loss", {"val_loss": [0.5, 0.3, 0.4, 0.3]}, 2),
    ("best_val_accuracy", {"val_accuracy": [50.0, 70.0, 70.0]}, 2),
    ("best_test_accuracy", {"test_accuracy": [50.0, 60.0, 55.0]}, 2),
    ("best_val_loss", {"val_loss": [np.nan, 0.3, np.inf]}, 2),
    ("best_val_loss", {"val_accuracy": [1.0]}, None),
])
def test_the_first_best_epoch_is_chosen(rule, columns, epoch):
    assert selection.best_epoch(history(**columns), rule) == epoch


def test_recording_leaves_the_old_history_alone():
    before = selection.empty_history(3)
    after = selection.record(before, 2, {"val_loss": 0.5, "val_accuracy": 80.0, "epoch": 2})
    assert np.isnan(before).all()
    np.testing.assert_array_equal(after[1], [0.5, 80.0, np.nan, np.nan])


@pytest.mark.parametrize(("accuracies", "stops"), [
    ([60, 61, 62, 63], False),
    ([60, 64, 62, 63, 61], True),   # the oldest of the last four, 64, is the best of them
    ([60, 64, 62, 63, 65], False),
    ([60, 64], False),              # too few epochs
])
def test_the_window_rule(accuracies, stops):
    config = tiny.tiny_config(early_stopping__window=4)
    table = history(val_accuracy=accuracies)
    assert selection.should_stop(table, len(accuracies), config) == stops


def test_the_window_rule_waits_for_min_epochs():
    table = history(val_accuracy=[64, 62, 63, 61])
    config = tiny.tiny_config(early_stopping__window=4, early_stopping__min_epochs=5)
    assert not selection.should_stop(table, 4, config)
    config.early_stopping.min_epochs = 4
    assert selection.should_stop(table, 4, config)
