"""A run of seconds: a small generated dataset and a small network, for tests of the whole loop."""

import atexit
import io
import shutil
import tempfile
import time

import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import train
from jaxcifar.data import Dataset

CACHE = tempfile.mkdtemp(prefix="jaxcifar_test_xla_")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def tiny_dataset(num_train=120, num_test=50, seed=0):
    """Return a Dataset of 10 classes whose first rows of pixels tell the class."""
    rng = np.random.default_rng(seed)

    def split(count):
        labels = rng.integers(0, 10, count).astype(np.int32)
        images = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        images[:, :8] = (labels * 25)[:, None, None, None]
        return images, labels

    return Dataset("cifar10", *split(num_train), *split(num_test),
                   tuple(f"class {i}" for i in range(10)))


def tiny_config(**fields):
    """Return a configuration for `tiny_dataset`: two epochs of a narrow ResNet with BatchNorm.

    Keyword arguments set fields, with __ for a dot: optimizer__name="adam".
    """
    config = config_lib.default()
    config.val_size = 20
    config.augment = "crop(4)|flip"
    config.model = config_lib.model("resnet5m", channels=(4, 8), blocks=(1, 1), stem_width=4,
                                    shortcut_kernel=1)
    config.epochs = 2
    config.batch_size = 32  # 100 examples: three full batches and one of 4
    config.eval_batch_size = 32
    config.optimizer.learning_rate = 0.02
    config.optimizer.momentum = 0.9
    config.precision = "highest"
    config.num_devices = 1
    config.compilation_cache = CACHE  # programs that several tests share compile once
    config.tensorboard = False
    for path, value in fields.items():
        *parents, name = path.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        target[name] = value
    return config


def fit(config, workdir, monkeypatch, dataset=None, **options):
    """Run train.fit on `tiny_dataset` quietly; return (Summary, rows without their timings)."""
    chosen = tiny_dataset() if dataset is None else dataset
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: chosen)
    summary = train.fit(config, workdir, stream=io.StringIO(), **options)
    return summary, rows(workdir)


def wait_for(path):
    """Wait until something in the background has written `path`; fail after a minute."""
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"no {path} in a minute")


def rows(workdir):
    """Return metrics.jsonl's rows without what depends on the clock."""
    from jaxcifar import run_folder
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "resumed_at")}
            for row in run_folder.read_rows(workdir)]
