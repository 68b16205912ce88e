"""Finished runs that nobody ran: run folders and repositories for tests of the parity report."""

import json
import pathlib
import shutil
import sys

from jaxcifar import config as config_lib
from jaxcifar.report import parity_page, parity_results

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A run that copies a finished folder (argv 1) to its own (2). Mode (3): ok; wait: until SIGTERM,
# then "save", exit with 143, and end well the next time; meet: until argv 4 says so; fail.
CHILD = """
import pathlib, shutil, signal, sys, time
source, folder, mode, together = sys.argv[1:]
folder = pathlib.Path(folder)
events = folder.parents[2] / "events"
def log(what):
    with events.open("a") as file:
        file.write(f"{what} {folder}\\n")
log("start")
if mode == "fail":
    sys.exit("error: no such data")
if mode == "wait" and not (folder / "saved").exists():
    def stop(*_):
        (folder / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    time.sleep(60)
if mode == "meet":
    for _ in range(400):
        if events.read_text().count("start") >= int(together):
            break
        time.sleep(0.02)
    else:
        sys.exit("error: nobody came")
shutil.copytree(source, folder, dirs_exist_ok=True)
log("end")
"""


def write_run(folder, recipe, seed, *, epochs=None, **values):
    """Write the run folder of a finished run of a recipe; values: of the last epoch and the test.

    Every curve rises or falls to the value given, by 1% per epoch.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_lib.ConfigDict(config_lib.to_dict(recipe.config))
    config.seed = seed
    epochs = epochs or config.epochs
    measured = {"train_loss": 1.0, "train_accuracy": 50.0, "test_loss": 1.2, "test_accuracy": 40.0}
    measured |= {"val_loss": 1.1, "val_accuracy": 41.0} if config.val_size else {}
    measured |= values
    rows = [{"epoch": epoch, "step": 10 * epoch, "seconds": 2.0,
             **{key: value * (1 - 0.01 * (epochs - epoch)) for key, value in measured.items()
                if config.test_every_epoch or not key.startswith("test_")}}
            for epoch in range(1, epochs + 1)]
    result = {
        "params": 1234, "seed": seed, "config_hash": config_lib.config_hash(config),
        "epochs": epochs, "steps": 10 * epochs, "devices": {"kind": "jit", "count": 1},
        "selection": {"rule": config.selection, "epoch": epochs, "uses_test_set": False},
        "test_loss": measured["test_loss"], "test_accuracy": measured["test_accuracy"],
        "seconds": {"compile": 1.0, "epochs": 2.0 * epochs, "total": 3.0 * epochs},
        "peak_device_bytes": None,
        "environment": {"platform": "cpu", "device": "cpu", "host_cpu": "Fake", "host_cores": 2,
                        "git_commit": "0123456789ab", "git_dirty": False, "python": "3.11",
                        "jax": "0.10.2"}}
    (folder / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def result_of(tmp_path, recipe, seeds=(0,), **values):
    """Return the content of a result file of seeds with the same values."""
    content = {"row": recipe.name, "variant": recipe.spec, "config_hash": recipe.hash, "seeds": {}}
    for seed in seeds:
        folder = write_run(tmp_path / recipe.name / f"seed{seed}", recipe, seed, **values)
        content["seeds"][str(seed)] = parity_results.record(folder)[1]
    return content


def repository(folder):
    """Make a root with the real configurations and counts, and no results; return its path."""
    folder = pathlib.Path(folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "results").mkdir()
    for name in ("counts.json", "notes.csv"):
        shutil.copy(ROOT / "results" / name, folder / "results" / name)
    parity_page.write(folder, say=lambda line: None)
    return folder


def command(sources, mode="ok", together=1):
    """Return a command for parity_runs: CHILD for every job; sources: {job's text: folder}."""
    return lambda job: [sys.executable, "-S", "-c", CHILD, str(sources[str(job)]),
                        str(job.folder), mode, str(together)]
