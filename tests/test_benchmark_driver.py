"""The benchmark's contenders as processes: their turns, their failures, and what a kill leaves."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from benchmark_fakes import measured, report

from jaxcifar.benchmark import children, driver, table, torch_best, work
from jaxcifar.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_from_end_to_end(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--repeats=2", "--quick",
               "--work=step:lenet,epoch:lenet,eval:lenet,augment:lenet", "--batch=8",
               "--epoch_steps=2", "--compiled=no", "--seconds=0.05", "--threads=1", "--name=test",
               f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "results" / "benchmark_cpu_test.json").read_text())
    found = {(row["kind"], row["contender"]): row for row in content["rows"]}
    assert len(found) == 12 and not any("error" in row for row in found.values())
    assert set(found["step", "jaxcifar"]["ratio"]) == {"torch_eager", "torch_best"}
    for (kind, _), row in found.items():
        assert row["images_per_second"] > 0 and row["cpu_seconds_per_image"] > 0
        assert np.isfinite(row["loss"])
        assert kind == "augment" or 0 < row["share_of_peak"] < 1
    assert found["epoch", "torch_eager"]["images"] == 16
    assert (tmp_path / "docs" / "figures" / "benchmark_cpu_test.png").stat().st_size > 10_000


def test_a_contender_that_ends_is_reported_with_its_last_words(monkeypatch):
    monkeypatch.setattr(children.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="torch_eager: its process ended .exit code 1.: no message"):
        driver.Process("torch_eager", {})


def test_a_contender_that_hangs_is_ended(monkeypatch, tmp_path):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(children.sys, "executable", str(sleeper))
    with pytest.raises(children.TimedOut, match="torch_best: no answer within 0.2 s"):
        driver.Process("torch_best", {}, limit=0.2)


def test_after_ctrl_c_no_limit_is_waited_for(monkeypatch):
    def interrupted():  # no signal: a shell's background jobs ignore SIGINT
        raise KeyboardInterrupt

    before = threading.active_count()
    stdout = types.SimpleNamespace(readline=interrupted)
    monkeypatch.setattr(children.subprocess, "Popen",
                        lambda *_, **__: types.SimpleNamespace(stdout=stdout))
    with pytest.raises(KeyboardInterrupt):
        driver.Process("jaxcifar", {}, limit=60)
    for _ in range(100):
        if threading.active_count() == before:
            return
        threading.Event().wait(0.05)
    pytest.fail("the limit's timer runs on")


def test_a_contender_ends_with_its_parent():
    code = ("import subprocess, sys\n"
            "child = 'from jaxcifar.benchmark.child import end_with_parent; import time\\n'"
            "'end_with_parent(); print(1, flush=True); time.sleep(60)'\n"
            "p = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE,\n"
            "                     stderr=subprocess.DEVNULL)\n"
            "p.stdout.readline()\nprint(p.pid)")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    for _ in range(100):
        stat = pathlib.Path(f"/proc/{int(done.stdout)}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        threading.Event().wait(0.05)
    pytest.fail("the child lives on")


class Fake:
    """Stands for a contender's process: 10 images in 1 s each time; what `fails` names fails."""

    asked, specs, fails, device = [], [], {}, "cpu"

    def __init__(self, contender, spec, limit=0):
        Fake.asked.append((contender, spec["model"]))
        Fake.specs.append(spec)
        if Fake.fails.get(contender) == "compile" and spec["compile"]:
            raise children.TimedOut("no answer")
        if Fake.fails.get(contender) == "start":
            raise UserError(f"no {contender}")
        self.contender, self.count = contender, 0

    def measure(self, kind):
        self.count += 1
        if self.count == Fake.fails.get(self.contender):
            raise UserError("out of memory")
        if Fake.fails.get(self.contender) == "hang":
            raise children.TimedOut("no answer")
        return measured(10, 0.5 if self.contender == "jaxcifar" else 1.0, 1.0)

    def finish(self):
        counted = {"multiply_adds": 1, "training": 3} if self.contender == "jaxcifar" else {}
        seconds = dict.fromkeys(work.KINDS, 1.0)
        return report(first_seconds=seconds, warm_seconds=seconds,
                      environment={"device": Fake.device, "host_cores": 2}, **counted)

    def close(self):
        pass


