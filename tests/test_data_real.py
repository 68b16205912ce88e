"""The real CIFAR files, where the variable JAXCIFAR_CIFAR names the folder around them."""

import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxcifar import data
from jaxcifar.data import cache, prepare, specs

FOLDER = os.environ.get("JAXCIFAR_CIFAR", "")
ROOT = pathlib.Path(__file__).resolve().parent.parent
needs_cifar = pytest.mark.skipif(
    not FOLDER, reason="JAXCIFAR_CIFAR does not name a folder with cifar-10-batches-py"
)

_SECOND_START = """
import sys, time
start = time.perf_counter()
from jaxcifar import data
loaded = data.load("cifar10", sys.argv[1])
first_pixels = int(loaded.train_images[0].sum()) + int(loaded.test_images[-1].sum())
seconds = time.perf_counter() - start
print(seconds, "tensorflow" in sys.modules, "tensorflow_datasets" in sys.modules)
"""


@needs_cifar
def test_cifar10_from_folder_to_second_start(tmp_path, capsys):
    """Prepare, decode, map: the arrays are those of the official files, in their order."""
    seconds = {}
    try:
        start = time.perf_counter()
        folder = prepare.prepare("cifar10", FOLDER, tmp_path)
        seconds["prepare"] = time.perf_counter() - start
        shutil.rmtree(tmp_path / cache.CACHE_FOLDER)
        start = time.perf_counter()
        decoded = data.load("cifar10", tmp_path)
        seconds["first load"] = time.perf_counter() - start
        start = time.perf_counter()
        mapped = data.load("cifar10", tmp_path)
        seconds["second load"] = time.perf_counter() - start
        second_start = subprocess.run(
            [sys.executable, "-c", _SECOND_START, str(tmp_path)], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
        ).stdout.split()
        seconds["second start, imports included"] = float(second_start[0])
        assert folder == tmp_path / "cifar10" / "3.0.2"
        for i in range(1, 6):
            path = pathlib.Path(FOLDER) / "cifar-10-batches-py" / f"data_batch_{i}"
            batch = pickle.loads(path.read_bytes(), encoding="bytes")
            rows = slice(10_000 * (i - 1), 10_000 * i)
            images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            np.testing.assert_array_equal(decoded.train_images[rows], images)
            np.testing.assert_array_equal(mapped.train_images[rows], images)
            np.testing.assert_array_equal(decoded.train_labels[rows], batch[b"labels"])
        np.testing.assert_array_equal(decoded.test_images, mapped.test_images)
        np.testing.assert_array_equal(decoded.test_labels, mapped.test_labels)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)  # pytest would keep 350 MB for three runs
    with capsys.disabled():
        print("\ncifar10:", ", ".join(f"{name} {s:.3f} s" for name, s in seconds.items()))
    assert second_start[1:] == ["False", "False"]
    assert isinstance(mapped.train_images, np.memmap) and isinstance(mapped.test_images, np.memmap)


@needs_cifar
def test_cifar100_files_are_what_the_spec_says():
    splits = prepare.read_source(specs.CIFAR100, pathlib.Path(FOLDER))
    assert splits["train"].images.shape == (50_000, 32, 32, 3)
    assert splits["test"].images.shape == (10_000, 32, 32, 3)
    mean = splits["train"].images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, [0.50708, 0.48655, 0.44092], atol=1e-5)


def test_specs_are_the_published_numbers():
    """Counts and names as the CIFAR page and TFDS's catalogue state them."""
    ten, hundred = specs.CIFAR10, specs.CIFAR100
    assert [ten.count(s) for s in specs.SPLITS] == [hundred.count(s) for s in specs.SPLITS]
    assert [ten.count(s) for s in specs.SPLITS] == [50_000, 10_000]
    assert (ten.train_per_class, ten.test_per_class) == (5000, 1000)
    assert (hundred.train_per_class, hundred.test_per_class) == (500, 100)
    assert (ten.num_classes, hundred.num_classes, len(hundred.coarse_names)) == (10, 100, 20)
    assert ten.class_names[:2] == ("airplane", "automobile") and ten.class_names[9] == "truck"
    assert hundred.class_names[:2] == ("apple", "aquarium_fish")
    assert hundred.class_names[99] == "worm"
    assert hundred.coarse_of_class[:10] == (4, 1, 14, 8, 0, 6, 7, 7, 18, 3)
    assert np.bincount(hundred.coarse_of_class).tolist() == [5] * 20
    assert ten.version == hundred.version == "3.0.2"
