"""Run rows as processes, several side by side, until they are done or the time is up.

Every (row, seed) has a folder of its own, in which an interrupted run goes on. Each holds a lock
while its process lives: after a kill of the program that started them, what still runs is left
alone and not started twice.
"""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any

from jaxcifar import host, run_folder
from jaxcifar.errors import UserError
from jaxcifar.logs import Stopwatch
from jaxcifar.run_folder import writing

_POLL_SECONDS = 0.1
_SAVE_SECONDS = 180  # for saving the state after SIGTERM, before a process is killed
_MOST_SIDE_BY_SIDE = 4
_MiB = 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """One seed of one row. folder: of the run. device_bytes: of device memory that it may take."""

    recipe: Any
    seed: int
    folder: pathlib.Path
    device_bytes: int = 0

    def __str__(self):
        return f"{self.recipe.name} seed {self.seed}"


@dataclasses.dataclass
class Outcome:
    """What became of the jobs: lists of Job."""

    finished: list = dataclasses.field(default_factory=list)
    failed: list = dataclasses.field(default_factory=list)
    interrupted: list = dataclasses.field(default_factory=list)
    left: list = dataclasses.field(default_factory=list)  # not started


def command(job):
    """Return the command line of a job."""
    return [sys.executable, "-m", "jaxcifar.main", f"--config={job.recipe.spec}",
            f"--workdir={job.folder.resolve()}", f"--config.seed={job.seed}",
            "--config.tensorboard=False"]


def run(jobs, root, *, platform="cpu", slots=1, device_bytes=None, budget_seconds=0, stop=None,
        finished=None, command=command, say=print):
    """Run jobs in their order, up to `slots` at a time; return an Outcome.

    root: folder to run in (that of configs/). platform: "cpu" or "gpu". device_bytes: memory of the
    device; the jobs that run side by side take no more together (a single one always runs); None:
    not looked at. budget_seconds: after them every process gets SIGTERM and saves its state; 0: no
    limit. stop: a threading.Event that asks for the same at once. finished: called with every job
    whose process ended well. command: job -> argument list. Each job's output goes to parity.log in
    its folder. Once two were refused with one message, no more are started.
    """
    stop, watch, outcome = stop or threading.Event(), Stopwatch(), Outcome()
    waiting, running = list(jobs), []
    while (waiting or running) and not stop.is_set():
        if budget_seconds and watch.seconds() >= budget_seconds:
            break
        while waiting and _has_room(waiting[0], running, slots, device_bytes):
            job = waiting.pop(0)
            process = _start(job, root, platform, command, say)
            if process is None:
                outcome.left.append(job)
            else:
                running.append((job, process))
        failed = len(outcome.failed)
        running = _reap(running, outcome, finished, say)
        if waiting and len(outcome.failed) > failed and _refused_alike(outcome.failed):
            say(f"two runs were refused for the same reason: {len(waiting)} more not started")
            outcome.left, waiting = outcome.left + waiting, []
        stop.wait(_POLL_SECONDS)
    if running:
        say(f"{'asked to stop' if stop.is_set() else 'the time is up'}: "
            f"{len(running)} run(s) save their state")
    _terminate(running, outcome, finished, say)
    outcome.left += waiting
    return outcome


def platform():
    """Return "cpu" or "gpu": where runs will go, judged without starting JAX's backend."""
    return "cpu" if host.runs_on_cpu() else "gpu"


def slots(asked, platform):
    """Return how many runs may go side by side for --jobs: a number, or "auto".

    auto: one on CPU (a run uses every core), up to four on an accelerator, two cores for each.
    Raises UserError for anything else.
    """
    if asked != "auto":
        if not (str(asked).isdigit() and int(asked) >= 1):
            raise UserError(f"--jobs={asked}: must be auto or a number from 1")
        return int(asked)
    if platform == "cpu":
        return 1
    return max(1, min(_MOST_SIDE_BY_SIDE, (os.cpu_count() or 1) // 2))


def free_device_bytes(platform):
    """Return the free memory of the first NVIDIA GPU, or None where there is none to ask."""
    if platform == "cpu":
        return None
    try:
        return int(host.of_gpus("memory.free")[0]) * _MiB
    except (IndexError, ValueError):
        return None


def expected_device_bytes(config, multiply_adds, records):
    """Return what a run may take of the device's memory, an int.

    records: of finished seeds; a measured peak counts, with a fifth and the CUDA context added.
    Else a guess on the safe side: a byte per 20 multiply-adds of a batch, above 2 GiB.
    """
    peaks = [record["peak_device_bytes"] for record in records if record["peak_device_bytes"]]
    if peaks:
        return int(1.2 * max(peaks)) + 512 * _MiB
    return 2048 * _MiB + config.batch_size * multiply_adds // 20


def _has_room(job, running, slots, device_bytes):
    if not running:
        return True
    taken = sum(other.device_bytes for other, _ in running)
    fits = device_bytes is None or taken + job.device_bytes <= device_bytes
    return len(running) < slots and fits


def _start(job, root, platform, command, say):
    """Start a job's process; None where one from an earlier start still runs in its folder."""
    with writing(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        log = (job.folder / "parity.log").open("ab")
        lock = (job.folder / "parity.lock").open("ab")
    with log, lock:
        if run_folder.lock(lock) is False:
            say(f"{job}: still runs since an earlier start, left alone")
            return None
        environment = dict(os.environ)
        if platform != "cpu":  # else the first run would take three quarters of the memory
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        say(f"{job}: started")
        # In a session of its own: Ctrl-C reaches it once, as SIGTERM from here.
        return subprocess.Popen(
            command(job), cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True, **_passing(lock))


def _passing(file):
    return {"pass_fds": (file.fileno(),)} if os.name == "posix" else {}


def _reap(running, outcome, finished, say):
    """Return the jobs that still run, having dealt with the others."""
    still = []
    for job, process in running:
        if process.poll() is None:
            still.append((job, process))
        elif process.returncode == 0:
            outcome.finished.append(job)
            say(f"{job}: done")
            if finished:
                finished(job)
        elif process.returncode in (130, 143, -2, -15):
            outcome.interrupted.append(job)
            say(f"{job}: interrupted; the same command goes on from there")
        else:
            outcome.failed.append(job)
            say(f"{job}: failed with exit code {process.returncode}: {_last_line(job)}\n"
                f"  all it said is in {job.folder / 'parity.log'}")
    return still


def _terminate(running, outcome, finished, say):
    for _, process in running:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    watch = Stopwatch()
    for _, process in running:
        try:
            process.wait(max(0.0, _SAVE_SECONDS - watch.seconds()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _reap(running, outcome, finished, say)


def _refused_alike(failed):
    """Return whether two jobs ended with the same message of a UserError (no data, for instance)."""
    lines = [line for line in map(_last_line, failed) if line.startswith("error: ")]
    return len(set(lines)) < len(lines)


def _last_line(job):
    lines = (job.folder / "parity.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
