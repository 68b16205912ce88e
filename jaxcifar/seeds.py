"""Several seeds of one configuration: the mean, the standard deviation and every run.

    python -m jaxcifar.main --config=configs/architectures.py:mlp_s --seeds=0-2 --workdir=runs/mlp

Each seed has an ordinary, resumable run folder (seed0, seed1, ...), equal to what the configuration
with that seed leaves; seeds.json and curves.png beside them say what they have in common. They take
in every finished seed of the folder, so that --seeds=3,4 adds two to the three above.

A seed decides initialisation, order, augmentation and dropout. The split into training and
validation set is `config.split_seed`'s, the same for every seed: then the standard deviation is
that of training, and validation accuracies are of the same images. (Of the published reports one,
on architectures, names its seeds, 0, 1 and 2; it does not say whether they also drew the split.)
"""

import pathlib
import re
import sys

import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import parallel, run_folder, splits, together, train
from jaxcifar.errors import UserError, unknown
from jaxcifar.programs import Cache
from jaxcifar.report import seeds as report
from jaxcifar.run import refuse_other_config

WAYS = ("auto", "yes", "no")


def parse(text):
    """Return the seeds that a text such as "0,1,2" or "0-4,7" names, a list of ints.

    Raises UserError: it is no such list, or names a seed twice.
    """
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not match or first > last or last >= 2**32:
            raise UserError(f"--seeds={text}: {part.strip()!r} is neither a seed (0 to 2**32 - 1) "
                            "nor a range such as 0-4; write --seeds=0,1,2 or --seeds=0-4")
        seeds += range(first, last + 1)
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise UserError(f"--seeds={text} names {', '.join(map(str, twice))} more than once: "
                        "a seed gives the same run every time")
    return seeds


def run(config, seeds, workdir, *, way="auto", stop=lambda: 0, stream=None):
    """Train a configuration with each of several seeds, or go on with what `workdir` holds.

    Args:
      config: configuration; its own seed plays no part. seeds: ints. workdir: folder of the runs.
      way: "yes", all seeds at once (see jaxcifar.together); "no", one by one; "auto", the faster,
        on CPU and with config.deterministic one by one.
      stop, stream: as `train.fit`.

    Returns:
      The content of seeds.json, a dict; see `summary`. It takes in every finished seed of this
      configuration that `workdir` holds, in ascending order. None in every process but the first.

    Raises:
      UserError: as `train.fit`, or `workdir` holds something else, or way "yes" on several devices.
      NonFiniteLoss: names the seed. Interrupted.
    """
    if way not in WAYS:
        raise UserError(unknown("value of --seeds_together", way, WAYS))
    train.check(config)
    train.configure_jax(config)
    workdir = pathlib.Path(workdir)
    parallel.in_first(lambda: _refuse_other(config, workdir), "use this --workdir")

    def say(text):
        if parallel.is_primary():
            print(f"seeds: {text}", file=sys.stdout if stream is None else stream, flush=True)

    pending = [seed for seed in seeds if not parallel.agree_on(
        parallel.is_primary() and _finished(config, seed, workdir))]
    if len(pending) < len(seeds):
        say(f"finished before: {', '.join(str(s) for s in seeds if s not in pending)}")
    if pending:
        parallel.in_first(lambda: _refuse_other_data(config, workdir), "add seeds to this --workdir")
    shared = _shared(config, pending, way, say)
    if shared:
        together.fit(shared, pending, workdir, stop=stop, stream=stream)
    else:
        cache = Cache(1)
        for seed in pending:
            say(f"seed {seed}")
            _fit(config, seed, workdir, stop, stream, cache)
    return _conclude(config, workdir, say) if parallel.is_primary() else None


def _conclude(config, workdir, say):
    """Write and print what all finished seeds in the folder have in common; return seeds.json."""
    seeds = [seed for seed in run_folder.seeds_in(workdir) if _finished(config, seed, workdir)]
    result = summary(config, seeds, workdir)
    run_folder.write_json(workdir / "seeds.json", result)
    report.curves([run_folder.read_rows(workdir / f"seed{seed}") for seed in seeds],
                  workdir / "curves.png",
                  title=f"{config.model.name} on {config.dataset}, {len(seeds)} seed(s)")
    say(f"{len(seeds)} run(s) of {config.model.name} on {config.dataset}, all that are finished in "
        f"{workdir}\n{report.table(result)}")
    return result


