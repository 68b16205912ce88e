"""The invariants of a run: reproducible, independent of devices and of grouping, resumable."""

import io
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from jaxcifar import config as config_lib
from jaxcifar import parallel, programs, splits, steps, train
from jaxcifar.errors import UserError
from jaxcifar.run import Run
from jaxcifar.state import create_state
from jaxcifar.task import create_task

# Float32 rounding, grown over a few steps of training with BatchNorm.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def assert_same_bits(a, b):
    """Check that two pytrees are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_rows(a, b):
    """Check two runs' rows: counts and rates equal, losses to float32 rounding."""
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for ours, theirs in zip(a, b, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[key], err_msg=key, **CLOSE)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run on one device, one step per call: (Summary, rows)."""
    with pytest.MonkeyPatch.context() as patch:
        return tiny.fit(tiny.tiny_config(), tmp_path_factory.mktemp("single"), patch)


def test_same_config_and_seed_give_the_same_bits(single, tmp_path, monkeypatch):
    again, rows = tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch)
    assert rows == single[1]
    assert_same_bits(again.state, single[0].state)


ANOTHER_PROCESS = """
import sys, tiny
from jaxcifar import data, train
data.load = lambda name, data_dir: tiny.tiny_dataset()
train.fit(tiny.tiny_config(), sys.argv[1])
"""


def test_another_process_gives_the_same_bits(single, tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    here = pathlib.Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run([sys.executable, "-c", ANOTHER_PROCESS, str(tmp_path)], env=environment,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert tiny.rows(tmp_path) == single[1]


def test_another_seed_gives_another_run(single, tmp_path, monkeypatch):
    _, rows = tiny.fit(tiny.tiny_config(seed=1, epochs=1), tmp_path, monkeypatch)
    assert rows[0]["train_loss"] != single[1][0]["train_loss"]


@pytest.mark.parametrize(("kind", "count"), [
    ("pmap", 1), ("pmap", 2), ("pmap", 4), ("pmap", 8),
    ("shard_map", 2), ("shard_map", 4), ("shard_map", 8)])
def test_the_number_of_devices_changes_nothing(kind, count, single, tmp_path, monkeypatch):
    # The last batch of 4 does not divide by 8: it is padded and masked there.
    config = tiny.tiny_config(parallel=kind, num_devices=count)
    summary, rows = tiny.fit(config, tmp_path, monkeypatch)
    assert_same_rows(rows, single[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-4),
                 summary.state.params, single[0].state.params)


@pytest.mark.parametrize("steps", ["2", "epoch"])
def test_the_grouping_of_steps_changes_nothing(steps, single, tmp_path, monkeypatch):
    _, rows = tiny.fit(tiny.tiny_config(steps_per_call=steps), tmp_path, monkeypatch)
    assert_same_rows(rows, single[1])


def test_mixing_dropout_and_ema_do_not_see_the_devices(tmp_path, monkeypatch):
    fields = {"augment": "crop(2)|flip|cutmix(1.0)", "ema_decay": 0.9, "label_smoothing": 0.1,
              "model": config_lib.model("cnn3", dropout=0.5), "optimizer__learning_rate": 0.01,
              "epochs": 1}
    one, rows = tiny.fit(tiny.tiny_config(**fields), tmp_path / "1", monkeypatch)
    eight, rows_8 = tiny.fit(tiny.tiny_config(parallel="pmap", num_devices=8, **fields),
                             tmp_path / "8", monkeypatch)
    assert_same_rows(rows_8, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE),
                 one.state.ema, eight.state.ema)


def test_a_run_with_replica_batch_norm_is_another_than_with_global(tmp_path, monkeypatch):
    losses = [tiny.fit(tiny.tiny_config(parallel="pmap", num_devices=2, bn_sync=kind, epochs=1,
                                        batch_size=64, drop_last=True),
                       tmp_path / kind, monkeypatch)[1][0]["train_loss"]
              for kind in ("replica", "global")]
    assert np.isfinite(losses).all() and abs(losses[0] - losses[1]) > 1e-4


def test_replica_batch_norm_is_each_devices_and_keeps_the_first_devices_statistics():
    task = create_task(tiny.tiny_config(bn_sync="replica", num_devices=2), 100, 10)
    state = create_state(task, 0)
    images = np.random.default_rng(0).normal(0, 1, (2, 4, 32, 32, 3)).astype(np.float32)

    def forward(images, axis_name=None):
        batch = steps.Batch(images, None, key=jax.random.key(0))
        return steps.forward_train(task, state.params, state.batch_stats, batch, axis_name)

    logits, stats = jax.pmap(lambda x: forward(x, "data"), "data", devices=jax.devices()[:2])(images)
    alone = [jax.jit(forward)(x) for x in images]
    for i in range(2):
        np.testing.assert_allclose(logits[i], alone[i][0], rtol=1e-4, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
                     stats, alone[0][1])
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(
        *(jax.tree.leaves(one[1]) for one in alone), strict=True)), "the shares differ"


class StopAfter:
    """Ask for a stop, with SIGTERM's number, at the n-th question."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self):
        self.left -= 1
        return 15 if self.left < 0 else 0


