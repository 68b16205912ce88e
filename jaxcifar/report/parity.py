"""The parity report: run rows of the published tables, keep what they gave, write docs/parity.md.

scripts/parity.py is its command line.
"""

import os
import pathlib
import signal
import sys
import threading

import jax

from jaxcifar import seeds as seeds_lib
from jaxcifar.errors import UserError
from jaxcifar.report import parity_page, parity_results, parity_rows, parity_runs


def run_rows(root, *, rows, seeds, budget_minutes, jobs, workdir, command=parity_runs.command,
             stop=None, say=print):
    """Run rows that have no result yet, cheapest first, and merge each as it ends; return a code.

    root: folder of configs/, results/ and docs/. rows: globs, see parity_rows.select. seeds: see seeds.parse.
    budget_minutes: 0: no limit. jobs: runs side by side, a number or "auto". workdir: folder of the
    run folders, WORKDIR/ROW/seedN (seedN_HASH where that is a run of an older configuration);
    finished runs that are already there are merged first. Returns 0, 1 where a run failed, 143 where
    `stop` (a threading.Event) ended it. Raises UserError.
    """
    platform = parity_runs.platform()
    jax.config.update("jax_platforms", "cpu")  # the device is for the runs, nothing is taken here
    known = parity_rows.recipes(root)
    chosen = parity_rows.select(known, rows)
    wanted = seeds_lib.parse(seeds)
    if pathlib.Path(workdir).is_dir():
        parity_results.collect(root, known, workdir, say=lambda line: None)
    results, counted = parity_results.read(root), parity_rows.counts(root, known)
    expected = parity_rows.seconds(known, counted, results, platform)
    todo = [_job(recipe, seed, workdir, counted, results)
            for recipe in parity_rows.by_cost(chosen, counted, expected) for seed in wanted
            if not parity_results.has_seed(results, recipe, seed)]
    say(f"{len(chosen)} row(s), {len(wanted)} seed(s): {len(todo)} run(s) to do")
    outcome = parity_runs.run(
        todo, root, platform=platform, slots=parity_runs.slots(jobs, platform),
        device_bytes=parity_runs.free_device_bytes(platform), budget_seconds=60 * budget_minutes,
        stop=stop, finished=lambda job: _merge(root, job, say), command=command, say=say)
    say(", ".join(f"{len(jobs)} {what}" for what, jobs in vars(outcome).items() if jobs)
        or "nothing to run")
    report(root, say=say)
    if stop is not None and stop.is_set():
        return 143
    return 1 if outcome.failed else 0


def list_rows(root, *, rows, say=print):
    """Print the rows, cheapest first: seeds measured, multiply-adds, minutes; return 0."""
    platform = parity_runs.platform()
    jax.config.update("jax_platforms", "cpu")
    known = parity_rows.recipes(root)
    chosen = parity_rows.select(known, rows)
    results, counted = parity_results.read(root), parity_rows.counts(root, known)
    expected = parity_rows.seconds(known, counted, results, platform)
    lines = [f"{'row':<52} {'seeds':<9} {'multiply-adds':>13} {'min/run':>8}  published"]
    for recipe in parity_rows.by_cost(chosen, counted, expected):
        have = [seed for seed in results.get(recipe.name, {}).get("seeds", ())
                if parity_results.has_seed(results, recipe, seed)]
        taken = expected[recipe.name]
        minutes = "?" if taken is None else f"{taken / 60:.1f}"
        work = parity_rows.work(recipe.config, counted[recipe.name]["multiply_adds"])
        metrics = ", ".join(dict.fromkeys(number.metric for number in recipe.numbers)) or "-"
        also = f" (also {', '.join(recipe.aliases)})" if recipe.aliases else ""
        lines.append(f"{recipe.name:<52} {','.join(have) or '-':<9} {work:>13.2e} {minutes:>8}  "
                     f"{metrics}{also}")
    try:
        say("\n".join(lines))
        sys.stdout.flush()
    except BrokenPipeError:  # head has seen enough; what is left must not be written at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def collect(root, folder, *, say=print):
    """Merge the finished runs beneath a folder, then write the page; return 0. Raises UserError."""
    merged = parity_results.collect(root, parity_rows.recipes(root), folder, say=say)
    say(f"{merged} new seed(s)")
    return report(root, say=say)


def report(root, *, say=print):
    """Write docs/parity.md and its figures from results/; return 0, 1 where a number fails."""
    jax.config.update("jax_platforms", "cpu")
    failures = parity_page.write(root, say=say)
    for line in failures:
        say(f"outside: {line}")
    return 1 if failures else 0


def stop_on_signal():
    """Return a threading.Event that SIGINT and SIGTERM set, so that runs can save their state."""
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())
    return stop


def _job(recipe, seed, workdir, counted, results):
    records = results.get(recipe.name, {}).get("seeds", {}).values()
    folder = pathlib.Path(workdir).resolve() / recipe.name / f"seed{seed}"
    if parity_results.hash_of_run(folder) not in ("", recipe.hash):
        folder = folder.with_name(f"seed{seed}_{recipe.hash}")  # the other is of an older recipe
    return parity_runs.Job(recipe, seed, folder, parity_runs.expected_device_bytes(
        recipe.config, counted[recipe.name]["multiply_adds"], records))


def _merge(root, job, say):
    try:
        parity_results.merge(root, job.recipe, job.seed, parity_results.record(job.folder)[1])
    except UserError as error:
        say(f"{job}: not merged: {error}")
