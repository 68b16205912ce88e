"""Where a run took place: versions, device, commit, memory."""

import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest

from jaxcifar import environment


def test_environment_names_versions_and_no_paths():
    found = environment.environment()
    text = json.dumps(found)
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__
    assert found["platform"] == "cpu" and found["device_count"] == jax.device_count()
    assert found["host_cores"] >= 1 and found["host_cpu"]
    assert os.getcwd() not in text and os.uname().nodename not in found.values()
    assert {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "git_commit"} <= found.keys()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_environment_finds_its_own_commit_only(tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(
            ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *arguments),
            check=True, capture_output=True, text=True).stdout.strip()

    def found():
        place = environment.environment()
        return place["git_commit"], place["git_dirty"]
    module = tmp_path / "environment.py"
    module.write_text("# a package in a repository\n")
    monkeypatch.setattr(environment, "__file__", str(module))
    assert found() == (None, None)
    monkeypatch.setenv("JAXCIFAR_GIT_COMMIT", "abc")
    assert found() == ("abc", None)
    git("init", "-q")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-qm", "somebody else's repository")
    assert found() == ("abc", None)
    git("add", ".")
    git("commit", "-qm", "all")
    assert found() == (git("rev-parse", "HEAD"), False)
    result = tmp_path / "results" / "row.json"  # a run writes one, and the next is not another's
    result.parent.mkdir()
    result.write_text("1")
    git("add", ".")
    git("commit", "-qm", "a result")
    result.write_text("2")
    assert found() == (git("rev-parse", "HEAD"), False)
    module.write_text("# changed\n")
    assert found() == (git("rev-parse", "HEAD"), True)


def test_memory_is_in_bytes():
    found = environment.memory()
    assert 50e6 < found["peak_host_bytes"] < 1e12
    assert found["peak_device_bytes"] is None  # the CPU backend keeps no count
