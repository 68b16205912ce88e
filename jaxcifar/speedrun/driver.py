"""N speedruns in one process: accuracies, seconds, versions."""

import pathlib
import sys

import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import data, host, logs, parallel, run_folder, seeds, train as train_lib
from jaxcifar.environment import environment
from jaxcifar.errors import UserError
from jaxcifar.speedrun import rival as rival_lib
from jaxcifar.speedrun import training
from jaxcifar.speedrun.trainer import Trainer

TIMING = (
    "seconds: initialisation, whitening, order and every training step, from the call to its end; "
    "seconds_with_evaluation: and the test images under test-time augmentation, as the published "
    "marks count. Apart: loading, the transfer to the device, compilation and one warm-up run.")
RIVAL = (
    "The same algorithm in PyTorch, in a process of its own after our runs, on the same arrays, "
    "with as many seeds: jaxcifar.speedrun.torch_rival. Timed as the published scripts are, by CUDA "
    "events: whitening, training, evaluation under test-time augmentation. Apart: drawing the "
    "weights, and the warm-up run, which compiles.")
_MEASURED = ("accuracy", "accuracy_tta", "seconds", "seconds_with_evaluation")


def run(config, runs, *, name, out="", rival=False, rival_compile="auto", stream=None):
    """Train `runs` networks with the seeds 0 to runs - 1, and print a line of each, and the sums.

    Args:
      config: configuration whose speedrun.epochs is above 0. runs: int, 1 or more. name: of the
        configuration, for the output, such as "speedrun_94". out: folder for NAME_DEVICE.json; ""
        writes none. rival: then train as many in PyTorch. rival_compile: mode of its torch.compile,
        "off", or "auto" (torch_rival.COMPILE_MODES). stream: for the lines; sys.stdout if None.

    Returns:
      what the file holds: dict of "runs" (a list), "accuracy", "accuracy_tta" (percent), "seconds",
      "seconds_with_evaluation" (each seeds.statistics), "apart_seconds", "environment", ...; with
      a rival, "rival" has the same of it, and "rival_over_ours" the ratio of its seconds to ours.
      The file is written before the rival starts, after each of its runs, and at the end.

    Raises:
      UserError: a configuration that is no speedrun, or has no rival; data that are not there; a
        rival that fails (what was measured until then is written).
    """
    watch = logs.Stopwatch()

    def say(text):
        print(text, file=sys.stdout if stream is None else stream, flush=True)

    training.check(config)
    if rival:
        rival_lib.check(config)
        host.share_device_memory()
    if out:
        run_folder.make(out)
    trainer, train, test, dataset = prepare(config, watch)
    prepared, platform = trainer.run, trainer.devices.devices[0].platform
    spec = rival and rival_lib.specification(prepared, runs=runs, platform=platform,
                                             compile_mode=rival_compile)
    with watch.section("compile"):
        trainer.compile(train, test)
    if trainer.rolled:
        with watch.section("warm-up"):
            trainer.evaluate(trainer.train(runs, train), test)
    say(_header(name, prepared, trainer, watch.sections))
    content = _content(name, config, prepared, watch.sections)
    for seed in range(runs):
        content["runs"].append(_one(trainer, seed, train, test, say))
        content.update(_statistics(content["runs"]))
        path = _write(content, out)  # after each run, so that what ends the process loses one
    say(_summary(content))
    if rival:
        _measure_rival(spec, dataset, content, out, say)
    if path:
        say(f"wrote {path}")
    return content


def prepare(config, watch):
    """Return (Trainer, nothing compiled; training and test (images, labels) there; data.Dataset).

    watch: logs.Stopwatch, whose sections "data" and "transfer" get their seconds.
    """
    train_lib.configure_jax(config)
    devices = parallel.create(config)
    with watch.section("data"):
        dataset = data.load(config.dataset, config.data_dir)
    run = training.create(config, len(dataset.train_labels), dataset.num_classes)
    with watch.section("transfer"):
        train, test = devices.replicate(_splits(dataset))
    rolled = devices.devices[0].platform != "cpu"
    return Trainer(run, devices, rolled=rolled), train, test, dataset