def summary(config, seeds, workdir):
    """Return what finished runs have in common, read from their folders.

    Returns:
      {"config_hash" (of the configuration with seed 0), "seeds", "metrics": {name: {"mean", "std"
      (of the sample, n - 1; None for n = 1), "n", "values" (in the order of seeds; None: not
      measured)}}, "selection", "environment": what all runs have alike, "runs": one entry each,
      with the rest}. Accuracies are in percent. "last_" is the last epoch; "best_val_" the best
      epoch on validation; "best_test_", the best epoch on test, is a look at the test set.
      "epoch_seconds" is of all epochs (None: one was interrupted, and only its rest was timed);
      of seeds trained at once, a seed's share.
    """
    results = [_result(workdir, seed) for seed in seeds]
    values = [_measured(result, run_folder.read_rows(workdir / f"seed{seed}"))
              for seed, result in zip(seeds, results, strict=True)]
    names = list(dict.fromkeys(name for of_run in values for name in of_run))
    environments = [result["environment"] for result in results]
    alike = {key: value for key, value in environments[0].items()
             if all(other.get(key) == value for other in environments)}
    return {
        "name": workdir.name, "dataset": config.dataset, "model": config.model.name,
        "params": results[0]["params"],
        "config_hash": config_lib.config_hash(together.with_seed(config, 0)), "seeds": list(seeds),
        "metrics": {name: statistics([of_run.get(name) for of_run in values]) for name in names},
        "selection": {"rule": config.selection, "uses_test_set": train.uses_test_set(config)},
        "environment": alike,
        "runs": [{"seed": seed, "folder": f"seed{seed}", "config_hash": result["config_hash"],
                  "selected_epoch": result["selection"]["epoch"], "seconds": result["seconds"],
                  "seeds_at_once": result["last"].get("seeds_at_once", 1),
                  "environment": {key: value for key, value in result["environment"].items()
                                  if key not in alike}}
                 for seed, result in zip(seeds, results, strict=True)],
    }


def statistics(values):
    """Return {"mean", "std", "n", "values"} of a list of floats, None where nothing was measured.

    std is the sample's (n - 1), None for fewer than two values.
    """
    known = np.array([value for value in values if value is not None], np.float64)
    return {"mean": float(known.mean()) if len(known) else None,
            "std": float(known.std(ddof=1)) if len(known) > 1 else None,
            "n": len(known), "values": list(values)}


def _measured(result, rows):
    """Return the numbers of one run to average, {name: float or None}."""
    measured = {"test_accuracy": result["test_accuracy"], "test_loss": result["test_loss"]}
    for split in ("train", "val", "test"):
        for name in ("accuracy", "loss"):
            key = f"{split}_{name}"
            if key in result["last"]:
                measured[f"last_{key}"] = result["last"][key]
            best = max if name == "accuracy" else min
            column = [row[key] for row in rows if row.get(key) is not None]
            if split != "train" and column:
                measured[f"best_{key}"] = best(column)
    whole = not any("resumed_at" in row for row in rows)  # else one row has a part of its time
    return measured | {"epochs": result["epochs"], "epoch_seconds": sum(
        map(run_folder.epoch_seconds, rows)) if whole else None}


def _shared(config, pending, way, say):
    """Return what `together.fit` needs, or None where the seeds go one by one."""
    if way == "no" or not pending or len(pending) == 1 and way == "auto":
        return None
    if way == "auto" and config.deterministic:  # the two ways differ in rounding
        say("one by one: config.deterministic")
        return None
    devices = parallel.create(config)
    if devices.kind != "jit":
        if way == "yes":
            raise UserError(f"--seeds_together=yes needs one device, and this run has "
                            f"{devices.num_devices} ({devices.kind}): set --config.num_devices=1, "
                            "or --seeds_together=auto")
        say(f"one by one: {devices.num_devices} device(s) ({devices.kind}) share each run")
        return None
    shared = together.prepare(config)
    return shared if way == "yes" or together.pays(shared, pending, say) else None


def _fit(config, seed, workdir, stop, stream, cache):
    try:
        train.fit(together.with_seed(config, seed), workdir / f"seed{seed}", stop=stop,
                  stream=stream, cache=cache)
    except train.NonFiniteLoss as error:
        raise together.named(seed, error) from error


def _refuse_other(config, workdir):
    """Refuse a folder that holds something else, or seeds of another configuration."""
    run_folder.refuse_other_kind(workdir, "several seeds")
    for seed in run_folder.seeds_in(workdir):
        refuse_other_config(together.with_seed(config, seed), workdir / f"seed{seed}")


def _refuse_other_data(config, workdir):
    """Refuse to add seeds to finished ones that saw the training set in another order."""
    finished = [s for s in run_folder.seeds_in(workdir) if _finished(config, s, workdir)]
    digest = splits.load(config).digest if finished else ""
    for seed in finished:
        splits.refuse_other_data(digest, workdir / f"seed{seed}")


def _finished(config, seed, workdir):
    """Return whether a seed's folder holds the result of this configuration."""
    result = _result(workdir, seed)
    expected = config_lib.config_hash(together.with_seed(config, seed))
    return bool(result) and result.get("config_hash") == expected


def _result(workdir, seed):
    """Return a run's result.json, or None where there is none that can be read."""
    return run_folder.read_json(workdir / f"seed{seed}" / "result.json", None)
