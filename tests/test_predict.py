"""jaxcifar.predict: the right epoch, every image once, in order, and errors that name the file."""

import csv
import hashlib
import io
import itertools
import json
import shutil
import struct
import threading
import zlib

import numpy as np
import pytest
import tiny
from PIL import Image

from jaxcifar import config as config_lib
from jaxcifar import command, inference, predict, run_folder
from jaxcifar.data import png_stream, specs
from jaxcifar.errors import UserError

DATA = tiny.tiny_dataset(num_train=520)
NAMES = specs.get_spec("cifar10").class_names


def config_of(**fields):
    """A run that learns in three epochs and whose rate grows too large in the fourth."""
    return tiny.tiny_config(
        **{"epochs": 4, "selection": "best_val_loss", "schedule__name": "step",
           "schedule__step_size": 3, "schedule__gamma": 100.0, "augment": "",
           "model": config_lib.model("lenet"), "optimizer__name": "adam",
           "optimizer__momentum": 0.0, "optimizer__learning_rate": 0.01} | fields)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, Summary) of a run whose selected epoch is not its last."""
    with pytest.MonkeyPatch.context() as patch:
        summary, _ = tiny.fit(config_of(), tmp_path_factory.mktemp("run"), patch, DATA)
        assert summary.result["selection"]["epoch"] == 3
        assert summary.result["test_accuracy"] > 80 > 30 > summary.result["last"]["test_accuracy"]
        yield summary.workdir, summary


def contents(folder):
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def write_png(folder, images, names=None):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / (names[i] if names else f"{i + 1}.png"))
    return folder


def quiet(*arguments, **options):
    return predict.predict(*map(str, arguments), say=lambda line: None, **options)


def test_the_test_split_gives_the_accuracy_of_result_json(run, tmp_path, capsys):
    workdir, summary = run
    before = contents(workdir)
    predict.main(["predict", f"--workdir={workdir}", "--images=test", f"--out={tmp_path}/s.csv"])
    header, *rows = table(tmp_path / "s.csv")
    assert header == ["id", "label"]
    assert [int(i) for i, _ in rows] == list(range(1, 51))
    correct = sum(NAMES.index(name) == label
                  for (_, name), label in zip(rows, DATA.test_labels, strict=True))
    result = summary.result
    assert 100 * correct / 50 == result["test_accuracy"]
    said = capsys.readouterr().out
    assert f"epoch {result['selection']['epoch']} of 4" in said and "best val loss" in said
    assert f"accuracy {result['test_accuracy']:.2f}% ({correct} correct)" in said
    assert contents(workdir) == before


def test_a_folder_an_array_file_and_the_split_agree(run, tmp_path):
    workdir, images = run[0], DATA.test_images
    expected = quiet(workdir, "test", tmp_path / "split.csv")
    assert len(set(expected.tolist())) > 2
    np.save(tmp_path / "a.npy", images)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=DATA.test_labels)
    order = np.random.default_rng(0).permutation(50)  # the folder's own order means nothing
    write_png(tmp_path / "folder", images[order], [f"{i + 1}.png" for i in order])
    for source in ("a.npy", "a.npz", "folder"):
        quiet(workdir, tmp_path / source, tmp_path / "out.csv")
        assert table(tmp_path / "out.csv") == table(tmp_path / "split.csv"), source
        quiet(workdir, tmp_path / source, tmp_path / "out.csv", format="course")
        first = 1 if source == "folder" else 0
        assert table(tmp_path / "out.csv") == [["ID", "Label"]] + [
            [str(first + i), str(label)] for i, label in enumerate(expected)], source


def test_the_course_format_counts_files_without_numbers(run, tmp_path):
    names = ["test_10.png", "test_9.png", "test_08.png"]  # sorted: 08, 9, 10
    write_png(tmp_path / "in", DATA.test_images[:3], names)
    said = []
    predict.predict(str(run[0]), str(tmp_path / "in"), str(tmp_path / "o.csv"), format="course",
                    say=said.append)
    expected = quiet(run[0], "test", tmp_path / "t.csv")
    assert [row[1] for row in table(tmp_path / "o.csv")[1:]] == [
        str(expected[i]) for i in (2, 1, 0)]
    assert any("ID counts the files from 0, sorted by name" in line for line in said)
    (tmp_path / "in" / names[0]).rename(tmp_path / "in" / "10.png")
    for format in ("course", "kaggle"):
        with pytest.raises(UserError, match="some files are numbers, and that of test_08.png is not"):
            quiet(run[0], tmp_path / "in", tmp_path / "o.csv", format=format)


def all_logits(trained, images, **options):
    return np.concatenate(list(
        inference.logits(trained, inference.batches_of(trained, images), **options)))


def test_flip_is_the_mean_of_two_logits(run):
    trained, images = inference.load(run[0]), DATA.test_images
    plain, mirrored = all_logits(trained, images), all_logits(trained, images[:, :, ::-1])
    assert plain.shape == (50, 10) and not np.allclose(plain, mirrored, atol=1e-3)
    np.testing.assert_allclose(all_logits(trained, images, flip=True), (plain + mirrored) / 2,
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fields", "kind", "count", "size"), [
    ({"num_devices": 0}, "pmap", 8, 32), ({"num_devices": 64}, "pmap", 8, 32),
    ({"num_devices": 3, "parallel": "shard_map"}, "shard_map", 3, 33)])
def test_any_number_of_devices(fields, kind, count, size, run, tmp_path):
    here = tmp_path / "run"
    shutil.copytree(run[0], here)
    config = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(config | fields))
    trained = inference.load(here)
    assert (trained.devices.kind, trained.devices.num_devices) == (kind, count)
    assert trained.config.eval_batch_size == size
    np.testing.assert_allclose(all_logits(trained, DATA.test_images),
                               all_logits(inference.load(run[0]), DATA.test_images),
                               rtol=1e-4, atol=1e-4)


def test_which_checkpoint(run):
    workdir, summary = run
    chosen = summary.result["selection"]["epoch"]
    assert inference.load(workdir).epoch == inference.load(workdir, "best").epoch == chosen
    last = inference.load(workdir, "last")
    assert (last.epoch, last.step) == (4, 64)
    np.testing.assert_array_equal(last.variables["params"]["conv1"]["kernel"],
                                  summary.state.params["conv1"]["kernel"])


def test_a_run_that_goes_on_is_read_and_not_disturbed(run, tmp_path, monkeypatch):
    seen = {}

    def stop():
        epochs = len(run_folder.read_rows(tmp_path))
        if epochs and epochs not in seen:
            tiny.wait_for(tmp_path / "checkpoints" / str(16 * epochs))  # written in the background
            seen[epochs] = inference.load(tmp_path)
        return 0

    watched, rows = tiny.fit(config_of(), tmp_path, monkeypatch, DATA, stop=stop)
    assert sorted(seen) == [1, 2, 3]
    for epoch, trained in seen.items():
        assert (trained.epoch, trained.step) == (epoch, 16 * epoch)
        assert "the newest checkpoint; the run is not finished" in trained.description
    assert rows == tiny.rows(run[0])
    np.testing.assert_array_equal(watched.state.params["conv1"]["kernel"],
                                  run[1].state.params["conv1"]["kernel"])


def test_a_damaged_file_late_in_the_folder_leaves_the_old_output(run, tmp_path):
    folder = write_png(tmp_path / "in", np.repeat(DATA.test_images, 3, axis=0))
    damaged = bytearray((folder / "140.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "140.png").write_bytes(damaged)
    (tmp_path / "o.csv").write_text("old")
    with pytest.raises(UserError, match=r"140\.png: is no readable PNG"):
        quiet(run[0], folder, tmp_path / "o.csv")
    assert (tmp_path / "o.csv").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "o.csv"]


def test_an_interrupted_writer_leaves_nothing(run, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(run_folder.os, "replace", broken)
    with pytest.raises(UserError, match="No space left"):
        quiet(run[0], "test", tmp_path / "o.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "message"), [
    (["--images=test"], "the following arguments are required: --out"),
    (["--images={tmp}/nothing", "--out={tmp}/o.csv"], "there is no folder or file .*nothing"),
    (["--images=tset", "--out={tmp}/o.csv"], "there is no folder or file tset.*or the name of a "
                                             "split"),
    (["--images={tmp}/empty", "--out={tmp}/o.csv"], r"holds no PNG or JPEG file \(nothing\)"),
    (["--images={tmp}/nested", "--out={tmp}/o.csv"], r"\(only cat, dog\).*not searched"),
    (["--images={tmp}/w.7z", "--out={tmp}/o.csv"], "neither a folder nor an .npz"),
    (["--images={tmp}/named", "--out={tmp}/o.csv"], "name of cat.png is no number.*=course"),
    (["--images={tmp}/long", "--out={tmp}/o.csv"], "name of 1700000000000000000.png is no number"),
    (["--images={tmp}/twice", "--out={tmp}/o.csv"], "01.png and 1.png, both image number 1"),
    (["--images={tmp}/large", "--out={tmp}/o.csv"], "1.png: 64x48 pixels, expected 32x32"),
    (["--images={tmp}/f.npy", "--out={tmp}/o.csv"], r"float32 \[2, 32, 32, 3\], expected uint8"),
    (["--images={tmp}/c.npy", "--out={tmp}/o.csv"], "move the channels last"),
    (["--images={tmp}/two.npz", "--out={tmp}/o.csv"], "holds the arrays a, b: expected one"),
    (["--images=test", "--out={tmp}/no/o.csv"], "no folder .*no; create it first"),
    (["--images=test", "--out={tmp}"], "it is a folder; add a file name"),
    (["--images=test", "--out={tmp}/o.csv", "--format=kagle"], "did you mean 'kaggle'"),
    (["--images=test", "--out={tmp}/o.csv", "--checkpoint=lst"], "did you mean 'last'"),
    (["--images=test", "--out={tmp}/o.csv", "--workdir={tmp}/empty"], "is not a run folder"),
])
def test_mistakes_are_one_line(arguments, message, run, tmp_path):
    for name in ("empty", "nested/cat", "nested/dog"):
        (tmp_path / name).mkdir(parents=True)
    image = DATA.test_images[:1]
    write_png(tmp_path / "named", image, ["cat.png"])
    write_png(tmp_path / "long", image, ["1700000000000000000.png"])
    write_png(tmp_path / "twice", np.repeat(image, 2, axis=0), ["1.png", "01.png"])
    write_png(tmp_path / "large", np.zeros((1, 48, 64, 3), np.uint8))
    (tmp_path / "w.7z").write_bytes(b"7z")
    np.save(tmp_path / "f.npy", np.zeros((2, 32, 32, 3), np.float32))
    np.save(tmp_path / "c.npy", np.zeros((2, 3, 32, 32), np.uint8))
    np.savez(tmp_path / "two.npz", a=image, b=image)
    arguments = [f"--workdir={run[0]}", *(word.format(tmp=tmp_path) for word in arguments)]
    with pytest.raises(UserError, match=message) as raised:
        predict.main(["predict", *arguments])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "o.csv").exists()


def test_the_command_exits_with_one_line(tmp_path, capsys):
    words = ["predict", f"--workdir={tmp_path}", "--images=test", f"--out={tmp_path}/o.csv"]
    assert command.run(lambda: predict.main(words)) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_reader_decodes_ahead_and_no_further(tmp_path, monkeypatch):
    """With a slow caller, AHEAD batches are decoded and wait, whatever the folder's size."""
    folder = write_png(tmp_path / "in", np.zeros((120, 32, 32, 3), np.uint8))
    lock, ended, read = threading.Condition(), [0], png_stream.read_image

    def counting(path):
        pixels = read(path)
        with lock:
            ended[0] += 1
            lock.notify()
        return pixels

    monkeypatch.setattr(png_stream, "read_image", counting)
    size, taken = 5, 0
    for batch in itertools.islice(png_stream.open_images(folder).batches(size), 15):
        taken += len(batch)
        bound = taken + png_stream.AHEAD * size
        with lock:  # it does read ahead
            assert lock.wait_for(lambda: ended[0] >= bound, timeout=20)  # noqa: B023
            lock.wait(0.02)  # what must not happen has a moment to happen
            assert ended[0] == bound
    assert taken == 75 and not [t for t in threading.enumerate() if "ThreadPool" in t.name
                                and t.join(5) is None and t.is_alive()]


