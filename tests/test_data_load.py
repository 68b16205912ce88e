"""load: TFDS folders of any make, the decoded cache, messages, and the seeded split."""

import dataclasses
import errno
import json
import os
import pathlib
import struct
import subprocess
import sys
import textwrap

import data_fakes as fakes
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.core.constants

from jaxcifar import data
from jaxcifar.data import builders, folders, specs
from jaxcifar.data.prepare import prepare
from jaxcifar.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(params=["cifar10", "cifar100"])
def fake(request, monkeypatch, tmp_path):
    """(spec, splits, data_dir) of a small prepared data set of each kind."""
    return fakes.prepared(monkeypatch, tmp_path, request.param)


@pytest.fixture
def ten(monkeypatch, tmp_path):
    """(spec, splits, data_dir) of a small prepared cifar10."""
    return fakes.prepared(monkeypatch, tmp_path, "cifar10")


# ---- the TFDS folder -----------------------------------------------------------------------------


def test_dataset_fields(fake):
    spec, splits, root = fake
    loaded = data.load(spec.name, root)
    fakes.assert_holds(loaded, splits)
    assert loaded.name == spec.name
    assert loaded.class_names == spec.class_names
    assert loaded.num_classes == len(spec.class_names)
    assert loaded.train_images.dtype == loaded.test_images.dtype == np.uint8
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.name = "x"
    for array in (loaded.train_images, loaded.test_labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("reader", ["builder_from_directory", "data_source"])
def test_tfds_alone_reads_what_we_wrote(fake, reader):
    spec, splits, root = fake
    if reader == "data_source":
        source = tfds.data_source(spec.name, data_dir=root)
    else:
        source = tfds.builder_from_directory(root / spec.name / "3.0.2").as_data_source()
    assert set(source) == {"train", "test"}
    for split, arrays in splits.items():
        examples = list(source[split])
        assert len(examples) == len(arrays.labels)
        for example in examples:
            prefix, number = example["id"].decode().split("_")
            assert prefix == split and len(number) == 5
            np.testing.assert_array_equal(example["image"], arrays.images[int(number)])
            assert example["label"] == arrays.labels[int(number)]
            if spec.coarse_names:
                assert example["coarse_label"] == arrays.coarse_labels[int(number)]
    stored = [int(e["id"][-5:]) for e in source["train"]]
    assert stored != sorted(stored)  # TFDS's own shuffling, which load undoes


def test_features_and_files_are_the_official_ones(fake):
    spec, _, root = fake
    builder = tfds.builder_from_directory(root / spec.name / "3.0.2")
    label = tfds.features.ClassLabel(num_classes=spec.num_classes)
    official = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": label}
    if spec.coarse_names:
        official["coarse_label"] = tfds.features.ClassLabel(num_classes=20)
        assert builder.info.features["coarse_label"].names == list(spec.coarse_names)
    assert builder.info.features["label"].names == list(spec.class_names)
    expected = tfds.features.FeaturesDict(official)
    assert builder.info.features.to_json() == expected.to_json()
    assert builder.info.supervised_keys == ("image", "label")
    assert builder.info.full_name == f"{spec.name}/3.0.2"
    assert builder.info.file_format.value == "array_record"
    names = {p.name for p in (root / spec.name / "3.0.2").iterdir()}
    assert {f"{spec.name}-train.array_record-00000-of-00001", "dataset_info.json",
            "features.json", "label.labels.txt"} <= names


def to_tfrecord(root, name):
    """Turn a prepared array_record folder into what TFDS writes as tfrecord (same records)."""
    folder = root / name / "3.0.2"
    source = tfds.builder_from_directory(folder).as_data_source(
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    for split, records in source.items():
        with open(folder / f"{name}-{split}.tfrecord-00000-of-00001", "wb") as file:
            for record in records:
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
    for path in folder.glob("*.array_record*"):
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_a_tfrecord_folder_is_read_without_tensorflow(fake):
    spec, splits, root = fake
    folder = to_tfrecord(root, spec.name)
    fakes.assert_holds(data.load(spec.name, root), splits)
    assert "tensorflow" not in sys.modules
    path = folder / f"{spec.name}-test.tfrecord-00000-of-00001"
    whole = path.read_bytes()
    for cut in (5, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"{path.name}: truncated"):
            data.load(spec.name, root)


def test_an_unknown_file_format_says_what_to_do(ten):
    folder = to_tfrecord(ten[2], "cifar10")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "riegeli"}))
    with pytest.raises(UserError, match=r"riegeli.*prepare_data.py --dataset cifar10"):
        data.load("cifar10", ten[2])


