"""The decoded cache: used, rebuilt, repaired, and done without."""

import errno
import os

import data_fakes as fakes
import numpy as np
import pytest

from jaxcifar import data
from jaxcifar.data import cache, folders
from jaxcifar.data.prepare import prepare


@pytest.fixture(params=["cifar10", "cifar100"])
def fake(request, monkeypatch, tmp_path):
    """(spec, splits, data_dir) of a small prepared data set of each kind."""
    return fakes.prepared(monkeypatch, tmp_path, request.param)


@pytest.fixture
def ten(monkeypatch, tmp_path):
    """(spec, splits, data_dir) of a small prepared cifar10."""
    return fakes.prepared(monkeypatch, tmp_path, "cifar10")


def test_the_second_load_maps_the_cache(fake, monkeypatch):
    spec, splits, root = fake
    fakes.drop_cache(root)
    first = data.load(spec.name, root)
    fakes.no_store(monkeypatch)
    second = data.load(spec.name, root)
    fakes.assert_holds(first, splits)
    fakes.assert_holds(second, splits)
    assert isinstance(second.train_images, np.memmap) and isinstance(second.test_images, np.memmap)


def test_preparation_leaves_the_cache_ready(ten, monkeypatch):
    fakes.no_store(monkeypatch)
    fakes.assert_holds(data.load("cifar10", ten[2]), ten[1])


def test_the_cache_of_a_folder_that_was_prepared_again_is_rebuilt(ten, tmp_path, monkeypatch):
    _, _, root = ten
    old = [p.name for p in (root / cache.CACHE_FOLDER).glob("cifar10-*")]
    other = root / cache.CACHE_FOLDER / "cifar10-small-0123456789abcdef"
    other.mkdir()
    for path in (root / "cifar10" / "3.0.2").iterdir():
        path.unlink()
    (root / "cifar10" / "3.0.2").rmdir()
    spec, splits = fakes.install(monkeypatch, tmp_path, seed=1)
    prepare("cifar10", str(fakes.write_binary(tmp_path, spec, splits)), root)
    fakes.assert_holds(data.load("cifar10", root), splits)
    assert other.is_dir(), "that of another data set"
    other.rmdir()
    new = [p.name for p in (root / cache.CACHE_FOLDER).glob("cifar10-*")]
    assert len(old) == len(new) == 1 and old != new


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "labels", "dtype"])
def test_a_damaged_cache_is_made_again(ten, monkeypatch, damage):
    spec, splits, root = ten
    (folder,) = (root / cache.CACHE_FOLDER).glob("cifar10-*")
    images, labels = folder / "train_images.npy", folder / "test_labels.npy"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
    elif damage == "empty":
        images.write_bytes(b"")
    elif damage == "missing":
        images.unlink()
    elif damage == "labels":
        np.save(labels, np.zeros(40, np.int32))
    else:
        np.save(labels, np.load(labels).astype(np.int64))
    fakes.assert_holds(data.load("cifar10", root), splits)
    fakes.no_store(monkeypatch)
    fakes.assert_holds(data.load("cifar10", root), splits)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_without_a_writable_cache_the_data_still_loads(ten, monkeypatch, number):
    spec, splits, root = ten
    fakes.drop_cache(root)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache, "_save", refuse)
    fakes.assert_holds(data.load("cifar10", root), splits)
    assert not list((root / cache.CACHE_FOLDER).glob("cifar10-*"))
    assert not list((root / cache.CACHE_FOLDER).glob(".incomplete*"))


def test_another_process_that_writes_the_cache_is_not_waited_for(ten):
    """While another process writes the cache, this one goes on with its own arrays."""
    spec, splits, root = ten
    fakes.drop_cache(root)
    with folders.dataset_lock(root / cache.CACHE_FOLDER, "cifar10"):
        fakes.assert_holds(data.load("cifar10", root), splits)
        assert not list((root / cache.CACHE_FOLDER).glob("cifar10-*"))
    data.load("cifar10", root)
    assert len(list((root / cache.CACHE_FOLDER).glob("cifar10-*"))) == 1
