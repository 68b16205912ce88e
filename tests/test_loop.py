"""What the loop does between the steps, compared with what is computed here by other means."""

import shutil

import jax
import numpy as np
import pytest
import tiny
import torch
from test_invariants import StopAfter, assert_same_bits

from jaxcifar import config as config_lib
from jaxcifar import splits, steps, train
from jaxcifar.errors import UserError
from jaxcifar.state import create_state
from jaxcifar.task import create_task

LENET = {"model": config_lib.model("lenet"), "augment": ""}  # no BatchNorm, nothing random


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_training_sums_are_those_of_the_epochs_own_examples(tmp_path, monkeypatch):
    # The rate is 0 after the first epoch: what the network then is, all later epochs measure.
    config = tiny.tiny_config(epochs=3, schedule__name="multistep", schedule__milestones=(1,),
                              schedule__gamma=0.0, **LENET)
    summary, rows = tiny.fit(config, tmp_path, monkeypatch)
    data = splits.load(config).train
    task = create_task(config, len(data["labels"]), 10)
    logits = task.model.apply(summary.state.variables(), task.normalize(data["images"]), train=False)
    chosen = torch.from_numpy(np.array(logits)), torch.from_numpy(data["labels"]).long()
    loss = float(torch.nn.functional.cross_entropy(*chosen))
    accuracy = float((chosen[0].argmax(1) == chosen[1]).float().mean())
    assert len(rows) == 3 and abs(rows[0]["train_loss"] - loss) > 1e-2
    for row in rows[1:]:
        assert row["train_loss"] == pytest.approx(loss, rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(100 * accuracy)


def test_a_field_that_only_a_speedrun_reads_is_refused():
    with pytest.raises(UserError, match="config.speedrun.cutout = 12 has no effect on this training"):
        train.check(tiny.tiny_config(speedrun__cutout=12))


def test_before_anything_was_saved_no_checkpoint_is_spoken_of(tmp_path, monkeypatch):
    config = tiny.tiny_config(optimizer__learning_rate=1e30)
    with pytest.raises(train.NonFiniteLoss, match=r"at step \d+ of the run: lower config.optimizer"):
        tiny.fit(config, tmp_path, monkeypatch)


@pytest.mark.parametrize("monitor", ["val_loss", "val_accuracy"])
def test_the_rates_of_a_plateau_are_torchs_for_the_runs_own_metrics(monitor, tmp_path, monkeypatch):
    config = tiny.tiny_config(
        epochs=8, schedule__name="plateau", schedule__monitor=monitor, schedule__patience=0,
        schedule__factor=0.5, schedule__threshold=0.1, schedule__cooldown=1, **LENET)
    _, rows = tiny.fit(config, tmp_path, monkeypatch)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "min" if monitor == "val_loss" else "max", factor=0.5, patience=0, threshold=0.1,
        cooldown=1)
    expected = []
    for row in rows:
        expected.append(optimizer.param_groups[0]["lr"])
        rule.step(row[monitor])
    np.testing.assert_allclose([row["learning_rate"] for row in rows], expected, rtol=1e-6)
    assert 1 < len(set(expected)) < len(rows), "it lowers the rate after some epochs only"


@pytest.mark.parametrize(("selection", "column", "best"), [
    ("best_val_loss", "val_loss", min), ("best_val_accuracy", "val_accuracy", max),
    ("last", "val_accuracy", max)])
def test_the_result_names_the_best_epoch_on_validation(selection, column, best, tmp_path,
                                                       monkeypatch):
    config = tiny.tiny_config(epochs=4, selection=selection, **LENET)
    summary, rows = tiny.fit(config, tmp_path, monkeypatch)
    values = [row[column] for row in rows]
    found = summary.result["best_on_validation"]
    assert found["rule"] == f"best_{column}"
    assert found["epoch"] == 1 + values.index(best(values))
    assert {key: found[key] for key in rows[0]} == rows[found["epoch"] - 1]


SPARSE = {"epochs": 5, "save_every_epochs": 3, "selection": "best_val_loss",
          "schedule__name": "multistep", "schedule__milestones": (2,), "schedule__gamma": 0.0}


