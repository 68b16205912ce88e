"""Host settings that make JAX fast on CPU.

Memory: a training step on CPU allocates hundreds of megabytes of temporaries and frees them again.
By default glibc hands such blocks back to the kernel, and the next step faults every 4 kB page in
anew: a third of the step's time. So freed memory is kept, on huge pages.

Convolutions: XLA calls YNNPACK for them, which in JAX 0.10 runs on one core. There, Eigen's serve.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import jax

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # that JAX looks for
_NO_YNN_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def configure(reserve_bytes=8 << 30):
    """Set up the process for training on CPU, before JAX's backend starts; return whether it did.

    Sets glibc's malloc to keep what it has (no mmap for large blocks, no trimming), advises huge
    pages for the first `reserve_bytes` of its heap (addresses, not memory: pages are taken when
    touched), switches asynchronous dispatch off, and chooses the library for convolutions in
    XLA_FLAGS (unless it names one). Does nothing where JAX will not run on CPU; malloc is left alone
    where the C library is not glibc. Results change by no more than the library's rounding.
    """
    if not runs_on_cpu():
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    flags = os.environ.get("XLA_FLAGS", "")
    if _single_threaded_convolutions() and "ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_YNN_CONVOLUTIONS}".strip()
    libc = _glibc()
    if libc is not None:
        _keep_freed_memory(libc)
        _advise_huge_pages(libc, reserve_bytes)
    return True


def share_device_memory():
    """Keep JAX from taking most of a GPU's memory in advance, unless the user has chosen.

    For what may run beside another process on the same GPU; before JAX's backend starts.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def runs_on_cpu():
    """Return whether JAX will choose the CPU, judged without starting a backend."""
    asked = jax.config.jax_platforms
    if asked:
        return asked.split(",")[0] == "cpu"
    plugins = [plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")]
    if not any(map(os.path.exists, _GPU_FILES)):  # then JAX leaves its CUDA plugin out
        plugins = [name for name in plugins if "cuda" not in name]
    return not plugins and importlib.util.find_spec("libtpu") is None


def cores():
    """Return the number of CPU cores that this process may use, not all of the host's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def of_gpus(what):
    """Return what nvidia-smi says of every NVIDIA GPU, a list of str; [] where there is none to ask.

    what: a property as --query-gpu names it, such as "name" or "memory.free" (in MiB).
    """
    query = ("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        return [line.strip() for line in lines.splitlines()]
    except (OSError, subprocess.SubprocessError):
        return []


def _single_threaded_convolutions():
    """Return whether XLA's default library runs a convolution on one of the cores there are."""
    return jax.__version_info__[:2] == (0, 10) and cores() > 1


def _glibc():
    """Return the C library where it is glibc on Linux, else None."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None


def _keep_freed_memory(libc):
    # M_MMAP_THRESHOLD would not do: glibc caps it at 32 MB. -1: never trim; any number would trim
    # above 2 GB at the latest, and a step of a large network has more than that to free. Threads keep
    # arenas of their own: a step takes 1.25 times as long in one that the compiler has used too.
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)


def _advise_huge_pages(libc, count):
    """Grow the heap by `count` bytes, advise huge pages for them, free them: malloc keeps them."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(count)
    if not block:  # a memory limit: the rest of the settings stand
        return
    first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    last = (block + count) // _HUGE_PAGE * _HUGE_PAGE
    if last > first:
        libc.madvise(first, last - first, _MADV_HUGEPAGE)
    libc.free(block)
