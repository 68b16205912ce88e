"""Two processes of two devices each give the single-process result, and only the first writes."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
import tiny

HERE = pathlib.Path(__file__).parent


def free_port():
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(workdir, kind, count=2):
    """Run process_of_run.py `count` times side by side; return what each printed (less gloo's)."""
    port = str(free_port())
    started = [subprocess.Popen(
        [sys.executable, str(HERE / "process_of_run.py"), str(workdir), kind, port, str(count), str(i)],
        cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(count)]
    outputs = []
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        # Gloo's threads write their lines into each other's.
        lines = [line for line in out.splitlines()
                 if line.strip() and "[Gloo]" not in line and "peer ranks" not in line]
        outputs.append("\n".join(lines))
    return outputs


def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    first, second = run_processes(tmp_path / "two", "pmap")
    assert "test accuracy" in first and second == "", "only the first process speaks"
    summary, rows = tiny.fit(tiny.tiny_config(), tmp_path / "one", monkeypatch)
    two = tiny.rows(tmp_path / "two")
    assert len(two) == len(rows) == 2
    for ours, theirs in zip(two, rows, strict=True):
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[key], rtol=2e-4, atol=2e-5, err_msg=key)
    # A second start resumes at the end, in both processes, and measures the same on shard_map.
    first, _ = run_processes(tmp_path / "two", "shard_map")
    assert "resumed after epoch 2" in first
    assert len(tiny.rows(tmp_path / "two")) == 2
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["test_accuracy"] == summary.result["test_accuracy"]
    np.testing.assert_allclose(result["test_loss"], summary.result["test_loss"], rtol=2e-4)