@pytest.fixture
def fakes(monkeypatch):
    Fake.asked, Fake.specs, Fake.fails, Fake.device = [], [], {}, "cpu"
    monkeypatch.setattr(driver, "Process", Fake)
    monkeypatch.setattr(driver, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(driver.host, "of_gpus", lambda what: [Fake.device])
    return Fake


def test_a_contender_that_fails_is_left_out_of_every_turn(fakes):
    fakes.fails = {"torch_best": "start", "torch_eager": 2}
    said, entry = [], work.create("lenet", 8, ("step",))
    turns, reports = driver.measure(entry, ["jaxcifar", "torch_eager", "torch_best"], 3, threads=0,
                                    caches=True, on_cpu=True, say=said.append)
    assert [set(turn) for turn in turns["step"]] == [{"jaxcifar"}] * 3
    assert reports["torch_eager"] == {"error": "out of memory", "timed_out": False}
    assert "  no torch_best" in said
    ours, *others = table.rows(entry, turns, reports)
    assert sorted(r["contender"] for r in [ours, *others] if "error" in r) == [
        "torch_best", "torch_eager"]


def measure_all(tmp_path, **options):
    driver.run(**{**dict(
        work="step:lenet,mlp_s", contenders="jaxcifar,torch_eager,torch_best", repeats=2, batch=8,
        quick=True, epoch_steps=None, threads=0, compiled="no", seconds=0.0, name="test",
        out=tmp_path), **options})
    path, = (tmp_path / "results").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    return {(row["contender"], row["model"]): row for row in rows}


def test_what_was_measured_before_an_end_is_kept_and_gone_on_from(fakes, monkeypatch, tmp_path):
    """On a GPU: one contender after the other, the file after each, --resume takes the rest."""
    monkeypatch.setattr(driver.host, "runs_on_cpu", lambda: False)
    fakes.device = "NVIDIA H200"
    fakes.fails = {"torch_eager": "start"}

    class Killed(BaseException):
        pass

    def killed(self, kind):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        original = Fake.measure
        patch.setattr(Fake, "measure", lambda self, kind: (
            killed if fakes.asked[-1] == ("jaxcifar", "mlp_s") else original)(self, kind))
        measure_all(tmp_path)
    first = [(c, "lenet") for c in ("jaxcifar", "torch_eager", "torch_best")]
    assert fakes.asked == [*first, ("jaxcifar", "mlp_s")]
    fakes.asked, fakes.fails = [], {"torch_best": "hang"}
    rows = measure_all(tmp_path, resume=True)
    assert fakes.asked == [("torch_eager", "lenet"), *(
        (c, "mlp_s") for c in ("jaxcifar", "torch_eager", "torch_best"))]
    assert len(rows) == 6
    ours = rows["jaxcifar", "lenet"]
    assert ours["ratio"] == {"torch_eager": 2.0, "torch_best": 2.0}
    assert ours["ratio_by_cpu_time"] == {}  # on a GPU it would be time spent in waiting
    assert ours["share_of_peak"] == pytest.approx(20 * 2 * 3 / 20)
    assert rows["torch_best", "mlp_s"]["timed_out"]
    fakes.asked = []
    measure_all(tmp_path, resume=True)
    assert fakes.asked == []
    measure_all(tmp_path, resume=True, repeats=3)  # other settings: all anew
    assert len(fakes.asked) == 6
    monkeypatch.setattr(driver.environment, "version", lambda package: f"{package} of tomorrow")
    measure_all(tmp_path, resume=True, repeats=3)
    assert len(fakes.asked) == 12


def test_another_gpu_has_its_own_results(fakes, monkeypatch, tmp_path):
    monkeypatch.setattr(driver.host, "runs_on_cpu", lambda: False)
    fakes.device = "NVIDIA H100"
    measure_all(tmp_path, resume=True)
    fakes.device, fakes.asked = "NVIDIA H200", []
    with pytest.raises(ValueError, match="too many values to unpack"):  # two files
        measure_all(tmp_path, resume=True)
    assert len(fakes.asked) == 6
    names = sorted(path.name for path in tmp_path.glob("results/*.json"))
    assert names == ["benchmark_nvidia-h100_test.json", "benchmark_nvidia-h200_test.json"]
    for name in names:
        rows = json.loads((tmp_path / "results" / name).read_text())["rows"]
        assert len(rows) == 6


def test_the_short_list_on_a_gpu_loses_little_by_a_kill(fakes, monkeypatch, tmp_path):
    monkeypatch.setattr(driver.host, "runs_on_cpu", lambda: False)
    fakes.device = "NVIDIA H100"
    quick = dict(work="", contenders="", compiled="auto", repeats=0, batch=0)

    class Killed(BaseException):
        pass

    def prepare(self, contender, spec, limit=0):
        if (contender, spec["batch"]) == ("torch_best", 64):
            raise Killed
        original(self, contender, spec, limit)
    original = Fake.__init__
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Fake, "__init__", prepare)
        measure_all(tmp_path, **quick)
    path, = tmp_path.glob("results/*.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4 * 4 + 3 * 3 and all(row["caches"] for row in rows)
    assert {row["eval_batch"] for row in rows if row["kind"] == "eval"} == {1000}
    assert {spec["choose_seconds"] for spec in fakes.specs} == {60}
    fakes.asked = []
    measure_all(tmp_path, **quick, resume=True)
    assert fakes.asked == [("torch_best", "resnet5m"), *(
        (c, m) for m in ("resnet18", "cnn3", "vit") for c in ("jaxcifar_bf16", "torch_best"))]
    assert len(json.loads(path.read_text())["rows"]) == 4 * 4 + 4 * 3 + 2 * 3


def test_torch_best_whose_compilation_takes_too_long_is_measured_without_it(fakes):
    fakes.fails = {"torch_best": "compile"}
    said, entry = [], work.create("lenet", 8, ("step",))
    turns, reports = driver.measure(entry, ["torch_best"], 1, threads=0, caches=True, on_cpu=False,
                                    say=said.append, limit=300, search=120.0)
    assert "  no answer; once more, without torch.compile" in said
    assert [(s["compile"], s["choose_seconds"]) for s in fakes.specs] == [(True, 120), (False, 120)]
    assert fakes.specs[1]["note"] == "torch.compile not ready within 300 s"
    assert "error" not in reports["torch_best"] and turns["step"][0]["torch_best"]["images"] == 10
    fakes.fails = {"torch_eager": "compile"}
    reports = driver.measure(entry, ["torch_eager"], 1, threads=0, caches=True, on_cpu=False,
                             say=said.append)[1]
    assert reports["torch_eager"]["timed_out"]


def test_on_cpu_a_work_that_lacks_a_contender_is_measured_again(fakes, tmp_path):
    fakes.fails = {"torch_best": "start"}
    measure_all(tmp_path)
    fakes.asked, fakes.fails = [], {}
    rows = measure_all(tmp_path, resume=True)
    assert len(fakes.asked) == 6
    assert rows["jaxcifar", "lenet"]["ratio_by_cpu_time"] == {"torch_eager": 1, "torch_best": 1}


def test_without_matplotlib_the_rows_are_written(fakes, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert len(measure_all(tmp_path)) == 6
    assert not list(tmp_path.rglob("*.png"))


def test_trials_of_memory_formats_leave_a_momentum_of_the_parameters_layout(monkeypatch):
    """Fused optimisers on CUDA refuse others; and no trial's state goes on into the next."""
    asked = {**dataclasses.asdict(work.create("cnn3", 4, ("step",), num_train=8)),
             "threads": 1, "caches": True, "on_cpu": True, "compile": False, "choose_seconds": 0}
    monkeypatch.setattr(torch_best.Best, "_seconds", lambda self, size: (
        self._step(self._images[:4], self._labels[:4]), -len(seen), seen.append(self._layout))[1])
    seen = []
    best = torch_best.Best({**asked, "contender": "torch_best", "note": "no compiler"})
    assert seen == ["NHWC"] * 2 + ["NCHW"] * 2
    best._step(best._images[:4], best._labels[:4])
    assert best.variant == "eager float32 NCHW, best of 4 tried, no compiler"
    strides = [(p.stride(), best._optimizer.state[p]["momentum_buffer"].stride(), p.grad.stride())
               for p in best._model.parameters()]
    assert all(a == b == c for a, b, c in strides)
    assert all(p.is_contiguous() for p in best._model.parameters())


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/results"):
        measure_all(tmp_path)


def test_a_wrong_contender_is_explained():
    with pytest.raises(UserError, match="did you mean 'torch_eager'"):
        driver.run(work="lenet", contenders="torch_eagre", repeats=1, batch=0, quick=True,
                   epoch_steps=None, threads=0, compiled="no", seconds=0.0, name="", out=".")