def _measure_rival(spec, dataset, content, out, say):
    """Run the rival and add it to `content`, which is written after each of its runs."""
    found = content["rival"] = {"timing": RIVAL, "runs": []}
    say("\nthe same in PyTorch, which compiles and warms up first")

    def ready(message):
        apart = message["ready"]
        found.update(apart, environment=message["environment"])
        say(f"torch.compile: {apart['compile']}; before the runs, and not in their times: "
            f"{apart['warm_up_seconds']:.1f} s" + "".join(
                f"\nfailed before: {text}" for text in apart["failed"]))

    def row(measured):
        found["runs"].append(measured)
        found.update(_statistics(found["runs"]))
        content["rival_over_ours"] = {
            key: found[key]["mean"] / content[key]["mean"]
            for key in ("seconds", "seconds_with_evaluation")}
        say(_line(measured))
        _write(content, out)

    try:
        rival_lib.measure(spec, dataset, ready=ready, row=row)
    except UserError as error:
        found["error"] = str(error)
        _write(content, out)
        raise
    ratio = content["rival_over_ours"]
    versions = found["environment"]
    say(f"{_means(found)}\n{versions['device']}, torch {versions['torch']}, cuda "
        f"{versions['cuda']}, {versions['dtype']}\n"
        f"ours:  {_means(content)}\n"
        f"PyTorch's seconds over ours: training {ratio['seconds']:.3f}, with evaluation "
        f"{ratio['seconds_with_evaluation']:.3f}")


def _write(content, out):
    """Write NAME_DEVICE.json into the folder `out`; return its path, None for out = ""."""
    if not out:
        return None
    path = pathlib.Path(out) / f"{content['name']}_{_slug(content['environment'])}.json"
    run_folder.write_json(path, content)
    return path


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
    say(_line(row))
    return row


def _line(row):
    return (f"{row['seed']:>4}  {row['accuracy']:>12.2f}%  {row['accuracy_tta']:>8.2f}%  "
            f"{row['seconds']:>9.3f} s  {row['seconds_with_evaluation']:>15.3f} s")


def _statistics(rows):
    return {key: seeds.statistics([row[key] for row in rows]) for key in _MEASURED}


def _content(name, config, prepared, sections):
    """Return what the result file says but for the runs and their statistics, which come one by one."""
    return {
        "name": name, "config_hash": config_lib.config_hash(config), "steps": prepared.total_steps,
        **dict.fromkeys(_MEASURED),  # here in the file, filled by `_statistics`
        "apart_seconds": sections, "timing": TIMING, "environment": environment(), "runs": [],
        "config": config_lib.to_dict(config)}


def _header(name, prepared, trainer, sections):
    config = prepared.config
    apart = ", ".join(f"{key} {value:.1f} s" for key, value in sections.items())
    form = "one program" if trainer.rolled else "a loop over steps, as always on CPU"
    chosen = "" if prepared.proxy is None else (
        f", of which a proxy chooses {prepared.keep}")
    return (f"{name}: {prepared.total_steps} steps of {config.batch_size} images{chosen} "
            f"({config.speedrun.epochs:g} epochs), {form}\n"
            f"before the runs, and not in their times: {apart}\n"
            "seed  test accuracy  with TTA     training  with evaluation")


def _means(found):
    """Return "mean of N run(s): ..." of what `_statistics` found."""
    def text(key, template):
        spread = "" if found[key]["std"] is None else " (std " + template.format(
            found[key]["std"]) + ")"
        return template.format(found[key]["mean"]) + spread

    return (f"mean of {len(found['runs'])} run(s): {text('accuracy', '{:.3f}')}%, with TTA "
            f"{text('accuracy_tta', '{:.3f}')}%; training {text('seconds', '{:.3f}')} s, with "
            f"evaluation {text('seconds_with_evaluation', '{:.3f}')} s")


def _summary(content):
    versions = content["environment"]
    return (f"{_means(content)}\n"
            f"{versions['device']}, jax {versions['jax']}, jaxlib {versions['jaxlib']}, flax "
            f"{versions['flax']}, python {versions['python']}")


def _slug(versions):
    return "cpu" if versions["platform"] == "cpu" else "-".join(versions["device"].lower().split())
