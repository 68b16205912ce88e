"""Full disks, failures and interruptions leave no folder that looks prepared."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import data_fakes as fakes
import pytest

from jaxcifar import data
from jaxcifar.data import folders, store
from jaxcifar.data.prepare import prepare as run
from jaxcifar.errors import UserError


@pytest.fixture
def ten(monkeypatch, tmp_path):
    """(spec, splits) of a small cifar10."""
    return fakes.install(monkeypatch, tmp_path)


def raiser(error):
    """Return a function that raises `error`."""
    def raise_it(*args, **kwargs):
        raise error
    return raise_it


def test_disk_full(ten, tmp_path, monkeypatch):
    spec, splits = ten
    folder = fakes.write_python(tmp_path, spec, splits)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # array_record reports it as a RuntimeError with this text (seen on a full tmpfs)
    wrapped = RuntimeError("Failed to finalize: write() failed: No space left on device; at byte 1")
    for error in (full, wrapped):
        with monkeypatch.context() as patch:
            patch.setattr(store.builders, "encode_png", raiser(error))
            fakes.refuses("cifar10", folder, tmp_path / "out", "disk is full", "--data_dir")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    fakes.refuses("cifar10", folder, tmp_path / "out", "0 MB free", "--data_dir")


def test_a_failure_of_tfds_leaves_nothing(ten, tmp_path, monkeypatch):
    folder = fakes.write_python(tmp_path, *ten)
    calls = []

    def fail_late(image):
        calls.append(1)
        if len(calls) == 70:
            raise ValueError("a strange failure\nof many lines")
        return png(image)

    png = store.builders.encode_png
    monkeypatch.setattr(store.builders, "encode_png", fail_late)
    fakes.refuses("cifar10", folder, tmp_path / "out", "a strange failure")


def test_what_was_written_is_compared(ten, tmp_path, monkeypatch):
    folder = fakes.write_python(tmp_path, *ten)
    png = store.builders.encode_png
    monkeypatch.setattr(store.builders, "encode_png", lambda image: png(image[::-1]))
    fakes.refuses("cifar10", folder, tmp_path / "out", "reads back differently")


def test_things_in_the_way(ten, tmp_path):
    folder = fakes.write_python(tmp_path, *ten)
    file = tmp_path / "file"
    file.write_text("")
    for root in (file, file / "below"):
        with pytest.raises(UserError, match=r"file.*in the way.*--data_dir"):
            run("cifar10", str(folder), root)
    for target in ("a/cifar10/3.0.2", "b/cifar10"):
        path = tmp_path / target
        path.parent.mkdir(parents=True)
        path.write_text("")
        with pytest.raises(UserError, match="in the way") as caught:
            run("cifar10", str(folder), tmp_path / target[0])
        assert str(path) in str(caught.value)
        assert path.read_text() == ""
    half = tmp_path / "c" / "cifar10" / "3.0.2"  # not ours to delete
    half.mkdir(parents=True)
    (half / "precious").write_text("")
    with pytest.raises(UserError, match="in the way"):
        run("cifar10", str(folder), tmp_path / "c")
    assert (half / "precious").exists()


def test_unwritable_directory(ten, tmp_path, monkeypatch):
    folder = fakes.write_python(tmp_path, *ten)

    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out"))
    monkeypatch.setattr(folders.tempfile, "mkdtemp", raiser(denied))
    fakes.refuses("cifar10", folder, tmp_path / "out", "not writable", "TFDS_DATA_DIR")


_SLOW = r"""
    import os, pathlib, sys, time
    sys.path[:0] = sys.argv[2:4]
    import pytest
    import data_fakes as fakes
    from jaxcifar.data import builders, prepare
    root = pathlib.Path(sys.argv[1])
    spec, splits = fakes.install(pytest.MonkeyPatch(), root)
    png = builders.encode_png
    def slow(image):
        os.write(1, b"encoding\n")  # past the redirection of print
        time.sleep(0.1)
        return png(image)
    builders.encode_png = slow
    prepare.prepare("cifar10", str(root / "cifar-10-batches-py"), root / "out")
"""


def test_killed_while_writing(ten, tmp_path):
    """SIGKILL leaves only a hidden directory, which the next preparation removes."""
    here = pathlib.Path(__file__).resolve().parent
    folder = fakes.write_python(tmp_path, *ten)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SLOW), str(tmp_path), str(here), str(here.parent)],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path,
    )
    try:
        assert child.stdout.readline() == "encoding\n"
        time.sleep(0.3)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    out = tmp_path / "out"
    assert not (out / "cifar10").exists()
    assert len(list(out.glob(".incomplete_cifar10.*"))) == 1
    with pytest.raises(UserError, match="not prepared"):
        data.load("cifar10", out)
    run("cifar10", str(folder), out)
    assert not list(out.glob(".incomplete*"))
    fakes.assert_holds(data.load("cifar10", out), ten[1])


def test_interrupted_from_the_keyboard(ten, tmp_path, monkeypatch):
    folder = fakes.write_python(tmp_path, *ten)

    with monkeypatch.context() as patch:
        patch.setattr(store.builders, "encode_png", raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run("cifar10", str(folder), tmp_path / "out")
    assert fakes.leftovers(tmp_path / "out") == []
    run("cifar10", str(folder), tmp_path / "out")
