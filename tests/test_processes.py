"""Two processes of two devices each give the single-process result, and only the first writes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny
from test_invariants import SHORT, assert_same_rows

HERE = pathlib.Path(__file__).parent


def free_port():
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(workdir, *, stops=(-1, -1), seeds=(0, 0), code=0, **fields):
    """Run two of process_of_run.py side by side; return what each printed (less gloo's).

    stops, seeds: of each, see there; code: the exit code of both.
    """
    port = str(free_port())
    started = [subprocess.Popen(
        [sys.executable, str(HERE / "process_of_run.py"), str(workdir), port, "2", str(i),
         json.dumps(fields), str(stops[i]), str(seeds[i])],
        cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)]
    return outputs(started, code)


def outputs(started, code=0):
    """Wait for the processes; return what each printed, less gloo's lines. None outlives this."""
    texts = []
    try:
        for process in started:
            out, err = process.communicate(timeout=300)
            assert process.returncode == code, err[-2000:]
            out += err if code == 2 else ""
            # Gloo's threads write their lines into each other's.
            texts.append("\n".join(line for line in out.splitlines() if line.strip()
                                   and "[Gloo]" not in line and "peer ranks" not in line))
    finally:
        for process in started:  # one that waits for another that is gone
            if process.poll() is None:
                process.kill()
                process.communicate()
    return texts


@pytest.mark.parametrize(("kind", "other"), [("pmap", "shard_map"), ("shard_map", "pmap")])
def test_two_processes_equal_one(kind, other, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    first, second = run_processes(tmp_path / "two", parallel=kind)
    assert "test accuracy" in first and second == "", "only the first process speaks"
    summary, rows = tiny.fit(tiny.tiny_config(), tmp_path / "one", monkeypatch)
    two = tiny.rows(tmp_path / "two")
    assert len(two) == len(rows) == 2
    for ours, theirs in zip(two, rows, strict=True):
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[key], rtol=2e-4, atol=2e-5, err_msg=key)
    # A second start resumes at the end, in both processes, and measures the same the other way.
    first, _ = run_processes(tmp_path / "two", parallel=other)
    assert "resumed after epoch 2" in first
    assert len(tiny.rows(tmp_path / "two")) == 2
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["test_accuracy"] == summary.result["test_accuracy"]
    np.testing.assert_allclose(result["test_loss"], summary.result["test_loss"], rtol=2e-4)


def test_two_processes_stop_together_and_go_on_from_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    fields = SHORT | {"augment": "flip|crop(2)|mixup(0.2)", "model": {"name": "lenet"}}
    run_processes(tmp_path / "two", stops=(-1, 5), code=143, **fields)  # a signal to the second only
    assert [row["epoch"] for row in tiny.rows(tmp_path / "two")] == [1]
    first, _ = run_processes(tmp_path / "two", **fields)
    assert "resumed after epoch 1" in first
    _, rows = tiny.fit(tiny.tiny_config(**fields), tmp_path / "one", monkeypatch)
    assert_same_rows(tiny.rows(tmp_path / "two"), rows)


def test_two_processes_with_other_data_are_both_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    for text in run_processes(tmp_path / "two", seeds=(0, 1), code=2):
        assert "the processes have the data set in different orders" in text
    assert not (tmp_path / "two").exists()


def test_what_only_the_first_can_see_ends_both(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    fields = SHORT | {"augment": "flip", "model": {"name": "lenet"}}
    run_processes(tmp_path / "two", stops=(-1, 5), code=143, **fields)
    (tmp_path / "two" / "metrics.jsonl").write_text("no row\n")
    first, second = run_processes(tmp_path / "two", code=2, **fields)
    assert "line 1 is not a row" in first
    assert "process 0 could not open the run's log: see what it printed" in second


def test_the_command_line_starts_one_run_in_two_processes(tmp_path):
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parent), "TFDS_DATA_DIR": str(tmp_path / "data"),
        "XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    shared = [sys.executable, "-m", "jaxcifar.main", "--config=configs/quickstart.py",
              f"--workdir={tmp_path / 'run'}", "--config.model.channels=(4,8,8)",
              "--config.model.stem_width=4", "--config.epochs=1", "--config.batch_size=500",
              "--config.tensorboard=False", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    first, second = outputs([subprocess.Popen(
        [*shared, f"--process_id={i}"], cwd=HERE.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)])
    assert "test accuracy" in first and "4 x cpu (pmap), 2 process(es)" in first
    assert second == ""
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 1