def test_several_shards_and_a_newer_version(ten):
    """A folder that someone else prepared: other version number, more files, other record order."""
    spec, splits, root = ten

    class Other(builders.builder_of(spec), skip_registration=True):
        name = "cifar10"
        VERSION = tfds.core.Version("3.1.0")

    builder = Other(data_dir=root, file_format="array_record")
    builder.arrays = splits
    config = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=config)
    folder = folders.prepared_folder(spec, root)
    assert folder.name == "3.1.0"
    assert len(list(folder.glob("cifar10-train.array_record-*-of-00003"))) == 3
    fakes.assert_holds(data.load("cifar10", root), splits)


@pytest.mark.parametrize("damage", ["records", "missing shard", "no features", "info"])
def test_a_damaged_folder_is_named(ten, damage):
    _, _, root = ten
    fakes.drop_cache(root)
    folder = root / "cifar10" / "3.0.2"
    shard = next(folder.glob("cifar10-train.array_record*"))
    if damage == "records":
        content = bytearray(shard.read_bytes())
        third, half = len(content) // 3, len(content) // 2
        content[third:half] = bytes(half - third)
        shard.write_bytes(content)
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "no features":
        (folder / "features.json").write_text("{}")
    else:
        (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError) as caught:
        data.load("cifar10", root)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and "prepare" in message


def test_a_folder_with_other_content_is_refused(ten, monkeypatch):
    spec, splits, root = ten
    bigger = dataclasses.replace(spec, train_per_class=11)
    monkeypatch.setitem(specs.SPECS, "cifar10", bigger)
    with pytest.raises(UserError, match=r"3\.0\.2: .*train split holds 100 .*expected 110"):
        data.load("cifar10", root)
    darker = dataclasses.replace(spec, mean=(0.1, 0.1, 0.1))
    monkeypatch.setitem(specs.SPECS, "cifar10", darker)
    fakes.drop_cache(root)
    with pytest.raises(UserError, match="training mean"):
        data.load("cifar10", root)


# ---- places and messages -------------------------------------------------------------------------


def test_default_directory_is_the_one_of_tfds(monkeypatch, tmp_path):
    default = tensorflow_datasets.core.constants.get_default_data_dir
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "x"))
    for given in (None, ""):
        assert str(folders.resolve_data_dir(given)) == default() == str(tmp_path / "x")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert str(folders.resolve_data_dir(None)) == default()
    assert folders.resolve_data_dir("~/y") == pathlib.Path.home() / "y"


def test_tfds_data_dir_is_honoured(monkeypatch, tmp_path):
    spec, splits = fakes.install(monkeypatch, tmp_path)
    folder = prepare("cifar10", str(fakes.write_python(tmp_path, spec, splits)))
    assert folder == tmp_path / "home" / "tfds" / "cifar10" / "3.0.2"
    fakes.assert_holds(data.load("cifar10"), splits)


def test_not_prepared(monkeypatch, tmp_path):
    fakes.install(monkeypatch, tmp_path)
    with pytest.raises(UserError) as caught:
        data.load("cifar10", tmp_path / "out")
    message = str(caught.value)
    for words in (tmp_path / "out" / "cifar10" / "3.0.2", f"--data_dir {tmp_path / 'out'}",
                  "scripts/prepare_data.py --dataset cifar10", "configs/quickstart.py"):
        assert str(words) in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError) as caught:
        data.load("cifar10")
    assert "--data_dir" not in str(caught.value)


