"""What one run shows a person: header, a grid of its training images, plots, the last line."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcifar import augment, features, models, partition, streams
from jaxcifar import config as config_lib
from jaxcifar.report import plots, published

_SAMPLES = 64


def header(run, programs, arrays):
    """Return what a run prints before it starts: a dict of label -> value."""
    task, devices, state = programs.task, programs.devices, run.state
    config = task.config
    count, kind = devices.num_devices, devices.devices[0].device_kind
    scope = "global batch" if config.bn_sync == "global" or count == 1 else "batch of each device"
    spans = {name: stop - first for name, (first, stop) in arrays.spans.items()}
    resumed = f", resumed after epoch {int(state.epoch)}" if run.resumed else ""
    return {
        "run": f"{run.workdir} (config {config_lib.config_hash(config)}, seed {config.seed}{resumed})",
        "model": f"{config.model.name}, {models.count_params(state.params):,} parameters",
        "device": f"{count} x {kind} ({devices.kind}), {jax.process_count()} process(es)",
        "dtype": f"{config.dtype}, parameters float32, matrix precision {config.precision}",
        "data": f"{config.dataset}: {task.num_train:,} train, {spans['val']:,} validation, "
                f"{spans['test']:,} test",
        "augmentation": augment.describe(config.augment),
        **({"evaluation": task.normalize.describe()} if task.normalize.operations else {}),
        **({"start": run.origin} if run.origin else {}),
        **({"frozen": frozen(task, state)} if config.trainable else {}),
        "batch": f"{config.batch_size} = {count} x {config.batch_size // count}; "
                 f"{task.steps_per_epoch} steps per epoch",
        "BatchNorm": f"statistics over the {scope}",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}, "
                     f"weight decay {config.optimizer.weight_decay:g}, {scheduled(task)}",
        "selection": config.selection.replace("_", " "),
    }


def scheduled(task):
    """Return what the schedule does to the learning rate: "cosine schedule, 0.0949 at the end"."""
    config = task.config
    text = f"{config.schedule.name} schedule"
    if config.schedule.name == "plateau":
        return f"{text} on {config.schedule.monitor}, {config.schedule.patience} epochs of patience"
    if config.schedule.name == "constant":
        return text
    steps = task.steps_per_epoch * config.epochs
    last = task.schedule(jnp.float32(config.optimizer.learning_rate), jnp.int32(steps - 1),
                         steps_per_epoch=task.steps_per_epoch, total_epochs=config.epochs)
    return f"{text}, {float(last):.3g} at the end"


def frozen(task, state):
    """Return lines on what is trained, what the frozen BatchNorms do, and where the features are."""
    config = task.config
    trained = partition.split(state.params, config.trainable)[0]
    why = features.obstacle(task)
    return [f"all but {models.count_params(trained):,} parameters (config.trainable = "
            f"{config.trainable!r})",
            f"frozen BatchNorms use their {config.frozen_batch_norm} statistics",
            f"features are computed in every step: {why}" if why else
            "features are computed once, and the head is trained on them"]


def samples(task, state, arrays, workdir):
    """Draw samples.png: 64 training images as the network sees them in the coming epoch.

    They are the first 64 of the training set; each is augmented with a key of its own, and shown
    with the normalisation undone.
    """
    count = min(_SAMPLES, task.num_train)

    @jax.jit  # with the keys, each of whose operations would be a program to compile
    def augmented(images, labels, seed, epoch):
        keys = streams.example_keys(streams.stream_key(seed, "augment", epoch), jnp.arange(count))
        return task.augment(images, labels, keys, streams.stream_key(seed, "mix", epoch))

    images, targets = augmented(arrays.train["images"][:count], arrays.train["labels"][:count],
                                state.seed, state.epoch)
    config = task.config
    images = np.asarray(images, np.float32) * np.asarray(config.std) + np.asarray(config.mean)
    plots.samples(images, np.asarray(targets), arrays.class_names, workdir / "samples.png",
                  title=f"{config.dataset}, augmented: {config.augment or 'no augmentation'}")


def write_plots(workdir, config, rows, confusion, class_names):
    """Draw curves.png (with the published curve, where the configuration names one) and
    confusion_matrix.png of the test set."""
    reference = published.reported_curve(config.reference_curve) if config.reference_curve else None
    plots.curves(rows, workdir / "curves.png", title=f"{config.model.name} on {config.dataset}",
                 reference=reference)
    plots.confusion_matrix(confusion, class_names, workdir / "confusion_matrix.png",
                           title=f"{config.model.name} on the {config.dataset} test set")


def closing_line(result, workdir):
    """Return the line that a run ends with."""
    chosen = result["selection"]
    warning = ", where the test set had a say" if chosen["uses_test_set"] else ""
    return (f"test accuracy {result['test_accuracy']:.2f}%, loss {result['test_loss']:.4f} "
            f"(epoch {chosen['epoch']}, rule: {chosen['rule'].replace('_', ' ')}{warning}); "
            f"compile {result['seconds']['compile']:.1f} s, epochs {result['seconds']['epochs']:.1f} s; "
            f"see {workdir}")
