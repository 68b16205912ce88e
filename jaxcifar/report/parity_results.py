"""What was measured: results/REPORT/VARIANT.json, one file per row, written from run folders."""

import json
import pathlib
import re
import statistics

from ml_collections import ConfigDict

from jaxcifar import config as config_lib
from jaxcifar.errors import UserError
from jaxcifar.report import parity_rows
from jaxcifar.run_folder import epoch_seconds, plain, read_rows, write_atomic

_SPLITS = ("train", "val", "test")
_PACKAGES = ("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_DECIMALS = 4
_ABOUT = "config_hash is that of the configuration with seed 0; a seed's own is its run_hash"


def read(root):
    """Return {row's name: content} of every file under root/results/REPORT/.

    Content: row, variant, config_hash (of the configuration with seed 0) and seeds, {"0": record};
    `record` says what a record is. Raises UserError for a file that is not JSON.
    """
    folder, results = pathlib.Path(root, "results"), {}
    for path in sorted(folder.glob("*/**/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            results[content["row"]] = content
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result file ({error!r}): restore it or remove it"
                            ) from error
    return results


def path_of(root, name):
    """Return the result file of a row."""
    return pathlib.Path(root, "results", f"{name}.json")


def stale(results, known):
    """Return one line per result whose row is gone or whose configuration has changed since."""
    lines = []
    for name, content in results.items():
        if name not in known:
            lines.append(f"results/{name}.json: configs/ has no such row")
        elif content["config_hash"] != known[name].hash:
            lines.append(f"results/{name}.json: measured with configuration "
                         f"{content['config_hash']}, which is now {known[name].hash}")
        for seed, record in content["seeds"].items():
            if name in known and record["run_hash"] != _hash_with_seed(known[name].config, seed):
                lines.append(f"results/{name}.json: seed {seed} was measured with another "
                             "configuration")
    return lines


def fresh(results, known):
    """Return the results that are of the rows' current configurations."""
    return {name: content for name, content in results.items()
            if name in known and content["config_hash"] == known[name].hash}


def record(folder):
    """Return (config.json's content, record) of a finished run's folder.

    A record has: values, of the selected epoch (test_, val_) and of the last one (train_), accuracy
    in percent; params; selection; epochs; seconds of compilation and epochs (one that was
    interrupted counts as the mean of the others; None if all were); seconds_per_epoch, the median of
    whole ones; both are one seed's share where seeds were trained at once; device; versions; commit,
    that of the run's last start, earlier_commits of those before, if any, and dirty (whether tracked
    files differed from one of them); run_hash; curves, a value per epoch with 4 decimals. What was
    not finite is None. Raises UserError where the folder does not hold a finished run, or its files
    are of different runs.
    """
    folder = pathlib.Path(folder)
    try:
        config, result = (json.loads((folder / name).read_text(encoding="utf-8"))
                          for name in ("config.json", "result.json"))
        rows = read_rows(folder)
        if config_lib.config_hash(ConfigDict(config)) != result["config_hash"]:
            raise UserError(f"{folder}: config.json is not that of result.json")
        if not rows or rows[-1]["epoch"] != result["epochs"] or len(rows) != result["epochs"]:
            raise UserError(f"{folder}: metrics.jsonl does not have the {result['epochs']} epochs "
                            "of result.json")
        return config, plain(_record(result, rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not hold a finished run: {error!r}") from error


def hash_of_run(folder):
    """Return the hash, with seed 0, of the configuration in a run's folder; "" where there is none."""
    path = pathlib.Path(folder, "config.json")
    if not path.is_file():
        return ""
    try:
        return parity_rows.hash_of(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is no configuration ({error}): remove its folder") from error


def merge(root, recipe, seed, new):
    """Enter one seed's record into the row's file; return what happened, a word or two.

    A seed that is there already stays as it is, so that merging again changes nothing. A file of
    another configuration (the recipe has changed since) is replaced.
    """
    path = path_of(root, recipe.name)
    content = {"row": recipe.name, "variant": recipe.spec, "config_hash": recipe.hash,
               "about": _ABOUT, "seeds": {}}
    outcome = "merged"
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["config_hash"] == recipe.hash:
            content = old
        else:
            outcome = "merged, in place of an older configuration"
    if str(seed) in content["seeds"]:
        return "already there"
    seeds = content["seeds"] | {str(seed): new}
    content["seeds"] = {key: seeds[key] for key in sorted(seeds, key=int)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _text(content))
    return outcome


def collect(root, known, folder, say=print):
    """Merge every finished run beneath `folder` that is of a row; return how many were new.

    A run is known by its configuration's hash and its seed, wherever its folder lies; one that is
    of no row, or damaged, is named and left out. Nothing is written beneath `folder`. Raises
    UserError if there is no such folder.
    """
    if not pathlib.Path(folder).is_dir():
        raise UserError(f"--collect: there is no folder {folder}")
    rows = {recipe.hash: recipe for recipe in known.values()}
    merged = 0
    for path in sorted(pathlib.Path(folder).rglob("result.json")):
        try:
            config, new = record(path.parent)
        except UserError as error:
            say(f"left out: {error}")
            continue
        recipe = rows.get(parity_rows.hash_of(config))
        if recipe is None:
            say(f"left out: {path.parent} has no row's configuration")
            continue
        outcome = merge(root, recipe, config["seed"], new)
        merged += outcome != "already there"
        say(f"{recipe.name} seed {config['seed']}: {outcome}")
    return merged


def has_seed(results, recipe, seed):
    """Return whether a row's current configuration was measured with a seed."""
    content = results.get(recipe.name)
    return bool(content and content["config_hash"] == recipe.hash
                and str(seed) in content["seeds"])


def _record(result, rows):
    chosen = result["selection"]["epoch"]
    environment, earlier = result["environment"], result.get("earlier_environments", ())
    last, selected = rows[-1], rows[chosen - 1]
    values = {key: row.get(key) for split, row in (("train", last), ("val", selected))
              for key in (f"{split}_loss", f"{split}_accuracy")}
    values |= {key: result[key] for key in ("test_loss", "test_accuracy")}
    whole = [epoch_seconds(row) for row in rows if "resumed_at" not in row] or None
    compiled_for = max(row.get("seeds_at_once", 1) for row in rows)
    curves = {f"{split}_{metric}": [row.get(f"{split}_{metric}") for row in rows]
              for split in _SPLITS for metric in ("loss", "accuracy")}
    return {
        "values": {key: _rounded(value) for key, value in values.items() if value is not None},
        "params": result["params"],
        "selection": result["selection"],
        "epochs": result["epochs"],
        "seconds": whole and round(result["seconds"]["compile"] / compiled_for
                                   + statistics.mean(whole) * len(rows), 1),
        "seconds_per_epoch": whole and round(statistics.median(whole), 2),
        "peak_device_bytes": result.get("peak_device_bytes"),
        "device": {"platform": environment["platform"], "kind": environment["device"],
                   "count": result["devices"]["count"], "host": environment["host_cpu"],
                   "host_cores": environment["host_cores"]},
        "versions": {name: environment.get(name) for name in _PACKAGES},
        "commit": environment["git_commit"],
        "dirty": any(place["git_dirty"] for place in earlier) or environment["git_dirty"],
        **({"earlier_commits": [place["git_commit"] for place in earlier]} if earlier else {}),
        "run_hash": result["config_hash"],
        "curves": {key: [_rounded(value) for value in curve] for key, curve in curves.items()
                   if any(value is not None for value in curve)},
    }


def _rounded(value):
    return None if value is None else round(value, _DECIMALS)


def _hash_with_seed(config, seed):
    config = ConfigDict(config_lib.to_dict(config))
    config.seed = int(seed)
    return config_lib.config_hash(config)


def _text(content):
    """Indented JSON with every list of numbers on one line."""
    text = json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False)
    return re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]",
                  lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"
