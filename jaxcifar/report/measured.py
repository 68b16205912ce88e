"""What results/ says of each model: its measured accuracy, and the speed of its training."""

import json
import pathlib
import statistics

from jaxcifar import models
from jaxcifar.report import parity_results, parity_rows

_SEEDS = 3  # more say little more of which recipe is the best


def accuracies(root):
    """Return {model: text}, the mean test accuracy in results/ of the model as registered.

    Of several recipes the one with most seeds, up to three; among those the best on validation (on
    the test set where a recipe has no validation set), and its row is named.
    """
    known, found = parity_rows.recipes(root), {}
    for name, content in parity_results.fresh(parity_results.read(root), known).items():
        config = known[name].config
        options = config.model.to_dict()
        model = options.pop("name")
        defaults = models.options(model)
        if all(defaults[key] == value for key, value in options.items()):
            found.setdefault(model, []).append((name, list(content["seeds"].values())))
    return {model: _text(recipes, known) for model, recipes in found.items()}


def _text(recipes, known):
    """Return a model's cell: recipes are (row, records of its seeds)."""
    name, records = max(recipes, key=lambda recipe: (min(len(recipe[1]), _SEEDS), _held_out(recipe[1])))
    notes = [f"{max(record['epochs'] for record in records)} epochs",
             f"{len(records)} seed{'s'[:len(records) > 1]}"]
    notes += ["CIFAR-100"] if known[name].config.dataset == "cifar100" else []
    notes += [f"`{name}`"] if len(recipes) > 1 else []
    return f"{_mean(records, 'test_accuracy'):.2f} ({', '.join(notes)})"


def _held_out(records):
    there = all("val_accuracy" in record["values"] for record in records)
    return _mean(records, "val_accuracy" if there else "test_accuracy")


def _mean(records, metric):
    return statistics.mean(record["values"][metric] for record in records)


def training_speeds(root):
    """Return {model: text}, the training step's speed in results/benchmark_*.json.

    Of several files: an accelerator's before the CPU's, then all cores' before some, else the last.
    """
    speeds = {}
    contents = [json.loads(path.read_text(encoding="utf-8"))
                for path in sorted(pathlib.Path(root, "results").glob("benchmark_*.json"))]
    for content in sorted(contents, key=_weight):
        cores = {0: "", 1: " (1 core)"}.get(content["threads"], f" ({content['threads']} cores)")
        for row in content["rows"]:
            if row["contender"] != "jaxcifar" or row["kind"] != "step" or "error" in row:
                continue
            ratios = row["ratio_by_cpu_time"] or row["ratio"]  # no CPU time's on a GPU
            ratio = ratios.get("torch_eager")
            times = f", {ratio:.2f}x PyTorch" if ratio else ""
            speeds[row["model"]] = (f"{row['images_per_second']:,.0f} on {row['environment']['device']}"
                                    f"{cores}{times}")
    return speeds


def _weight(content):
    devices = {row["environment"]["device"] for row in content["rows"] if "environment" in row}
    return bool(devices - {"cpu"}), not content["threads"]
