"""N speedruns in one process: accuracies, seconds, versions."""

import pathlib
import sys

import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import data, logs, parallel, run_folder, seeds, train as train_lib
from jaxcifar.environment import environment
from jaxcifar.speedrun import training
from jaxcifar.speedrun.trainer import Trainer

TIMING = (
    "seconds: initialisation, whitening, order and every training step, from the call to its end; "
    "seconds_with_evaluation: and the test images under test-time augmentation, as the published "
    "marks count. Apart: loading, the transfer to the device, compilation and one warm-up run.")


def run(config, runs, *, name, out="", stream=None):
    """Train `runs` networks with the seeds 0 to runs - 1, and print a line of each, and the sums.

    Args:
      config: configuration whose speedrun.epochs is above 0. runs: int, 1 or more. name: of the
        configuration, for the output, such as "speedrun_94". out: folder for NAME_DEVICE.json; ""
        writes none. stream: for the lines; sys.stdout if None.

    Returns:
      what the file holds: dict of "runs" (a list), "accuracy", "accuracy_tta" (percent), "seconds",
      "seconds_with_evaluation" (each seeds.statistics), "apart_seconds", "environment", ...

    Raises:
      UserError: a configuration that is no speedrun, or data that are not there.
    """
    watch = logs.Stopwatch()

    def say(text):
        print(text, file=sys.stdout if stream is None else stream, flush=True)

    training.check(config)
    train_lib.configure_jax(config)
    devices = parallel.create(config)
    with watch.section("data"):
        dataset = data.load(config.dataset, config.data_dir)
    prepared = training.create(config, len(dataset.train_labels), dataset.num_classes)
    with watch.section("transfer"):
        train, test = devices.replicate(_splits(dataset))
    trainer = Trainer(prepared, devices, rolled=devices.devices[0].platform != "cpu")
    with watch.section("compile"):
        trainer.compile(train, test)
    if trainer.rolled:
        with watch.section("warm-up"):
            trainer.evaluate(trainer.train(runs, train), test)
    say(_header(name, prepared, trainer, watch.sections))
    rows = [_one(trainer, seed, train, test, say) for seed in range(runs)]
    content = _content(name, config, prepared, rows, watch.sections)
    say(_summary(content))
    if out:
        path = pathlib.Path(out) / f"{name}_{_slug(content['environment'])}.json"
        with run_folder.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, content)
        say(f"wrote {path}")
    return content


def _splits(dataset):
    return tuple((np.asarray(images), np.asarray(labels)) for images, labels in (
        (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)))


def _one(trainer, seed, train, test, say):
    """Train and evaluate one network; return its row."""
    watch = logs.Stopwatch()
    variables = trainer.train(seed, train)
    seconds = watch.seconds()
    accuracies = trainer.evaluate(variables, test)
    row = {"seed": seed, **accuracies, "seconds": seconds,
           "seconds_with_evaluation": watch.seconds()}
    say(f"{seed:>4}  {row['accuracy']:>12.2f}%  {row['accuracy_tta']:>8.2f}%  {seconds:>9.3f} s  "
        f"{row['seconds_with_evaluation']:>15.3f} s")
    return row


def _content(name, config, prepared, rows, sections):
    measured = ("accuracy", "accuracy_tta", "seconds", "seconds_with_evaluation")
    return {
        "name": name, "config_hash": config_lib.config_hash(config), "steps": prepared.total_steps,
        **{key: seeds.statistics([row[key] for row in rows]) for key in measured},
        "apart_seconds": sections, "timing": TIMING, "environment": environment(), "runs": rows,
        "config": config_lib.to_dict(config)}


def _header(name, prepared, trainer, sections):
    config = prepared.config
    apart = ", ".join(f"{key} {value:.1f} s" for key, value in sections.items())
    form = "one program" if trainer.rolled else "a loop over steps, as always on CPU"
    return (f"{name}: {prepared.total_steps} steps of {config.batch_size} images "
            f"({config.speedrun.epochs:g} epochs), {form}\n"
            f"before the runs, and not in their times: {apart}\n"
            "seed  test accuracy  with TTA     training  with evaluation")


def _summary(content):
    def text(key, template):
        found = content[key]
        spread = "" if found["std"] is None else " (std " + template.format(found["std"]) + ")"
        return template.format(found["mean"]) + spread

    versions = content["environment"]
    return (f"mean of {len(content['runs'])} run(s): {text('accuracy', '{:.3f}')}%, with TTA "
            f"{text('accuracy_tta', '{:.3f}')}%; training {text('seconds', '{:.3f}')} s, with "
            f"evaluation {text('seconds_with_evaluation', '{:.3f}')} s\n"
            f"{versions['device']}, jax {versions['jax']}, jaxlib {versions['jaxlib']}, flax "
            f"{versions['flax']}, python {versions['python']}")


def _slug(versions):
    return "cpu" if versions["platform"] == "cpu" else "-".join(versions["device"].lower().split())
