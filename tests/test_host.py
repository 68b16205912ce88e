"""Host settings: applied where JAX runs on CPU, and only there; results do not change."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from jaxcifar import host

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


def probe(mode):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", PROBE, mode], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    return out.stdout.split()


@pytest.mark.skipif(host._glibc() is None, reason="the settings are glibc's; this is not glibc")
def test_large_blocks_come_from_the_heap_once_configured_and_results_stay():
    plain_total, plain_in_heap, _ = probe("plain")
    total, in_heap, kept = probe("configure")
    assert (plain_in_heap, in_heap, kept) == ("False", "True", "True")
    assert total == plain_total


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


@pytest.mark.parametrize("plugins,expected", [([], True), (["cuda"], False)])
def test_installed_plugins_decide_where_no_platform_is_asked_for(monkeypatch, plugins, expected):
    class Config:
        jax_platforms = None
    monkeypatch.setattr(jax, "config", Config)
    monkeypatch.setattr(host.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert host.runs_on_cpu() is expected


def test_nothing_is_done_to_malloc_where_the_library_is_not_glibc(monkeypatch):
    monkeypatch.setattr(host.sys, "platform", "darwin")
    assert host._glibc() is None
