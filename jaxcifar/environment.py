"""Say where a run takes place, and how much memory it took."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

import jax

from jaxcifar import host

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_WRITTEN_BY_RUNS = ("results", "docs")


def environment():
    """Return a dict fit for JSON: versions, devices, host, git commit; no paths and no host name.

    git_commit (str) and git_dirty (bool: tracked files differ from it, other than those that runs
    write, in results/ and docs/) are None where the package is not part of a git repository; there
    git_commit is that of JAXCIFAR_GIT_COMMIT, if it is set, for a copy without its repository.
    """
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "host_cpu": _cpu_model(),
        "host_cores": host.cores(),
        **_git(),
    }


def memory():
    """Return the process's peak memory so far, in bytes: peak_device_bytes and peak_host_bytes.

    The device's is the largest over the local devices, or None where the backend keeps no count
    (CPU); the host's is the resident set, None on Windows.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    try:
        import resource
    except ImportError:  # Windows
        host = None
    else:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        host *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {"peak_device_bytes": max(peaks, default=None), "peak_host_bytes": host}


def version(package):
    """Return the version of an installed package, None of one that is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model():
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git():
    here = pathlib.Path(__file__)

    def git(*arguments):
        return subprocess.run(("git", "-C", str(here.parent), *arguments), timeout=10, check=True,
                              capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not just inside someone's repo
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)",
                      *(f":(top,exclude){folder}" for folder in _WRITTEN_BY_RUNS))
        return {"git_commit": commit, "git_dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": os.environ.get("JAXCIFAR_GIT_COMMIT"), "git_dirty": None}