@pytest.mark.parametrize("calls", [2, 4, 5, 7])
def test_interrupted_and_resumed_equals_uninterrupted(calls, single, tmp_path, monkeypatch):
    with pytest.raises(train.Interrupted) as caught:
        tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch, stop=StopAfter(calls))
    assert caught.value.signum == 15
    summary, rows = tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch)
    assert rows == single[1]
    assert_same_bits(summary.state, single[0].state)
    assert summary.result["test_accuracy"] == single[0].result["test_accuracy"]


@pytest.mark.parametrize("fields", [
    {"parallel": "pmap", "num_devices": 2}, {"parallel": "shard_map", "num_devices": 4},
    {"steps_per_call": "2"},
    {"optimizer__name": "muon", "optimizer__muon_exclude": "^linear/", "optimizer__momentum": 0.0},
], ids=lambda fields: str(next(iter(fields.values()))))
def test_other_programs_resume_to_the_same_bits_too(fields, tmp_path, monkeypatch):
    config = tiny.tiny_config(**fields)
    whole, rows = tiny.fit(config, tmp_path / "whole", monkeypatch)
    with pytest.raises(train.Interrupted):
        tiny.fit(config, tmp_path / "parts", monkeypatch, stop=StopAfter(2))
    parts, part_rows = tiny.fit(config, tmp_path / "parts", monkeypatch)
    assert part_rows == rows
    assert_same_bits(parts.state, whole.state)


def test_a_run_resumes_on_another_number_of_devices(single, tmp_path, monkeypatch):
    with pytest.raises(train.Interrupted):
        tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch, stop=StopAfter(6))
    config = tiny.tiny_config(parallel="pmap", num_devices=4)
    _, rows = tiny.fit(config, tmp_path, monkeypatch)
    assert_same_rows(rows, single[1])


def test_a_damaged_newest_checkpoint_falls_back(single, tmp_path, monkeypatch):
    with pytest.raises(train.Interrupted):
        tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch, stop=StopAfter(6))
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda p: int(p.name))
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="is damaged"):
        summary, rows = tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch)
    assert rows == single[1]
    assert_same_bits(summary.state, single[0].state)


def test_another_configuration_is_refused(tmp_path, monkeypatch):
    tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
    with pytest.raises(UserError, match="config.optimizer.momentum: 0.9 there, 0.5 here"):
        tiny.fit(tiny.tiny_config(epochs=1, optimizer__momentum=0.5), tmp_path, monkeypatch)


def test_every_test_image_counts_once(single, tmp_path, monkeypatch):
    # 50 test and 20 validation images in batches of 32, whatever the devices: 20 and 50 counted.
    for row in single[1]:
        assert (row["val_accuracy"] * 20 / 100) == pytest.approx(round(row["val_accuracy"] * 0.2))
    accuracy = single[0].result["test_accuracy"] * 50 / 100
    assert accuracy == pytest.approx(round(accuracy))
    for size, devices in ((1000, 1), (0, 8)):  # 0: 104, divided among eight
        config = tiny.tiny_config(eval_batch_size=size, num_devices=devices)
        summary, _ = tiny.fit(config, tmp_path / str(size), monkeypatch)
        assert summary.result["test_accuracy"] == single[0].result["test_accuracy"]
        np.testing.assert_allclose(summary.result["test_loss"], single[0].result["test_loss"],
                                   rtol=1e-5)

EVERYTHING = {
    "optimizer__name": "adamw", "optimizer__momentum": 0.0, "optimizer__weight_decay": 0.05,
    "optimizer__learning_rate": 0.01, "schedule__name": "plateau", "schedule__patience": 0,
    "schedule__threshold": 0.2, "schedule__factor": 0.5, "accumulate_steps": 3, "ema_decay": 0.9,
    "max_grad_norm": 1.0, "label_smoothing": 0.1, "dtype": "bfloat16", "epochs": 12,
    "selection": "best_val_loss", "test_every_epoch": True, "early_stopping__window": 2,
    "early_stopping__min_epochs": 3,
    "augment": "rotation(5)|flip|crop(2)|autoaugment|mixup(0.2)",
}


@pytest.mark.parametrize(("kind", "count"), [("jit", 1), ("pmap", 2)])
def test_a_run_with_everything_resumes_to_the_same_bits(kind, count, tmp_path, monkeypatch):
    config = tiny.tiny_config(parallel=kind, num_devices=count, **EVERYTHING)
    whole, rows = tiny.fit(config, tmp_path / "whole", monkeypatch)
    rates = [row["learning_rate"] for row in rows]
    assert rates[-1] < rates[0] == 0.01, "the plateau lowered the rate"
    assert 3 <= len(rows) < 12, "early stopping ended it"
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    for calls, step in ((5, 5), (3, 8)):  # after the second of three batches to an update
        with pytest.raises(train.Interrupted):
            tiny.fit(config, tmp_path / "parts", monkeypatch, stop=StopAfter(calls))
        newest = max(int(path.name) for path in (tmp_path / "parts" / "checkpoints").iterdir())
        assert newest == step and step % 3 == 2
    parts, part_rows = tiny.fit(config, tmp_path / "parts", monkeypatch)
    assert part_rows == rows
    assert_same_bits(parts.state, whole.state)
    assert parts.result["selection"] == whole.result["selection"]
    assert parts.result["test_accuracy"] == whole.result["test_accuracy"]
    chosen = whole.result["selection"]["epoch"]
    losses = [row["val_loss"] for row in rows]
    assert chosen == 1 + losses.index(min(losses))
    assert whole.result["test_loss"] == pytest.approx(rows[chosen - 1]["test_loss"])


