"""--profile of a speedrun: the tables, the traces, the form of accelerators, flags that it refuses."""

import io
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny
from test_speedrun import NUM_TEST, NUM_TRAIN, small_config

from jaxcifar import logs, profiling
from jaxcifar.errors import UserError
from jaxcifar.speedrun import driver, profile

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(
        "jaxcifar.data.load", lambda name, data_dir: tiny.tiny_dataset(NUM_TRAIN, NUM_TEST))


def table(lines, title):
    """Return the rows of the ten most expensive operations below a title, split into words."""
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    assert lines[start + 1].split() == ["ms", "share", "count", "operation", "from"]
    return [line.split() for line in lines[start + 2:start + 12]]


def test_it_prints_the_operations_and_leaves_traces_only(tmp_path):
    out = io.StringIO()
    profile.run(small_config(), tmp_path, 3, stream=out)
    lines = out.getvalue().splitlines()
    for title in ("3 training steps of 16 images, speedrun94 on cpu",
                  "2 evaluation batches of 16 images in six views, speedrun94 on cpu"):
        rows = table(lines, title)
        shares = [float(row[1].rstrip("%")) for row in rows]
        assert len(rows) == 10 and shares == sorted(shares, reverse=True) and shares[0] > 0
    text = out.getvalue()
    assert "group1/conv1/" in text and ", backward" in text and "forward " in text
    assert {path.name for path in tmp_path.iterdir()} == {"profile"}
    for part in ("train", "eval"):
        assert list((tmp_path / "profile" / part).rglob("*.trace.json.gz"))


def test_on_accelerators_a_call_is_a_loop_over_steps(monkeypatch):
    """Half of the asked steps in a call, at the place after the bias's steps; a proxy's is faked."""
    config = small_config("96_selected", translate=1, cutout=4, proxy_channels=(4, 4))
    trainer, train, _, _ = driver.prepare(config, logs.Stopwatch())
    trainer.rolled = True
    compiled = []

    class Program:
        def __init__(self, function, donate=()):
            self.function, self.donate = function, donate

        def compile(self, *args):
            compiled.append((self.donate, jax.eval_shape(
                lambda *args: self.function(trainer.run, *args), *args), args))

        def __call__(self, *args):
            return jax.eval_shape(lambda *args: self.function(trainer.run, *args), *args)

    monkeypatch.setattr(trainer, "program", Program)
    _, calls, _ = profile._steps(trainer, train, 5)
    assert calls == profiling.Calls(3, 2, 2 * 8)
    (donate, after, (state, prepared, _, numbers)), = compiled
    assert donate == (0,) and numbers.tolist() == [3, 4] and prepared.kept.shape == (9, 8)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_a_profile_of_no_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="--profile_steps=0"):
        profile.run(small_config(), tmp_path, 0)


@pytest.mark.parametrize(("flags", "message"), [
    (["--profile", "--runs=2"], "error: --runs has no meaning with --profile"),
    (["--config.epochs=2"], "error: a speedrun does not read config.epochs: set config.speedrun"),
    (["--workdir=somewhere"], "error: --workdir has no meaning in a speedrun, which takes --runs"),
])
def test_flags_without_a_meaning_are_refused(flags, message):
    process = subprocess.run(
        [sys.executable, "-m", "jaxcifar.speedrun", "--config=configs/speedrun.py:94", *flags],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300)
    assert process.returncode == 2 and process.stderr.startswith(message)
    assert len(process.stderr.splitlines()) == 1