def png_of_16_bits():
    """Return an RGB PNG of 16 bits per channel, which Pillow reads and does not write."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(32 * (1 + 32 * 6)))) + chunk(b"IEND", b""))


def test_what_is_not_plain_rgb(tmp_path):
    image = Image.fromarray(DATA.test_images[0])
    alpha, holed = np.full((32, 32), 255, np.uint8), np.full((32, 32), 255, np.uint8)
    holed[3, 4] = 254

    def saved(picture, name):
        picture.save(tmp_path / name)
        return png_stream.read_image(tmp_path / name)

    grey = image.convert("L")
    np.testing.assert_array_equal(saved(grey, "l.png"), np.stack([np.asarray(grey)] * 3, -1))
    opaque = image.copy()
    opaque.putalpha(Image.fromarray(alpha))
    np.testing.assert_array_equal(saved(opaque, "rgba.png"), DATA.test_images[0])
    palette = image.quantize(16)
    np.testing.assert_array_equal(saved(palette, "p.png"), np.asarray(palette.convert("RGB")))
    opaque.putalpha(Image.fromarray(holed))
    with pytest.raises(UserError, match="hole.png: has transparent pixels"):
        saved(opaque, "hole.png")
    image.save(tmp_path / "key.png", transparency=image.getpixel((0, 0)))
    with pytest.raises(UserError, match="key.png: has transparent pixels"):
        png_stream.read_image(tmp_path / "key.png")
    (tmp_path / "rgb16.png").write_bytes(png_of_16_bits())
    with pytest.raises(UserError, match="rgb16.png: 16 bits per channel"):
        png_stream.read_image(tmp_path / "rgb16.png")
    with pytest.raises(UserError, match="deep.png: Pillow's mode I;16"):
        saved(Image.fromarray(np.zeros((32, 32), np.uint16)), "deep.png")
    with pytest.raises(UserError, match="cmyk.jpg: Pillow's mode CMYK"):
        saved(image.convert("CMYK"), "cmyk.jpg")
    assert saved(image, "fine.jpeg").shape == (32, 32, 3)


@pytest.mark.parametrize("content", [b"", b"GIF89a", "cut", "no pixels"])
def test_a_file_that_is_no_image_is_named(content, tmp_path):
    file = io.BytesIO()
    Image.fromarray(DATA.test_images[0]).save(file, "png")
    png = file.getvalue()  # 8 bytes, the header's chunk of 25, ..., the end's of 12
    shortened = {"cut": png[:900], "no pixels": png[:33] + png[-12:]}
    (tmp_path / "3.png").write_bytes(shortened.get(content, content))
    with pytest.raises(UserError, match=r"3\.png: is no readable PNG or JPEG \(.+\); replace") as e:
        png_stream.read_image(tmp_path / "3.png")
    assert "BytesIO" not in str(e.value) and str(e.value).count("3.png") == 1


def test_an_array_file_is_read_in_parts(tmp_path):
    np.savez(tmp_path / "a.npz", DATA.test_images)
    np.save(tmp_path / "a.npy", DATA.test_images)
    for name in ("a.npz", "a.npy"):
        images = png_stream.open_images(tmp_path / name)
        assert images.count == 50
        parts = list(images.batches(20))
        assert [len(p) for p in parts] == [20, 20, 10]
        np.testing.assert_array_equal(np.concatenate(parts), DATA.test_images)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-5000])
    with pytest.raises(UserError, match="ends within image 49 of 50"):
        list(png_stream.open_images(tmp_path / "a.npy").batches(20))
    np.savez_compressed(tmp_path / "b.npz", np.zeros((50, 32, 32, 3), np.uint8))
    data, refused = (tmp_path / "b.npz").read_bytes(), 0
    for place in range(60, len(data) - 120):  # whatever zlib and zipfile make of it
        (tmp_path / "b.npz").write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1:])
        try:
            list(png_stream.open_images(tmp_path / "b.npz").batches(20))
        except UserError:
            refused += 1
    assert refused > 50
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="no readable array file"):
        png_stream.open_images(tmp_path / "a.npz")
