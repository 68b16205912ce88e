"""Every source gives the same TFDS folder; every defect gives one clear error and no folder."""

import dataclasses
import errno
import os
import pathlib
import pickle
import subprocess
import sys

import data_fakes as fakes
import numpy as np
import pytest
from PIL import Image

from jaxcifar import data
from jaxcifar.data import download, folders, prepare, specs, store
from jaxcifar.data.prepare import prepare as run
from jaxcifar.errors import UserError


@pytest.fixture(params=["cifar10", "cifar100"])
def fake(request, monkeypatch, tmp_path):
    """(spec, splits) of a small data set of each kind."""
    return fakes.install(monkeypatch, tmp_path, request.param)


@pytest.fixture
def ten(monkeypatch, tmp_path):
    """(spec, splits) of a small cifar10."""
    return fakes.install(monkeypatch, tmp_path)


@pytest.mark.parametrize("kind", ["python", "binary"])
@pytest.mark.parametrize("form", ["folder", "parent", "archive", "archive in folder"])
def test_official_files_in_every_form(fake, tmp_path, monkeypatch, kind, form):
    spec, splits = fake
    index = ["python", "binary"].index(kind)
    folder = [fakes.write_python, fakes.write_binary][index](tmp_path / "src", spec, splits)
    source = folder if form == "folder" else folder.parent
    if form.startswith("archive"):
        (tmp_path / "dl").mkdir()
        path, spec = fakes.write_archive(monkeypatch, tmp_path / "dl", spec, folder, index)
        source = path if form == "archive" else path.parent
    lines = []
    prepared = run(spec.name, str(source), tmp_path / "out", say=lines.append)
    assert prepared == tmp_path / "out" / spec.name / "3.0.2"
    assert str(source) in lines[0] and str(prepared) in lines[-1]
    fakes.assert_holds(data.load(spec.name, tmp_path / "out"), splits)
    assert not list((tmp_path / "out").glob(".incomplete*"))


def test_image_folders(fake, tmp_path):
    spec, splits = fake
    source = fakes.write_images(tmp_path / "images", spec, splits)
    run(spec.name, str(source), tmp_path / "out")
    loaded = data.load(spec.name, tmp_path / "out")
    order = {s: np.argsort(splits[s].labels, kind="stable") for s in splits}
    in_order = {
        s: specs.SplitArrays(splits[s].images[order[s]], splits[s].labels[order[s]]) for s in splits
    }
    fakes.assert_holds(loaded, in_order)


