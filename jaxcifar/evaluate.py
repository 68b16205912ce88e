"""Measure a trained run on a split of its dataset, every image exactly once:

    python -m jaxcifar.evaluate --workdir=runs/NAME                  # the test set
    python -m jaxcifar.evaluate --workdir=runs/NAME --split=val --flip --confusion

prints accuracy, loss and the classes with the lowest accuracy (ten at most), and writes them and all
classes to evaluation.json in the run folder, or where --out says; --confusion draws the confusion
matrix beside it. Nothing else in the folder is touched, and the run may be going on.
"""

import sys

import jax
import numpy as np
from tqdm import tqdm

from jaxcifar import command, environment, inference, metrics, run_folder
from jaxcifar.data import specs
from jaxcifar.report import plots

_TOP5_FROM = 100  # classes; of ten, five say little
_LISTED = 10  # classes that are printed, the worst first; evaluation.json has them all


def evaluate(workdir, *, split="test", checkpoint="selected", flip=False, out=None,
             confusion=False, say=print):
    """Measure a run on a split and write the result as JSON.

    Args:
      workdir: the run's folder. split: "test", "val" or "train" (not augmented). checkpoint: see
        `inference.load`. flip: see `inference.logits`. out: the JSON file; None is
        WORKDIR/evaluation.json. confusion: draw the confusion matrix to OUT's name with
        _confusion.png in place of its suffix. say: called with each line for the user.

    Returns:
      The content of the file, a dict; accuracies are in percent, the loss is the mean cross entropy
      (no label smoothing). Raises UserError.
    """
    trained = inference.load(workdir, checkpoint)
    out = run_folder.check_target(trained.workdir / "evaluation.json" if out is None else out)
    say(trained.description)
    images, labels = inference.split_arrays(trained, split)
    sums, matrix = measure(trained, images, labels, flip)
    result = _result(trained, split, checkpoint, flip, sums, matrix)
    run_folder.write_json(out, result)
    for line in _lines(result, trained):
        say(line)
    if confusion:
        picture = out.with_name(f"{out.stem}_confusion.png")
        view = f"epoch {trained.epoch}{', flip' if flip else ''}"
        plots.confusion_matrix(
            matrix, tuple(result["classes"]), picture,
            title=f"{trained.config.model.name} on {trained.config.dataset} {split} ({view})")
        say(f"wrote {picture}")
    say(f"wrote {out}")
    return result


def measure(trained, images, labels, flip):
    """Return (sums for metrics.finalize, confusion matrix int [num_classes, num_classes]).

    trained: inference.Trained. images: uint8 [n, 32, 32, 3]; labels: int32 [n]. Rows of the matrix
    are true classes, columns predictions.
    """
    classes, done, parts = trained.task.num_classes, 0, []
    matrix = np.zeros((classes, classes), np.int64)
    add = jax.jit(metrics.batch_sums, static_argnames="top5")
    batches = inference.batches_of(trained, images)
    with tqdm(total=len(images), desc="evaluating", unit=" images", disable=None,
              leave=False) as bar:
        for logits in inference.logits(trained, batches, flip=flip):
            true = np.asarray(labels[done:done + len(logits)])
            parts.append(jax.device_get(add(logits, true, top5=classes >= _TOP5_FROM)))
            np.add.at(matrix, (true, np.argmax(logits, axis=-1)), 1)
            done += len(logits)
            bar.update(len(logits))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts), matrix


def _result(trained, split, checkpoint, flip, sums, matrix):
    config = trained.config
    names = specs.get_spec(config.dataset).class_names
    counts, correct = matrix.sum(axis=1), matrix.diagonal()
    return {
        "dataset": config.dataset, "model": config.model.name, "split": split,
        "checkpoint": {"which": checkpoint, "epoch": trained.epoch, "step": trained.step,
                       "run_finished": trained.result is not None},
        "flip": flip, "images": int(counts.sum()),
        **{key.removeprefix(f"{split}_"): value
           for key, value in metrics.finalize(sums, split).items()},
        "classes": {name: {"accuracy": 100 * int(right) / int(count) if count else None,
                           "correct": int(right), "images": int(count)}
                    for name, right, count in zip(names, correct, counts, strict=True)},
        "seed": config.seed, "config_hash": trained.run_hash,
        "devices": {"kind": trained.devices.kind, "count": trained.devices.num_devices},
        "environment": environment.environment(),
    }


def _lines(result, trained):
    """Return what the user reads."""
    top5 = f", top-5 {result['accuracy_top5']:.2f}%" if "accuracy_top5" in result else ""
    yield (f"{result['dataset']} {result['split']}, {result['images']:,} images"
           f"{', mean over flips' if result['flip'] else ''}: accuracy {result['accuracy']:.2f}%"
           f"{top5}, loss {result['loss']:.4f}")
    there = trained.result
    selected = there and there["selection"]["epoch"] == trained.epoch
    if selected and result["split"] == "test" and not result["flip"]:
        same = abs(there["test_accuracy"] - result["accuracy"]) < 1e-9
        yield (f"result.json says {'the same' if same else 'otherwise'}: "
               f"{there['test_accuracy']:.2f}%, loss {there['test_loss']:.4f}")
    known = [item for item in result["classes"].items() if item[1]["images"]]
    worst = sorted(known, key=lambda item: item[1]["accuracy"])
    if len(worst) > _LISTED:
        yield f"the {_LISTED} worst of {len(worst)} classes:"
    width = max(len(name) for name, _ in worst[:_LISTED])
    for name, entry in worst[:_LISTED]:
        yield (f"  {name:<{width}} {entry['accuracy']:6.2f}%  ({entry['correct']:,} of "
               f"{entry['images']:,})")


def main(argv):
    """Evaluate as the command line `argv` says. Raises UserError."""
    parser = inference.Parser("python -m jaxcifar.evaluate", __doc__)
    parser.add_argument("--split", default="test", help="test (default), val or train")
    parser.add_argument("--out", help="the JSON file; default WORKDIR/evaluation.json")
    parser.add_argument("--confusion", action="store_true",
                        help="draw the confusion matrix beside the JSON file")
    given = parser.parse_args(argv[1:])
    evaluate(given.workdir, split=given.split, checkpoint=given.checkpoint, flip=given.flip,
             out=given.out, confusion=given.confusion)


if __name__ == "__main__":
    sys.exit(command.run(lambda: main(sys.argv)))
