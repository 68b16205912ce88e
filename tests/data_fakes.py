"""Small stand-ins for the CIFAR files: the same layouts, a few images per class.

The specs are the real ones with smaller counts, other checksums and another mean, so the code under
test is the code that handles the real data.
"""

import dataclasses
import hashlib
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxcifar import data
from jaxcifar.data import cache, specs
from jaxcifar.errors import UserError

PER_CLASS = {"cifar10": (10, 4), "cifar100": (2, 1), "shapes32": (6, 3)}


def fake_splits(spec, seed=0):
    """Return {"train": SplitArrays, "test": SplitArrays} of random images in random order."""
    rng = np.random.default_rng(seed)
    splits = {}
    for split in specs.SPLITS:
        labels = rng.permutation(np.repeat(np.arange(spec.num_classes), spec.per_class(split)))
        images = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
        coarse = None
        if spec.coarse_names:
            coarse = np.asarray(spec.coarse_of_class, np.int32)[labels]
        splits[split] = specs.SplitArrays(images, labels.astype(np.int32), coarse)
    return splits


def install(monkeypatch, tmp_path, name="cifar10", seed=0):
    """Make `name` a small dataset, hide the user's own folders; return (spec, splits)."""
    train, test = PER_CLASS[name]
    spec = dataclasses.replace(
        specs.SPECS[name], train_per_class=train, test_per_class=test, mean=None
    )
    splits = fake_splits(spec, seed)
    if specs.SPECS[name].mean is not None:
        mean = splits["train"].images.mean(axis=(0, 1, 2)) / 255
        spec = dataclasses.replace(spec, mean=tuple(float(m) for m in mean))
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TFDS_DATA_DIR", str(home / "tfds"))
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.chdir(home)
    monkeypatch.setitem(specs.SPECS, name, spec)
    return spec, splits


def _planar(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def _files(spec, splits):
    """Yield (file name, images, labels, coarse labels): the training files, then the test file."""
    for split, names in (("train", spec.train_files), ("test", spec.test_files)):
        s = splits[split]
        parts = np.array_split(np.arange(len(s.labels)), len(names))
        for name, part in zip(names, parts, strict=True):
            coarse = None if s.coarse_labels is None else s.coarse_labels[part]
            yield name, s.images[part], s.labels[part], coarse


def write_python(root, spec, splits):
    """Write root/cifar-10-batches-py (or cifar-100-python); return the folder."""
    folder = root / spec.archives[0].folder
    folder.mkdir(parents=True)
    for name, images, labels, coarse in _files(spec, splits):
        batch = {b"batch_label": b"x", b"data": _planar(images), b"filenames": [b"a"] * len(labels)}
        if coarse is None:
            batch[b"labels"] = labels.tolist()
        else:
            batch |= {b"fine_labels": labels.tolist(), b"coarse_labels": coarse.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [n.encode() for n in spec.class_names]
    if spec.coarse_names:
        coarse_names = [n.encode() for n in spec.coarse_names]
        meta = {b"fine_label_names": names, b"coarse_label_names": coarse_names}
        (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    else:
        (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    return folder


def write_binary(root, spec, splits):
    """Write root/cifar-10-batches-bin (or cifar-100-binary); return the folder."""
    folder = root / spec.archives[1].folder
    folder.mkdir(parents=True)
    for name, images, labels, coarse in _files(spec, splits):
        columns = [labels[:, None]] if coarse is None else [coarse[:, None], labels[:, None]]
        rows = np.concatenate([*columns, _planar(images)], axis=1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    name = "fine_label_names.txt" if spec.coarse_names else "batches.meta.txt"
    (folder / name).write_text("\n".join(spec.class_names) + "\n\n")
    return folder


def write_images(root, spec, splits):
    """Write root/train/<class>/*.png and root/test/<class>/*.png; return root."""
    for split, s in splits.items():
        for i, (image, label) in enumerate(zip(s.images, s.labels, strict=True)):
            folder = root / split / spec.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:04d}.png")
    return root


def write_archive(monkeypatch, root, spec, folder, index=0):
    """Pack `folder` as the official archive `index`, and make its md5 and size the official ones.

    Returns (path, spec); the spec replaces the installed one.
    """
    path = root / spec.archives[index].file_name
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    data = path.read_bytes()
    archives = list(spec.archives)
    archives[index] = dataclasses.replace(
        archives[index], md5=hashlib.md5(data).hexdigest(), num_bytes=len(data)
    )
    spec = dataclasses.replace(spec, archives=tuple(archives))
    monkeypatch.setitem(specs.SPECS, spec.name, spec)
    return path, spec


def assert_holds(dataset, splits):
    """Assert that a loaded Dataset holds these arrays, in this order."""
    np.testing.assert_array_equal(dataset.train_images, splits["train"].images)
    np.testing.assert_array_equal(dataset.train_labels, splits["train"].labels)
    np.testing.assert_array_equal(dataset.test_images, splits["test"].images)
    np.testing.assert_array_equal(dataset.test_labels, splits["test"].labels)
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32


def leftovers(root):
    """Everything below root but locks."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix != ".lock")


def refuses(name, source, root, *words):
    """Assert one line with these words, and that nothing is left that looks prepared."""
    from jaxcifar.data import prepare  # not above: imports tensorflow_datasets

    with pytest.raises(UserError) as caught:
        prepare.prepare(name, str(source), root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    assert leftovers(root) == []
    with pytest.raises(UserError, match="not prepared"):
        data.load(name, root)
    return message


def prepared(monkeypatch, tmp_path, name):
    """Prepare a small dataset in tmp_path/out; return (spec, splits, data_dir)."""
    from jaxcifar.data import prepare  # not above: imports tensorflow_datasets

    spec, splits = install(monkeypatch, tmp_path, name)
    prepare.prepare(name, str(write_python(tmp_path, spec, splits)), tmp_path / "out")
    return spec, splits, tmp_path / "out"


def drop_cache(root):
    """Delete the decoded caches below root."""
    for path in (root / cache.CACHE_FOLDER).glob("*-*/*"):
        path.unlink()
        if not list(path.parent.iterdir()):
            path.parent.rmdir()


def no_store(monkeypatch):
    """Fail the test if anything is decoded."""
    from jaxcifar.data import store  # not above: imports tensorflow_datasets

    monkeypatch.setattr(store, "read", lambda *a: pytest.fail("the cache must be used"))
