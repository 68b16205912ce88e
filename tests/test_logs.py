"""The run folder's files, the lines and the bar, the clock."""

import errno
import io
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcifar import event_files, logs, run_folder
from jaxcifar.errors import UserError


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands in for the module `time`; moves only when told."""

    def __init__(self):
        self.seconds = 100.0

    def perf_counter(self):
        return self.seconds

    def time(self):
        return 1_700_000_000.0 + self.seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(logs, "time", made)
    return made


def start(workdir, *, resume_epoch=None, primary=True, tensorboard=False, stream=None):
    return logs.RunLog(workdir, primary=primary, resume_epoch=resume_epoch, tensorboard=tensorboard,
                       stream=stream or io.StringIO())


def row(epoch, **extra):
    return {"epoch": epoch, "step": 704 * epoch, "learning_rate": 1e-3,
            "train_loss": 2.0 / epoch, "train_accuracy": 10.0 * epoch, **extra}


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    return json.loads(text, parse_constant=refuse)


# The run folder -----------------------------------------------------------------------------------

def test_interrupted_and_resumed_rows_equal_uninterrupted_ones(tmp_path):
    whole = start(tmp_path / "whole")
    for epoch in range(1, 6):
        whole.epoch(row(epoch, seconds=20.0), epochs=5)
    first = start(tmp_path / "parts")
    for epoch in range(1, 5):
        first.epoch(row(epoch, seconds=33.0), epochs=5)
    # The last checkpoint was epoch 2's: epochs 3 and 4 are trained again.
    second = start(tmp_path / "parts", resume_epoch=3)
    assert [entry["epoch"] for entry in second.read_rows()] == [1, 2]
    for epoch in range(3, 6):
        second.epoch(row(epoch, seconds=44.0), epochs=5)

    def timeless(log):
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in log.read_rows()]
    assert timeless(second) == timeless(whole)
    assert [entry["seconds"] for entry in second.read_rows()] == [33.0, 33.0, 44.0, 44.0, 44.0]


@pytest.mark.parametrize("torn", [b'{"epoch": 3, "st', b'{"epoch": 3, "step": 2112}', b"\xc3"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    log = start(tmp_path)
    log.epoch(row(1), epochs=4)
    log.epoch(row(2), epochs=4)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert log.read_rows() == [row(1), row(2)]
    log = start(tmp_path, resume_epoch=4)
    log.epoch(row(4), epochs=4)
    assert log.read_rows() == [row(1), row(2), row(4)]


@pytest.mark.parametrize("line", ["{]", "[1]", '{"epoch": 2}', '{"epoch": "2", "step": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    good = json.dumps(row(1))
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a row") as error:
        start(tmp_path, resume_epoch=5)
    assert "\n" not in str(error.value)
    assert line in (tmp_path / "metrics.jsonl").read_text()  # nothing was thrown away


def test_a_fresh_start_keeps_no_rows(tmp_path):
    start(tmp_path).epoch(row(1), epochs=2)
    assert start(tmp_path, resume_epoch=2).read_rows() == [row(1)]
    assert start(tmp_path).read_rows() == []


def test_rows_are_valid_json_whatever_the_numbers(tmp_path):
    log = start(tmp_path)
    log.epoch({"epoch": np.int32(1), "step": jnp.int32(5), "train_loss": float("nan"),
               "val_loss": jnp.float32(0.1), "val_accuracy": np.float64("inf"),
               "test_loss": np.float32("-inf")}, epochs=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict_json(line) for line in lines] == [
        {"epoch": 1, "step": 5, "train_loss": None, "val_loss": float(np.float32(0.1)),
         "val_accuracy": None, "test_loss": None}]
    assert log.read_rows()[0]["val_loss"] == float(np.float32(0.1))  # every bit


def test_config_and_result_are_written_in_a_stable_order(tmp_path):
    log = start(tmp_path)
    log.write_config({"model": {"width": 64, "blocks": (5, 4)}, "batch_size": 128})
    first = (tmp_path / "config.json").read_text()
    log.write_config({"batch_size": 128, "model": {"blocks": [5, 4], "width": 64}})
    assert (tmp_path / "config.json").read_text() == first
    assert list(strict_json(first)) == ["batch_size", "model"]
    log.result({"test_accuracy": jnp.float32(94.5), "confusion": np.eye(2, dtype=int),
                "best": {"val_loss": float("nan")}})
    text = (tmp_path / "result.json").read_text()
    assert text.startswith('{\n  "test_accuracy": 94.5,\n') and text.endswith("}\n")
    assert strict_json(text) == {"test_accuracy": 94.5, "confusion": [[1, 0], [0, 1]],
                                 "best": {"val_loss": None}}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    log = start(tmp_path)
    log.epoch(row(1), epochs=2)
    log.result({"test_accuracy": 90.0})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(run_folder.os, call, full)
    with pytest.raises(UserError, match=r"cannot write .*result\.json: No space left") as error:
        log.result({"test_accuracy": 91.0})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        start(tmp_path, resume_epoch=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unencodable_result_leaves_the_old_one(tmp_path):
    log = start(tmp_path)
    log.result({"a": 1})
    with pytest.raises(TypeError):
        log.result({"a": object()})
    assert strict_json((tmp_path / "result.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("workdir", ["file", "file/run"])
def test_an_unwritable_workdir_is_one_line(tmp_path, workdir):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*; choose a place") as error:
        start(tmp_path / workdir)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_other_processes_write_and_print_nothing(tmp_path):
    stream = Terminal()
    log = start(tmp_path / "run", primary=False, tensorboard=True, stream=stream)
    log.header({"device": "cpu"})
    log.parameter_table({"params": {"a": np.ones(3)}})
    log.print("text")
    log.write_config({"a": 1})
    with log.progress(total_steps=1, epoch=1, epochs=1, batch_size=1) as bar:
        bar.update(1, lambda: pytest.fail("a value was read from the device"))
    log.epoch(row(1), epochs=1)
    log.result({"a": 1})
    log.close()
    assert log.read_rows() == []
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def metrics():
    return {"loss": 1.0, "accuracy": 50.0}


# What the user sees -------------------------------------------------------------------------------

def test_without_a_terminal_one_line_per_epoch(tmp_path, clock):
    stream = io.StringIO()
    log = start(tmp_path, stream=stream)
    for epoch in (1, 2):
        with log.progress(total_steps=4, epoch=epoch, epochs=12, batch_size=64) as bar:
            for _ in range(4):
                clock.seconds += 15
                bar.update(1, lambda: pytest.fail("a value was read from the device"))
        log.epoch(row(epoch, val_loss=float("nan"), val_accuracy=72.054, images_per_second=2345.6,
                      seconds=60.04), epochs=12, note="best" if epoch == 2 else "")
    assert stream.getvalue().splitlines() == [
        "epoch  1/12  step 704  lr 0.001  train 2.0000 10.00%  val nan 72.05%  2,346 images/s  "
        "60.0 s  ETA 0:11:00",
        "epoch  2/12  step 1,408  lr 0.001  train 1.0000 20.00%  val nan 72.05%  2,346 images/s  "
        "60.0 s  ETA 0:10:00  best"]


def test_the_bar_reads_the_device_at_most_twice_a_second(tmp_path, clock):
    stream, reads = Terminal(), []
    log = start(tmp_path, stream=stream)

    def read_metrics():
        reads.append(clock.seconds)
        return {"loss": np.float32(1.25), "accuracy": jnp.float32(45.678)}
    with log.progress(total_steps=100, epoch=1, epochs=3, batch_size=64) as bar:
        for _ in range(100):
            clock.seconds += 0.125
            bar.update(1, read_metrics)
    assert len(reads) == 25 and min(np.diff(reads)) >= 0.5
    frames = stream.getvalue().split("\r")
    shown = [frame for frame in frames if "loss" in frame]
    assert len(shown) == 25
    assert "epoch 1/3" in shown[0] and "loss 1.2500  acc 45.68%" in shown[0]
    # 8 steps a second of 64 images; 300 steps are 37.5 s, 96 of them done when the 24th is shown.
    assert "96/100" in shown[23] and "512 images/s  ETA 0:00:26" in shown[23]
    assert frames[-1] == "" and frames[-2].strip() == ""  # the bar has gone


def test_eta_in_later_epochs_includes_what_follows_the_steps(tmp_path, clock):
    stream = Terminal()
    log = start(tmp_path, stream=stream)
    with log.progress(total_steps=4, epoch=1, epochs=3, batch_size=64) as bar:
        clock.seconds += 70
        bar.update(4, metrics)
    clock.seconds += 30  # evaluation
    log.epoch(row(1), epochs=3)
    with log.progress(total_steps=4, epoch=2, epochs=3, batch_size=64) as bar:
        for _ in range(2):
            clock.seconds += 10
            bar.update(1, metrics)
    assert "ETA 0:03:00" in stream.getvalue()  # two epochs of 100 s, 20 s of the first gone


def test_an_interrupted_epoch_goes_on_where_it_was(tmp_path, clock):
    stream = Terminal()
    log = start(tmp_path, stream=stream)
    with log.progress(total_steps=4, first_step=3, epoch=1, epochs=3, batch_size=64) as bar:
        clock.seconds += 10
        bar.update(1, metrics)
    assert "4/4" in stream.getvalue() and "ETA 0:01:20" in stream.getvalue()  # 8 more steps
    log.epoch(row(1) | {"resumed_at": 3}, epochs=3)  # 10 s are not an epoch's time
    assert "ETA" not in stream.getvalue().splitlines()[-1]


def read_all(descriptor):
    os.set_blocking(descriptor, False)
    parts = []
    while True:
        try:
            parts.append(os.read(descriptor, 1 << 16))
        except BlockingIOError:
            return b"".join(parts).decode()


def test_on_a_real_terminal_lines_stay_above_the_bar(tmp_path):
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream:
        log = start(tmp_path, stream=stream)
        with log.progress(total_steps=2, epoch=1, epochs=1, batch_size=8) as bar:
            bar.update(1, metrics)
            log.print("a warning")
        log.epoch(row(1), epochs=1)
        text = read_all(master)
    os.close(master)
    assert "epoch 1/1   0% |" in text
    lines = [line.rsplit("\r", 1)[-1] for line in text.split("\r\n")]
    assert "a warning" in lines
    assert any(line.startswith("epoch 1/1  step 704") for line in lines)


def test_header_is_aligned_and_wrapped(tmp_path):
    stream = io.StringIO()
    start(tmp_path, stream=stream).header({
        "device": "cpu", "augmentation": ["rotation(5)", "flip", "crop(2)"] * 6, "norm": [],
        "parameters": 4951338, "deterministic": True, "max_params": None})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "device         cpu"
    assert lines[1].startswith("augmentation   rotation(5), flip, crop(2), rotation(5)")
    assert lines[2].startswith(" " * 15) and max(map(len, lines)) <= 100
    assert lines[-4:] == ["norm           none", "parameters     4,951,338",
                          "deterministic  yes", "max_params     none"]


def test_parameter_table_lists_arrays_of_a_small_model():
    params = {"conv": {"kernel": np.zeros((3, 3, 3, 32), np.float32), "bias": np.zeros(32)},
              "linear": {"kernel": jnp.zeros((32, 10))}}
    table = logs.parameter_table({"params": params, "batch_stats": {"bn": {"mean": np.zeros(99)}}})
    assert "conv/kernel" in table and "(3, 3, 3, 32)" in table and "864" in table
    assert "Total: 1,216" in table and "bn/mean" not in table


def test_parameter_table_of_a_large_model_stays_short():
    block = {"conv1": {"kernel": np.zeros((3, 3, 8, 8))}, "bn1": {"scale": np.zeros(8)},
             "conv2": {"kernel": np.zeros((3, 3, 8, 8))}, "bn2": {"scale": np.zeros(8)}}
    params = {f"layer{i}": {f"block{j}": block for j in range(8)} for i in range(4)}
    table = logs.parameter_table({"params": params})
    lines = table.splitlines()
    assert sum(line.startswith("| layer") for line in lines) == 32
    assert "| layer3/block7 | 4 | 1,168 |" in [" ".join(line.split()) for line in lines]
    assert lines[-1] == f"Total: {32 * 1168:,} in 128 arrays"


# TensorBoard --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("data", "expected"), [  # RFC 3720, B.4; "123456789" is the usual check
    (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E),
    (b"123456789", 0xE3069283)])
def test_crc32c(data, expected):
    assert event_files.crc32c(data) == expected


def test_event_file_bytes(tmp_path):
    file = event_files.EventFile(tmp_path, wall_time=1.0, purge_step=300)
    head = file.path.read_bytes()
    file.scalars(300, {"a": 1.0}, wall_time=2.0)
    record = file.path.read_bytes()[len(head):]
    event = bytes.fromhex("09 0000000000000040 10 ac02 2a 0a 0a 08 0a 01 61 15 0000803f")
    assert record[:8] == len(event).to_bytes(8, "little") and record[12:-4] == event
    assert head[12:12 + head[0]].endswith(b"\x1a\x0dbrain.Event:2")
    file.scalars(1, {"huge": 1e300, "tiny": -1e300}, wall_time=2.0)  # beyond float32: no error
    file.close()


def test_tensorboard_reads_the_events_back(tmp_path, clock):
    pytest.importorskip("tensorboard", reason="tensorboard, of the test extra, is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = start(tmp_path, tensorboard=True)
    for epoch in range(1, 5):
        log.epoch(row(epoch, val_loss=0.5 if epoch != 2 else float("nan"), images_per_second=9),
                  epochs=5)
    log.close()
    # Killed, and started again within the same second: epochs 3 and 4 are measured anew.
    log = start(tmp_path, resume_epoch=3, tensorboard=True)
    log.epoch(row(3, train_loss=7.0), epochs=5)
    log.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "epoch", "learning_rate", "train/loss", "train/accuracy", "val/loss", "images_per_second"}
    loss = events.Scalars("train/loss")
    assert [(event.step, event.value) for event in loss] == [(704, 2.0), (1408, 1.0), (2112, 7.0)]
    assert [event.step for event in events.Scalars("val/loss")] == [704]
    assert loss[0].wall_time == clock.time()


# Time, imports, the bar ----------------------------------------------------------------------------

def test_stopwatch(clock):
    watch = logs.Stopwatch()
    clock.seconds += 3
    assert watch.seconds() == 3
    for _ in range(2):
        with watch.section("compile"):
            clock.seconds += 2
    with pytest.raises(KeyError), watch.section("data"):
        clock.seconds += 1
        raise KeyError
    assert watch.seconds() == 8
    assert watch.sections == {"compile": 4, "data": 1}


def test_imports_nothing_heavy():
    code = ("import sys, jaxcifar.logs, jaxcifar.report.plots, jaxcifar.report.published; "
            "print([m for m in ('tensorflow', 'torch', 'tensorboard', 'matplotlib', 'clu', 'tqdm') "
            "if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], check=True, text=True,
                            capture_output=True)
    assert result.stdout.strip() == "[]"


def test_the_bar_can_be_switched_off(tmp_path):
    stream = Terminal()
    log = logs.RunLog(tmp_path, primary=True, resume_epoch=None, tensorboard=False, stream=stream,
                      progress=False)
    with log.progress(total_steps=4, epoch=1, epochs=3, batch_size=64) as bar:
        bar.update(4, metrics)
    log.print("a line")
    assert stream.getvalue() == "a line\n"