def test_a_run_that_saves_seldom_keeps_its_best_epoch(tmp_path, monkeypatch):
    config = tiny.tiny_config(**SPARSE, **LENET)
    summary, rows = tiny.fit(config, tmp_path, monkeypatch)
    losses = [row["val_loss"] for row in rows]
    assert losses.index(min(losses)) == 1, "at rate 0 no later epoch is better than the second"
    assert summary.result["selection"]["epoch"] == 2
    assert saved_steps(tmp_path) == [8, 12, 20]  # the best, and the newest two: epochs 3 and 5
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    (tmp_path / "result.json").unlink()
    again, same = tiny.fit(config, tmp_path, monkeypatch)
    assert same == rows and saved_steps(tmp_path) == [8, 12, 20]
    assert_same_bits(again.state, summary.state)
    assert again.result["selection"] == summary.result["selection"]
    assert again.result["test_loss"] == summary.result["test_loss"]


def damage(checkpoint):
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(bytes(content))


def test_an_epochs_damaged_checkpoint_is_set_aside_and_written_again(tmp_path, monkeypatch):
    config = tiny.tiny_config(epochs=3, **LENET)
    whole, rows = tiny.fit(config, tmp_path / "whole", monkeypatch)
    with pytest.raises(train.Interrupted):  # in the third epoch, before its first step
        tiny.fit(config, tmp_path / "run", monkeypatch, stop=StopAfter(8))
    assert saved_steps(tmp_path / "run")[-1] == 8
    damage(tmp_path / "run" / "checkpoints" / "8")
    with pytest.warns(UserWarning, match="checkpoint .*8 is damaged"), pytest.raises(
            train.Interrupted):  # after the epoch whose checkpoint it was
        tiny.fit(config, tmp_path / "run", monkeypatch, stop=StopAfter(4))
    assert (tmp_path / "run" / "damaged_checkpoint_8").is_dir()
    parts, part_rows = tiny.fit(config, tmp_path / "run", monkeypatch)
    assert part_rows == rows
    assert_same_bits(parts.state, whole.state)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path, monkeypatch):
    config = tiny.tiny_config(epochs=1, **LENET)
    tiny.fit(config, tmp_path, monkeypatch)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        damage(checkpoint)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(
            UserError, match="no checkpoint in .* can be read: remove the folder"):
        tiny.fit(config, tmp_path, monkeypatch)


CHANGES = [
    {"optimizer__momentum": 0.5}, {"optimizer__nesterov": True}, {"optimizer__weight_decay": 0.1},
    {"optimizer__weight_decay": 0.1, "optimizer__decay_exclude": "bias$"},
    {"optimizer__name": "adam", "optimizer__momentum": 0.0},
    {"optimizer__name": "adam", "optimizer__momentum": 0.0, "optimizer__betas": (0.5, 0.999)},
    {"optimizer__name": "adamw", "optimizer__momentum": 0.0, "optimizer__weight_decay": 0.1},
    {"max_grad_norm": 0.01}, {"max_grad_value": 0.001}, {"accumulate_steps": 2},
    {"label_smoothing": 0.2}, {"trainable": "^fc3/"}, {"lr_multipliers": "bias$=0.1"},
    {"optimizer__learning_rate": 0.01}, {"schedule__name": "cosine", "schedule__t_max": 3},
]


def after_two_steps(fields):
    config = tiny.tiny_config(**{"optimizer__learning_rate": 0.02, **LENET, **fields})
    config_lib.validate(config)
    task = create_task(config, 100, 10)
    rng = np.random.default_rng(0)
    batch = steps.Batch(rng.normal(0, 1, (8, 32, 32, 3)).astype(np.float32),
                        rng.integers(0, 10, 8).astype(np.int32), count=8, key=jax.random.key(0))
    state = create_state(task, 0).on_device()
    step = jax.jit(lambda state: steps.train_step(task, state, batch)[0])
    state = step(step(state).replace(epoch=np.int32(1), step=np.int32(task.steps_per_epoch)))
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


def test_every_field_of_the_optimisation_reaches_the_step():
    found = {"nothing": after_two_steps({})}
    for fields in CHANGES:
        found[str(fields)] = after_two_steps(fields)
    for name, values in found.items():
        assert np.isfinite(values).all(), name
    names = list(found)
    same = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]
            if np.abs(found[a] - found[b]).max() < 1e-7]
    assert not same
