"""A contender's side: prepare, say ready, measure at every "go", report.

    python -m jaxcifar.benchmark.child '{"contender": "torch_eager", "model": "lenet", ...}'

Lines in: "go KIND", at the end "finish". Lines out, JSON: {"ready": ...}, one measurement for each
go, the report; or {"error": message}. What libraries print goes to standard error. Not on Windows.
"""

import ctypes
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import resource
import signal
import sys

from jaxcifar.errors import UserError
from jaxcifar.logs import Stopwatch

_MODULES = {"jaxcifar": "jax_contender", "jaxcifar_bf16": "jax_contender",
            "torch_eager": "torch_contender", "torch_best": "torch_best"}
_MOST_STEPS = 50_000


class Meter:
    """Seconds and CPU seconds (of all threads, and of worker processes) since `start`."""

    def start(self):
        """Start, or start again."""
        self._watch, self._cpu = Stopwatch(), cpu_seconds()

    def read(self):
        """Return {"seconds", "cpu_seconds"}."""
        cpu = max(cpu_seconds() - self._cpu, 1e-6)  # the clock of workers ticks in 10 ms
        return {"seconds": self._watch.seconds(), "cpu_seconds": cpu}


def end_with_parent():
    """Let the kernel kill this process when its parent ends, so that nobody shares the device.

    On Linux; elsewhere nothing happens. A parent that has ended already is not noticed.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def cpu_seconds():
    """Return the CPU time so far of this process's threads and, on Linux, of its workers."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for worker in multiprocessing.active_children():
        stat = pathlib.Path(f"/proc/{worker.pid}/stat")
        if stat.exists():
            user, system = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def measure(run, batches):
    """Return one measurement: {"images", "seconds", "cpu_seconds"}.

    run: function (number of batches, start) -> images done; it calls `start` when the clock is to
    start and returns when the device has finished.
    """
    meter = Meter()
    images = run(batches, meter.start)
    return {"images": images, **meter.read()}


def warm_up(run):
    """Call `run` twice, on one batch; the first call compiles.

    Returns:
      (seconds of the whole first call, of the second, the second's measurement).
    """
    watch = Stopwatch()
    run(1, lambda: None)
    first, watch = watch.seconds(), Stopwatch()
    once = measure(run, 1)
    return first, watch.seconds(), once


def batches_for(once, size, work):
    """Return how many batches of `size` take about work["seconds"], judged by one measurement."""
    per_batch = once["seconds"] / max(once["images"] / size, 1e-9)
    return max(1, min(_MOST_STEPS, math.ceil(work["seconds"] / per_batch)))


def batches_of_epoch(work):
    """Return the steps of one epoch's measurement: the asked number, or all."""
    full = max(work["num_train"] // work["batch"], 1)
    return min(work["epoch_steps"] or full, full)


def serve(work, contender, lines, send):
    """Warm up every kind, then answer the parent's lines until "finish"."""
    first, warm, counts, memory, calls = {}, {}, {}, {}, {}
    for kind, run in contender.kinds.items():
        if kind == "peak":  # comes last; its matrices are not the network's memory
            memory = contender.memory()
        if run not in calls:  # jaxcifar's steps and epochs are one program, on a GPU a whole epoch
            calls[run] = warm_up(run)
        first[kind], warm[kind], once = calls[run]
        size = work["eval_batch" if kind == "eval" else "batch"]
        counts[kind] = batches_of_epoch(work) if kind == "epoch" else batches_for(once, size, work)
        if contender.repeat_warm_up:
            run(counts[kind], lambda: None)
        contender.idle()
    send({"ready": True})
    for line in lines:
        command, _, kind = line.strip().partition(" ")
        if command == "finish":
            break
        result = measure(contender.kinds[kind], counts[kind])
        contender.idle()
        send(result)
    send({"first_seconds": first, "warm_seconds": warm, **memory, **contender.report()})


def main():
    """Serve the contender that the first argument describes."""
    end_with_parent()
    work = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message):
        out.write(json.dumps(message) + "\n")

    if work["threads"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:work["threads"]])
    module = importlib.import_module(f"jaxcifar.benchmark.{_MODULES[work['contender']]}")
    try:
        contender = module.prepare(work)
        serve(work, contender, sys.stdin, send)
    except UserError as error:
        send({"error": str(error)})


if __name__ == "__main__":
    main()
