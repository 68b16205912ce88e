"""What results/ says of each model: its best measured accuracy, and the speed of its training."""

import json
import pathlib
import statistics

from jaxcifar import models
from jaxcifar.report import parity_results, parity_rows


def accuracies(root):
    """Return {model: text}, the best mean test accuracy in results/ of the model as registered."""
    known, best = parity_rows.recipes(root), {}
    for name, content in parity_results.fresh(parity_results.read(root), known).items():
        config = known[name].config
        options = config.model.to_dict()
        model = options.pop("name")
        defaults = models.options(model)
        records = content["seeds"].values()
        if any(defaults[key] != value for key, value in options.items()):
            continue
        mean = statistics.mean(record["values"]["test_accuracy"] for record in records)
        epochs = max(record["epochs"] for record in records)
        on = "" if config.dataset == "cifar10" else ", CIFAR-100"
        text = f"{mean:.2f} ({epochs} epochs, {len(records)} seed{'s'[:len(records) > 1]}{on})"
        best[model] = max(best.get(model, (0, "")), (mean, text))
    return {model: text for model, (_, text) in best.items()}


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
