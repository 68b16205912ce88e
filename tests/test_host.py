"""Host settings: applied where JAX runs on CPU, and only there; results do not change."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxcifar import config as config_lib
from jaxcifar import host, train
from jaxcifar.report import parity_runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROBE = """
import sys
import jax
import numpy as np
from jaxcifar import host
if sys.argv[1] == "configure":
    assert host.configure(1 << 30) is True
    assert jax.config.read("jax_cpu_enable_async_dispatch") is False
x = np.arange(1 << 21, dtype=np.float32)
total = float(jax.jit(lambda x: (x / 7).sum())(x))
block = np.empty(80 << 20, np.uint8)  # mapped by default, on the heap once configured
maps = [line.split() for line in open("/proc/self/maps")]
heap = [line[0].split("-") for line in maps if line[-1] == "[heap]"]
low, top = int(heap[0][0], 16), int(heap[-1][1], 16)
libc = host._glibc()
libc.malloc.restype, libc.free.argtypes = host.ctypes.c_void_p, [host.ctypes.c_void_p]
libc.malloc.argtypes, libc.sbrk.restype = [host.ctypes.c_size_t], host.ctypes.c_void_p
large = libc.malloc(3 << 30)  # never touched: addresses only
end = libc.sbrk(0)
libc.free(large)
print(total.hex(), low <= block.ctypes.data < top, libc.sbrk(0) == end)
"""


CONVOLUTION = """
import sys
import numpy as np
from jaxcifar import host
if sys.argv[1] == "configure":
    host.configure(1 << 30)
from jaxcifar.models import conv
import jax
x = np.random.default_rng(0).normal(size=(16, 16, 16, 32)).astype(np.float32)
kernel = np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32)
convolve = jax.jit(lambda x, k: conv.conv2d(x, k, padding=((1, 1), (1, 1))))
print("ynn_fusion" in convolve.lower(x, kernel).compile().as_text())
print(*np.asarray(convolve(x, kernel))[0].ravel().tolist())
"""


def probe(mode, script=PROBE):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    out = subprocess.run(
        [sys.executable, "-c", script, mode], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    return out.stdout.split()


@pytest.mark.skipif(host._glibc() is None, reason="the settings are glibc's; this is not glibc")
def test_large_blocks_come_from_the_heap_once_configured_and_results_stay():
    plain_total, plain_in_heap, _ = probe("plain")
    total, in_heap, kept = probe("configure")
    assert (plain_in_heap, in_heap, kept) == ("False", "True", "True")
    assert total == plain_total


def test_convolutions_of_one_core_are_exchanged_and_results_stay():
    plain_by_ynn, *plain = probe("plain", CONVOLUTION)
    by_ynn, *values = probe("configure", CONVOLUTION)
    assert (by_ynn == plain_by_ynn) is not host._single_threaded_convolutions()
    np.testing.assert_allclose(np.float32(values), np.float32(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("version,cores,given,expected", [
    ((0, 10, 2), 2, "", host._NO_YNN_CONVOLUTIONS),
    ((0, 10, 2), 2, "--a=1", f"--a=1 {host._NO_YNN_CONVOLUTIONS}"),
    ((0, 10, 2), 2, "--xla_cpu_experimental_ynn_fusion_type=", None),
    ((0, 10, 2), 1, "--a=1", None),
    ((0, 11, 0), 2, "--a=1", None),
])
def test_the_library_is_chosen_once_where_it_has_one_core(
        monkeypatch, version, cores, given, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(host, "cores", lambda: cores)
    monkeypatch.setattr(host, "_glibc", lambda: None)
    monkeypatch.setattr(host, "runs_on_cpu", lambda: True)
    for _ in range(2):
        assert host.configure()
        assert os.environ["XLA_FLAGS"] == (given if expected is None else expected)


def test_the_settings_follow_the_platform_that_jax_will_choose(monkeypatch):
    class Config:
        jax_platforms = "cuda,cpu"
        def update(self, *args):
            raise AssertionError("no setting is for an accelerator")
    monkeypatch.setattr(jax, "config", Config)
    assert not host.runs_on_cpu()
    assert host.configure() is False
    Config.jax_platforms = "cpu"
    assert host.runs_on_cpu()


@pytest.mark.parametrize("plugins,gpu,expected", [
    ([], False, True), ([], True, True), (["xla_cuda13"], True, False),
    (["xla_cuda13"], False, True),  # on a login node: JAX leaves the plugin out
    (["xla_rocm"], False, False)])
def test_installed_plugins_decide_where_no_platform_is_asked_for(monkeypatch, plugins, gpu, expected):
    class Config:
        jax_platforms = None
    monkeypatch.setattr(jax, "config", Config)
    found = [importlib.metadata.EntryPoint(name, name, "jax_plugins") for name in plugins]
    monkeypatch.setattr(host.importlib.metadata, "entry_points", lambda group: found)
    monkeypatch.setattr(host, "_GPU_FILES", ("/dev/null",) if gpu else ("/dev/no_gpu",))
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert host.runs_on_cpu() is expected


def test_nothing_is_done_to_malloc_where_the_library_is_not_glibc(monkeypatch):
    monkeypatch.setattr(host.sys, "platform", "darwin")
    assert host._glibc() is None


@pytest.mark.parametrize("field,value,flag", [
    ("cuda_graphs", "default", None),
    ("cuda_graphs", "step", "--xla_gpu_enable_command_buffer=+CONVOLUTION"),
    ("cuda_graphs", "call", "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE"),
    ("cuda_graphs", "off", "--xla_gpu_enable_command_buffer="),
    ("deterministic", True, "--xla_gpu_deterministic_ops=true"),
])
def test_xla_is_told_once_what_a_gpu_shall_do_and_knows_it(field, value, flag, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    monkeypatch.setattr(host, "configure", lambda: False)
    updated = {}
    monkeypatch.setattr(jax.config, "update", updated.__setitem__)
    config = config_lib.default()
    config[field] = value
    for _ in range(2):
        train.configure_jax(config)
    # Kernels that other runs found fastest are in caches of XLA's own, deterministic or not.
    caches = updated.get("jax_persistent_cache_enable_xla_caches")
    assert caches == ("" if config.deterministic else None)
    assert os.environ["XLA_FLAGS"] == " ".join(["--a=1"] + [flag] * (flag is not None))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag or ""}
    started = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment,
                             capture_output=True, text=True, timeout=300, check=False)
    assert started.returncode == 0, started.stderr  # XLA ends the process for flags it does not know


@pytest.mark.skipif(os.name != "posix", reason="a script stands for nvidia-smi")
def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    asked = {"name": "NVIDIA H200\\nNVIDIA H100", "memory.free": "143158\\n3", "none": ""}
    cases = "\n".join(f'*--query-gpu={what}*) printf "{says}";;' for what, says in asked.items())
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}\n*) exit 6;;\nesac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert host.of_gpus("name") == ["NVIDIA H200", "NVIDIA H100"]
    assert parity_runs.free_device_bytes("gpu") == 143158 * 2**20
    assert host.of_gpus("none") == host.of_gpus("nonsense") == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert host.of_gpus("name") == [] and parity_runs.free_device_bytes("gpu") is None