def test_a_second_preparation_changes_nothing(ten, tmp_path):
    spec, splits = ten
    source = fakes.write_python(tmp_path, spec, splits)
    folder = run("cifar10", str(source), tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    lines = []
    assert run("cifar10", "no such file", tmp_path / "out", say=lines.append) == folder
    assert "prepared already" in lines[0]
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


@pytest.mark.parametrize("place", [
    "home/data", "home/home/data", "home/.keras/datasets", "home/tfds/downloads/extracted/X",
    "home/.keras/datasets/cifar-10-batches-py-target",
])
def test_auto_looks_where_other_libraries_keep_theirs(ten, tmp_path, monkeypatch, place):
    spec, splits = ten
    if place.startswith("home/home"):  # not below the working directory
        place = place.removeprefix("home/")
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
    fakes.write_python(tmp_path / place, spec, splits)
    with pytest.raises(UserError, match="cifar-10-batches-py"):  # load says that it is there
        data.load("cifar10", tmp_path / "out")
    run("cifar10", "auto", tmp_path / "out")
    fakes.assert_holds(data.load("cifar10", tmp_path / "out"), splits)


def test_auto_passes_over_a_damaged_copy(ten, tmp_path, monkeypatch):
    spec, splits = ten
    good = fakes.write_binary(tmp_path / "home" / "datasets", spec, splits)
    bad = fakes.write_python(tmp_path / "home" / "data", spec, splits)
    (bad / "data_batch_3").unlink()
    monkeypatch.setattr(download, "fetch", lambda *a: pytest.fail("must not download"))
    lines = []
    run("cifar10", "auto", tmp_path / "out", say=lines.append)
    assert any("not usable" in line and "data_batch_3" in line for line in lines)
    assert any(good.name in line for line in lines)
    fakes.assert_holds(data.load("cifar10", tmp_path / "out"), splits)


def test_keras_archive_is_found(ten, tmp_path, monkeypatch):
    spec, splits = ten
    folder = fakes.write_python(tmp_path / "src", spec, splits)
    path, spec = fakes.write_archive(monkeypatch, tmp_path, spec, folder)
    keras = tmp_path / "home" / ".keras" / "datasets"
    keras.mkdir(parents=True)
    path.rename(keras / "cifar-10-batches-py.tar.gz")
    assert folders.find_sources(spec, tmp_path / "out") == [keras / "cifar-10-batches-py.tar.gz"]
    run("cifar10", "auto", tmp_path / "out")
    fakes.assert_holds(data.load("cifar10", tmp_path / "out"), splits)


# ---- defects -------------------------------------------------------------------------------------


def test_missing_batch(fake, tmp_path):
    spec, splits = fake
    folder = fakes.write_python(tmp_path, spec, splits)
    gone = spec.train_files[-1]
    (folder / gone).unlink()
    fakes.refuses(spec.name, folder, tmp_path / "out", folder, f"{gone} missing")


def test_truncated_batches(ten, tmp_path):
    spec, splits = ten
    python = fakes.write_python(tmp_path, spec, splits) / "data_batch_2"
    python.write_bytes(python.read_bytes()[:-5000])
    fakes.refuses("cifar10", python.parent, tmp_path / "out", python, "truncated")
    binary = fakes.write_binary(tmp_path, spec, splits) / "test_batch.bin"
    binary.write_bytes(binary.read_bytes()[:-7])
    fakes.refuses("cifar10", binary.parent, tmp_path / "out", binary, "truncated")
    binary.write_bytes(b"")
    fakes.refuses("cifar10", binary.parent, tmp_path / "out", binary, "truncated")


def test_a_batch_cut_at_a_record_is_noticed_by_the_count(ten, tmp_path):
    spec, splits = ten
    folder = fakes.write_binary(tmp_path, spec, splits)
    file = folder / "data_batch_1.bin"
    file.write_bytes(file.read_bytes()[: -2 * 3073])
    fakes.refuses("cifar10", folder, tmp_path / "out", folder, "100 images", "[98, 32, 32, 3]")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_truncated_archive(ten, tmp_path, monkeypatch, keep):
    spec, splits = ten
    folder = fakes.write_python(tmp_path / "src", spec, splits)
    path, spec = fakes.write_archive(monkeypatch, tmp_path, spec, folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    fakes.refuses("cifar10", path, tmp_path / "out", path, "md5", spec.archives[0].md5)
    renamed = path.rename(tmp_path / "mine.tar.gz")  # no official name: no md5 to compare
    fakes.refuses("cifar10", renamed, tmp_path / "out", renamed, "truncated")


def test_an_altered_official_archive_is_refused_by_md5(ten, tmp_path, monkeypatch):
    spec, splits = ten
    path, spec = fakes.write_archive(
        monkeypatch, tmp_path, spec, fakes.write_python(tmp_path / "src", spec, splits)
    )
    archive = dataclasses.replace(spec.archives[0], md5="0" * 32)
    monkeypatch.setitem(
        specs.SPECS, "cifar10", dataclasses.replace(spec, archives=(archive, spec.archives[1]))
    )
    fakes.refuses("cifar10", path, tmp_path / "out", path, "md5", "0" * 32)


def test_no_archive_and_no_such_path(ten, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    fakes.refuses("cifar10", text, tmp_path / "out", text, "no tar archive")
    fakes.refuses("cifar10", tmp_path / "nowhere", tmp_path / "out", "nowhere", "no such file")
    (tmp_path / "empty").mkdir()
    fakes.refuses("cifar10", tmp_path / "empty", tmp_path / "out", "holds no cifar10",
            "cifar-10-batches-py")


@pytest.mark.parametrize("bad", [10, -1, 255])
def test_wrong_label_range(ten, tmp_path, bad):
    spec, splits = ten
    splits["train"].labels[3] = bad
    folder = fakes.write_python(tmp_path, spec, splits)
    fakes.refuses("cifar10", folder, tmp_path / "out", folder / "data_batch_1", "expected 0 to 9")


def test_wrong_labels_per_class(fake, tmp_path):
    spec, splits = fake
    labels = splits["test"].labels
    labels[0] = (labels[0] + 1) % spec.num_classes
    if spec.coarse_names:
        splits["test"].coarse_labels[0] = spec.coarse_of_class[labels[0]]
    folder = fakes.write_binary(tmp_path, spec, splits)
    fakes.refuses(spec.name, folder, tmp_path / "out", folder, "test images of class",
            f"expected {spec.test_per_class}")


def test_coarse_labels_must_fit_the_fine_ones(monkeypatch, tmp_path):
    spec, splits = fakes.install(monkeypatch, tmp_path, "cifar100")
    splits["train"].coarse_labels[5] = (splits["train"].coarse_labels[5] + 1) % 20
    folder = fakes.write_binary(tmp_path, spec, splits)
    fakes.refuses("cifar100", folder, tmp_path / "out", folder, "coarse labels")


def test_other_images_are_refused_by_their_mean(ten, tmp_path):
    spec, splits = ten
    darker = dataclasses.replace(splits["train"], images=splits["train"].images // 2)
    folder = fakes.write_python(tmp_path, spec, {**splits, "train": darker})
    fakes.refuses("cifar10", folder, tmp_path / "out", folder, "training mean is 0.24")


@pytest.mark.parametrize("given, asked", [("cifar10", "cifar100"), ("cifar100", "cifar10")])
def test_the_other_dataset_is_recognised(monkeypatch, tmp_path, given, asked):
    spec, splits = fakes.install(monkeypatch, tmp_path, given)
    folder = fakes.write_python(tmp_path / "src", spec, splits)
    path, _ = fakes.write_archive(monkeypatch, tmp_path, spec, folder)
    for source in (folder, folder.parent, path):
        fakes.refuses(asked, source, tmp_path / "out", f"run with --dataset {given}")


def test_other_class_names_are_refused(ten, tmp_path):
    spec, splits = ten
    renamed = dataclasses.replace(spec, class_names=("plane", *spec.class_names[1:]))
    folder = fakes.write_binary(tmp_path, renamed, splits)
    fakes.refuses("cifar10", folder, tmp_path / "out", folder, "plane", "airplane")


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_pickles_that_call_functions_are_refused(ten, tmp_path):
    spec, splits = ten
    folder = fakes.write_python(tmp_path, spec, splits)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": _Evil()}, protocol=2))
    fakes.refuses("cifar10", folder, tmp_path / "out", folder / "data_batch_1", "refused")
    assert not pathlib.Path("owned").exists()


def python2_pickle(images, labels):
    """Pickle a batch by hand as Python 2's cPickle with numpy 1 did: byte strings, old names."""
    def string(value):
        return b"T" + len(value).to_bytes(4, "little") + value

    def number(value):
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    dtype = (b"cnumpy\ndtype\n(" + string(b"u1") + number(0) + number(1) + b"tR(" + number(3)
             + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb")
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
             + string(b"b") + b"tR(" + number(1) + b"(" + number(len(images)) + number(3072) + b"t"
             + dtype + b"I00\n" + string(images.tobytes()) + b"tb")
    numbers = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers + b"u."


def test_pickles_written_by_python_2_as_the_official_ones_are(ten, tmp_path):
    spec, splits = ten
    folder = fakes.write_python(tmp_path, spec, splits)
    for file in ("data_batch_1", "test_batch"):
        batch = pickle.loads((folder / file).read_bytes(), encoding="bytes")
        old = python2_pickle(batch[b"data"], batch[b"labels"])
        assert pickle.loads(old, encoding="bytes").keys() == {b"data", b"labels"}
        (folder / file).write_bytes(old)
    run("cifar10", str(folder), tmp_path / "out")
    fakes.assert_holds(data.load("cifar10", tmp_path / "out"), splits)


def test_image_folder_defects(ten, tmp_path):
    spec, splits = ten
    source = fakes.write_images(tmp_path / "images", spec, splits)
    victim = sorted((source / "train" / "cat").iterdir())[0]
    good = victim.read_bytes()
    Image.new("RGB", (33, 32)).save(victim)
    fakes.refuses("cifar10", source, tmp_path / "out", victim, "33x32", "32x32")
    victim.write_bytes(good[:60])
    fakes.refuses("cifar10", source, tmp_path / "out", victim, "no readable PNG")
    Image.new("RGBA", (32, 32)).save(victim)
    fakes.refuses("cifar10", source, tmp_path / "out", victim, "transparent pixels")
    victim.unlink()
    (victim.parent / "._1.png").write_bytes(b"what macOS leaves beside files")
    fakes.refuses("cifar10", source, tmp_path / "out", "cat", "9 images", "expected 10")
    victim.write_bytes(good)
    (source / "test" / "dog").rename(source / "test" / "dogs")
    fakes.refuses("cifar10", source, tmp_path / "out", "dogs", "did you mean 'dog'")


# ---- the script ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data_dir", ["--data_dir", "--data-dir"])
def test_script_prints_one_line_on_an_error(data_dir, tmp_path):
    root = pathlib.Path(__file__).resolve().parent.parent
    command = [sys.executable, str(root / "scripts" / "prepare_data.py"), "--dataset", "cifar10",
               "--source", str(tmp_path / "none"), data_dir, str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --source") and done.stderr.count("\n") == 1


def test_shapes32_needs_no_source(monkeypatch, tmp_path):
    fakes.install(monkeypatch, tmp_path, "shapes32")
    assert prepare.prepare("shapes32", data_dir=tmp_path / "out").name == "1.0.0"


def test_a_data_set_of_one_s_own_takes_a_spec_and_image_folders(monkeypatch, tmp_path):
    fakes.install(monkeypatch, tmp_path)
    spec = specs.DatasetSpec("pets", "1.0.0", ("cat", "dog"), train_per_class=3, test_per_class=2)
    monkeypatch.setitem(specs.SPECS, "pets", spec)
    out, splits = tmp_path / "out", fakes.fake_splits(spec)
    with pytest.raises(UserError, match="pets is not prepared: .*--source FOLDER"):
        data.load("pets", out)
    with pytest.raises(UserError, match="cannot be downloaded: --source=FOLDER with train/<class>"):
        run("pets", "download", out)
    with pytest.raises(UserError, match="holds no pets; expected train/<class>/ and test/<class>/"):
        run("pets", str(tmp_path), out)
    folder = run("pets", str(fakes.write_images(tmp_path, spec, splits)), out)
    assert folder == out / "pets" / "1.0.0"
    loaded = data.load("pets", out)
    assert loaded.class_names == ("cat", "dog") and len(loaded.test_labels) == 4
    order = np.argsort(splits["train"].labels, kind="stable")  # by class, then by file name
    np.testing.assert_array_equal(loaded.train_images, splits["train"].images[order])
    newer = dataclasses.replace(spec, version="1.1.0")  # has other images: the old ones do not serve
    monkeypatch.setitem(specs.SPECS, "pets", newer)
    with pytest.raises(UserError, match="pets is not prepared"):
        data.load("pets", out)
    second = fakes.write_images(tmp_path / "second", newer, fakes.fake_splits(newer, seed=1))
    assert run("pets", str(second), out) == out / "pets" / "1.1.0"
    assert (data.load("pets", out).train_images != loaded.train_images).any()


@pytest.mark.parametrize(("fields", "message"), [
    ({"test_per_class": 0}, "at least one image of each class"),
    ({"class_names": ["cat"]}, "two class_names or more"),
    ({"class_names": ("cat")}, "class_names = 'cat' is one text: give a tuple"),
    ({"mean": (120, 110, 100)}, "mean = .120, 110, 100. is not of pixels in .0, 1."),
    ({"name": "dogs"}, "SPECS.'pets'. .* has the name 'dogs'"),
])
def test_a_spec_that_cannot_be_is_named(fields, message, monkeypatch):
    fields = {"name": "pets", "version": "1.0.0", "class_names": ["cat", "dog"], "train_per_class": 3,
              "test_per_class": 2} | fields
    with pytest.raises(UserError, match=message):
        monkeypatch.setitem(specs.SPECS, "pets", specs.DatasetSpec(**fields))
        specs.get_spec("pets")


def test_the_folder_of_a_class_is_found_however_its_name_is_written(monkeypatch, tmp_path):
    fakes.install(monkeypatch, tmp_path)
    spec = specs.DatasetSpec("clothes", "1.0.0", ("T-shirt", "ankle boot"), train_per_class=2,
                             test_per_class=1)
    monkeypatch.setitem(specs.SPECS, "clothes", spec)
    source = fakes.write_images(tmp_path, spec, fakes.fake_splits(spec))
    (source / "train" / "T-shirt").rename(source / "train" / "t_shirt")
    (source / "test" / "ankle boot").rename(source / "test" / "Ankle-Boot")
    run("clothes", str(source), tmp_path / "out")
    assert data.load("clothes", tmp_path / "out").class_names == ("T-shirt", "ankle boot")


def test_more_than_100_000_images_keep_their_order():
    ids = np.array([f"train_{i:05d}" for i in (100000, 7, 99999, 100001, 10001)], bytes)
    assert store._order(ids).tolist() == [1, 4, 2, 0, 3]
    assert store._order(np.array([b""] * 3)).tolist() == [0, 1, 2]


def test_a_source_that_cannot_be_read_is_passed_over_and_named(ten, tmp_path, monkeypatch):
    spec, splits = ten
    sources = [fakes.write_python(tmp_path / name, spec, splits) for name in ("locked", "good")]
    monkeypatch.setattr(folders, "find_sources", lambda spec, root: sources)
    real = prepare.official.read_folder

    def read_folder(spec, path):
        if path == sources[0]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path / "data_batch_1"))
        return real(spec, path)

    monkeypatch.setattr(prepare.official, "read_folder", read_folder)
    with pytest.raises(UserError, match="data_batch_1: cannot be read .Permission denied.*--source"):
        run("cifar10", str(sources[0]), tmp_path / "out")
    run("cifar10", "auto", tmp_path / "out")
    fakes.assert_holds(data.load("cifar10", tmp_path / "out"), splits)


def test_a_prepared_folder_needs_no_right_to_write(ten, tmp_path, monkeypatch):
    spec, splits = ten
    folder = run("cifar10", str(fakes.write_python(tmp_path, spec, splits)), tmp_path / "out")
    monkeypatch.setattr(folders, "dataset_lock", None)
    assert run("cifar10", "auto", tmp_path / "out") == folder


def test_a_dataset_whose_name_begins_alike_keeps_its_temporary_folder(tmp_path):
    with folders.temporary_directory(tmp_path, "cifar10_small") as other:
        with folders.temporary_directory(tmp_path, "cifar10"):
            assert other.is_dir()