def test_unknown_names():
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        data.load("cifar-10")
    with pytest.raises(UserError, match="cifar10, cifar100, shapes32"):
        data.load("imagenet")


def test_shapes32_is_prepared_at_first_use(monkeypatch, tmp_path):
    fakes.install(monkeypatch, tmp_path, "shapes32")
    loaded = data.load("shapes32", tmp_path / "out")
    assert loaded.train_images.shape == (60, 32, 32, 3) and loaded.test_images.shape[0] == 30
    assert (tmp_path / "out" / "shapes32" / "1.0.0" / "dataset_info.json").exists()
    fakes.no_store(monkeypatch)
    again = data.load("shapes32", tmp_path / "out")
    np.testing.assert_array_equal(loaded.train_images, again.train_images)


def test_shapes32_in_an_unwritable_directory(monkeypatch, tmp_path):
    fakes.install(monkeypatch, tmp_path, "shapes32")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*in the way while preparing shapes32.*--data_dir"):
        data.load("shapes32", tmp_path / "file" / "x")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "ro"))

    monkeypatch.setattr(folders.tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=r"ro: not writable while preparing shapes32.*--data_dir"):
        data.load("shapes32", tmp_path / "ro")


_TWO = """
    import pathlib, sys
    sys.path[:0] = sys.argv[2:4]
    import pytest
    import data_fakes as fakes
    fakes.install(pytest.MonkeyPatch(), pathlib.Path(sys.argv[1]), "shapes32")
    from jaxcifar import data
    loaded = data.load("shapes32", sys.argv[1] + "/out")
    print(int(loaded.train_images.sum()), "tensorflow" in sys.modules,
          "tensorflow_datasets" in sys.modules)
"""


def _child(tmp_path):
    paths = [str(tmp_path), str(ROOT / "tests"), str(ROOT)]
    command = [sys.executable, "-c", textwrap.dedent(_TWO), *paths]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_without_tensorflow(tmp_path):
    """Two first starts at once give one dataset; a later one needs neither TensorFlow nor TFDS."""
    children = [_child(tmp_path) for _ in range(2)]
    results = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    (total, tensorflow), other = (out.split()[:2] for out, _ in results)
    assert [total, tensorflow] == other and tensorflow == "False"
    assert [err for _, err in results] == ["", ""]  # no noise from TFDS
    third = _child(tmp_path).communicate()
    assert third == (f"{total} False False\n", "")
    assert not list((tmp_path / "out").glob(".incomplete*"))


# ---- split_indices -------------------------------------------------------------------------------


def test_split_indices_is_a_seeded_permutation():
    train, val = data.split_indices(50000, 5000, seed=0)
    assert train.dtype == val.dtype == np.int32
    assert train.shape == (45000,) and val.shape == (5000,)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(50000))
    again = data.split_indices(50000, 5000, seed=0)
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(val, again[1])
    assert not np.array_equal(val, data.split_indices(50000, 5000, seed=1)[1])
    # frozen: these numbers must never change, or published runs would see other images
    assert data.split_indices(10, 3, seed=0)[0].tolist() == [2, 8, 4, 9, 1, 6, 7]
    assert data.split_indices(10, 3, seed=0)[1].tolist() == [3, 0, 5]


@pytest.mark.parametrize("val_size", [-1, 10, 11])
def test_split_indices_refuses(val_size):
    with pytest.raises(UserError, match="val_size is"):
        data.split_indices(10, val_size, seed=0)


def test_no_validation_set():
    train, val = data.split_indices(10, 0, seed=3)
    assert sorted(train.tolist()) == list(range(10)) and val.shape == (0,)