SHORT = EVERYTHING | {"epochs": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def short_rows(tmp_path_factory):
    """The rows of two epochs with everything, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        return tiny.fit(tiny.tiny_config(**SHORT), tmp_path_factory.mktemp("short"), patch)[1]


@pytest.mark.parametrize(("kind", "count"), [("jit", 1), ("pmap", 2), ("shard_map", 4)])
def test_the_accelerators_program_gives_the_same_numbers(kind, count, short_rows, tmp_path,
                                                         monkeypatch):
    # On an accelerator: a scanned epoch, one loop over evaluation, vectorised augmentation, XLA's
    # own convolution gradients. All of it can run on the CPU as well.
    monkeypatch.setattr(programs, "runs_on_cpu", lambda devices: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = tiny.tiny_config(parallel=kind, num_devices=count, **SHORT)
    _, others = tiny.fit(config, tmp_path / "accelerator", monkeypatch)
    assert_same_rows(others, short_rows)


def test_a_run_selected_on_the_test_set_says_so(tmp_path, monkeypatch):
    config = tiny.tiny_config(val_size=0, test_every_epoch=True, selection="best_test_accuracy")
    summary, rows = tiny.fit(config, tmp_path, monkeypatch)
    assert summary.result["selection"]["uses_test_set"]
    assert summary.result["best_on_validation"] is None
    assert summary.result["test_accuracy"] == max(row["test_accuracy"] for row in rows)


def test_a_rate_that_follows_the_test_set_counts_as_its_use():
    fields = {"schedule__name": "plateau", "test_every_epoch": True}
    assert train.uses_test_set(tiny.tiny_config(schedule__monitor="test_loss", **fields))
    assert not train.uses_test_set(tiny.tiny_config(schedule__monitor="val_loss", **fields))
    assert not train.uses_test_set(tiny.tiny_config(test_every_epoch=True))


def test_the_split_is_the_split_seeds_whatever_the_seed(monkeypatch):
    dataset = tiny.tiny_dataset()
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: dataset)
    images = [splits.load(tiny.tiny_config(**fields)).train["images"]
              for fields in ({}, {"seed": 1}, {"split_seed": 1})]
    np.testing.assert_array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch, stop=lambda: 0)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())

    class Poisoned:
        devices = parallel.create(tiny.tiny_config())

    state = create_state(create_task(tiny.tiny_config(), 100, 10), 0)
    bad = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    run = Run(create_task(tiny.tiny_config(), 100, 10), tmp_path, io.StringIO())
    with pytest.raises(train.NonFiniteLoss, match="the last good checkpoint is of step 8"):
        train.save(run, Poisoned, bad.on_device(), state)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_damaged_selected_checkpoint_is_one_line(tmp_path, monkeypatch):
    config = tiny.tiny_config(selection="best_val_loss")
    summary, _ = tiny.fit(config, tmp_path, monkeypatch)
    step = summary.result["selection"]["epoch"] * 4
    for path in (tmp_path / "checkpoints" / str(step)).rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"damaged")
    run = Run(create_task(config, 100, 10), tmp_path, io.StringIO()) if step != 8 else None
    if run is None:  # the newest: opening falls back to the one before
        with pytest.warns(UserWarning, match="is damaged"):
            run = Run(create_task(config, 100, 10), tmp_path, io.StringIO())
    with pytest.raises(UserError, match="checkpoint of the selected epoch"):
        run.restore(summary.result["selection"]["epoch"])


def test_starting_a_finished_run_again_keeps_what_its_training_took(tmp_path, monkeypatch):
    once, rows = tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
    again, same = tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
    assert same == rows
    assert again.result == once.result and once.result["seconds"]["total"] > 0


def test_a_finished_run_without_checkpoints_is_not_overwritten(tmp_path, monkeypatch):
    tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "checkpoints")
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="config.seed: 0 there, 1 here"):
        tiny.fit(tiny.tiny_config(epochs=1, seed=1), tmp_path, monkeypatch)
    with pytest.raises(UserError, match="the result of a finished run, whose checkpoints are gone"):
        tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
    assert (tmp_path / "result.json").exists() and (tmp_path / "metrics.jsonl").read_text() == rows


def test_processes_with_other_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "agree_on", lambda number: max(number, 2**31 - 1))  # another's
    with pytest.raises(UserError, match="the processes have the data set in different orders"):
        tiny.fit(tiny.tiny_config(epochs=1), tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run").exists()
