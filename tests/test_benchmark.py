"""The benchmark: selections, ratios, the table, twins for every name, one run from end to end."""

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from benchmark_fakes import measured, report
from PIL import Image
from torch_twins import WITHOUT_TWIN

from jaxcifar import models
from jaxcifar.augment import policies
from jaxcifar.augment.geometry import View
from jaxcifar.benchmark import (child, choice, inputs, jax_contender, pillow_transforms, plot, table,
                                torch_augment, torch_best, torch_contender, torch_data, torch_twins,
                                work)
from jaxcifar.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def rows():
    """Three turns: ours takes 1, 2 and 4 s, PyTorch's 3, 4 and 4 s, twice as much CPU time."""
    ours, theirs = (1.0, 2.0, 4.0), (3.0, 4.0, 4.0)
    turns = {
        "epoch": [{"jaxcifar": measured(100, a, a), "torch_best": measured(100, b, 2 * b)}
                  for a, b in zip(ours, theirs)],
        "augment": 3 * [{"jaxcifar": measured(100, 0.5, 0.5), "torch_best": measured(50, 1, 1)}],
        "peak": 3 * [{"jaxcifar": measured(6e6, 1.0, 1.0), "torch_best": measured(5e6, 1, 1)}]}
    reports = {"jaxcifar": report(multiply_adds=1000, training=2500),
               "torch_best": report(compile_seconds={"epoch": 7.0}),
               "torch_eager": {"error": "PyTorch is not installed"}}
    entry = work.create("lenet", 10, ("epoch", "augment"), num_train=500, epoch_steps=10)
    found = table.rows(entry, turns, reports)
    table.compare(found)
    return {(r["kind"], r["contender"]): r for r in found}


def test_speeds_are_medians_and_ratios_are_of_the_same_turn(rows):
    row = rows["epoch", "jaxcifar"]
    assert row["images_per_second"] == 50
    assert row["ratio"] == {"torch_best": 2}  # median of 3, 2, 1; of the medians it would be 2 too
    assert row["ratio_by_cpu_time"] == {"torch_best": 4}
    assert rows["epoch", "torch_best"]["ratio"] == {}
    assert rows["augment", "jaxcifar"]["ratio"] == {"torch_best": 4}
    assert row["cpu_seconds_per_image"] == 0.02


def test_an_epoch_is_extrapolated_from_the_images_measured(rows):
    assert rows["epoch", "jaxcifar"]["epoch_seconds"] == 10
    assert rows["epoch", "jaxcifar"]["extrapolated"]
    assert rows["epoch", "jaxcifar"]["augmentation_share"] == 0.25  # 200 images/s alone


def test_share_of_the_peak_that_the_fastest_product_of_that_dtype_gave(rows):
    # 50 images/s, 2 operations for each of 2,500 multiply-adds; 6e6 at the peak
    assert rows["epoch", "jaxcifar"]["share_of_peak"] == pytest.approx(50 * 5000 / 6e6)
    assert rows["epoch", "torch_best"]["peak_flops"] == 6e6
    assert "share_of_peak" not in rows["augment", "jaxcifar"]


@pytest.mark.parametrize(("name", "first"), [
    ("mlp_s", 3072 * 1500), ("resnet18", 32 * 32 * 27 * 64), ("vit", 64 * 48 * 30)])
def test_a_training_step_needs_no_gradient_of_the_images(name, first):
    counts = jax_contender.multiply_adds(name)
    assert counts["training"] == 3 * counts["multiply_adds"] - first


def test_compile_seconds_are_without_a_warm_call_and_with_what_was_compiled_before(rows):
    assert rows["epoch", "jaxcifar"]["compile_seconds"] == 0.25
    assert rows["epoch", "torch_best"]["compile_seconds"] == 7.25
    assert rows["augment", "torch_best"]["compile_seconds"] == 0.375


def test_a_row_says_the_batch_of_evaluation_and_whether_caches_were_on():
    entry = work.create("lenet", 10, ("eval",), eval_batch=1000)
    found = table.rows(entry, {"eval": [{"jaxcifar": measured(100, 1, 1)}]}, {"jaxcifar": report()})
    table.compare(found)
    assert (found[0]["eval_batch"], found[0]["compile_seconds"]) == (1000, 8.0)
    assert "batches of 1,000" in table.text(found) and "caches" not in table.text(found)
    assert table.text([{**found[0], "caches": True}]).endswith("; caches")


class Lag:
    """A contender whose first call takes 0.3 s longer than every later one, 0.1 s, by its clock."""

    repeat_warm_up, calls, now = False, 0, 0.0

    def __init__(self):
        self.kinds = {"step": self.run, "epoch": self.run, "eval": self.at_once, "peak": self.run}

    def run(self, batches, start):
        self.now += 0.0 if self.calls else 0.3
        self.calls += 1
        start()
        self.now += 0.1
        return 8 * batches

    def at_once(self, batches, start):
        start()
        self.now += 0.001
        return 100

    def watch(self):
        """Return a logs.Stopwatch of this clock."""
        begin = self.now
        return types.SimpleNamespace(seconds=lambda: self.now - begin)

    def idle(self):
        pass

    def memory(self):
        return {"peak_host_bytes": 1}

    def report(self):
        return {"calls": self.calls}


def test_a_contender_tells_its_first_call_from_a_warm_one(monkeypatch):
    lag = Lag()
    monkeypatch.setattr(child, "Stopwatch", lag.watch)
    entry = work.create("lenet", 8, ("step", "epoch", "eval"), num_train=80, seconds=0.0)
    sent = []
    child.serve({**dataclasses.asdict(entry)}, lag, ["go eval\n", "finish\n"], sent.append)
    first, warm = sent[-1]["first_seconds"], sent[-1]["warm_seconds"]
    assert (first["step"], warm["step"]) == pytest.approx((0.4, 0.1))
    assert sent[-1]["calls"] == 2  # steps and epochs are one function, and warm after two calls
    assert sent[1]["images"] == 100


def test_measurements_of_evaluation_count_its_own_batches():
    once, entry = measured(1000, 1.0, 1.0), {"seconds": 2.0}
    assert child.batches_for(once, 1000, entry) == 2
    assert child.batches_for(once, 125, entry) == 16


def test_torch_best_tries_the_most_promising_form_first():
    tried = []

    def trial(form):
        tried.append(str(form))
        return {"eager float32 NCHW": 1.0, "compiled float32 NCHW": 0.5}.get(str(form), 2.0)

    search = choice.Choice(0)
    search.run(choice.COMPILED[:1], trial)
    search.run(choice.forms(search, True), trial)
    assert tried == [
        "compiled bfloat16 NHWC reduce-overhead", "eager bfloat16 NHWC", "compiled bfloat16 NHWC",
        "eager float32 NHWC", "eager bfloat16 NCHW", "eager float32 NCHW",
        "compiled float32 NCHW reduce-overhead", "compiled float32 NCHW"]
    assert (str(search.best()), search.extent()) == ("compiled float32 NCHW", "best of 8 tried")


def test_torch_best_keeps_the_best_of_what_the_time_allowed(monkeypatch):
    """A form is tried where the longest of its kind would end in time; the first one always."""
    clock = [0.0]

    class Watch:
        def __init__(self):
            self.start = clock[0]

        def seconds(self):
            return clock[0] - self.start

    def trial(form):
        clock[0] += 50 if form.mode else 5
        if form == choice.COMPILED[0]:
            raise RuntimeError("no compiler")
        return 1.0 if form.dtype == "bfloat16" else 2.0

    monkeypatch.setattr(choice, "Stopwatch", Watch)
    search = choice.Choice(59.0)
    search.run(choice.forms(search, True), trial)  # 50 s, 5 s: 4 s are left
    assert search.best() == choice.EAGER[0] and not search.has_time(False) and search.has_time()
    assert search.extent() == "best of 2 tried, 4 untried for the limit of 59 s, 1 failed"
    late = choice.Choice(1.0)
    clock[0] += 10
    late.run(choice.EAGER, trial)
    assert (late.best(), late.extent()) == (
        choice.EAGER[0], "best of 1 tried, 3 untried for the limit of 1 s")


@pytest.mark.parametrize(("seconds", "said"), [
    (0, "compiled bfloat16 NHWC reduce-overhead, best of 6 tried"),
    (1e-9, "compiled bfloat16 NHWC reduce-overhead, best of 1 tried, 5 untried for the limit of "
           "0 s, augmentation not compiled for want of time")])
def test_on_cuda_the_augmentation_is_compiled_after_the_first_form(seconds, said):
    class OnCuda(torch_best.Best):
        def __init__(self):
            self._work, self._cuda, self.device = {"batch": 8, "compile": True}, True, CPU
            self._network_seconds, self._compile_seconds = {}, {}
            self._choice = choice.Choice(seconds)
            self._torch, self._images, self.done = self, torch.zeros(8, 3, 32, 32), []
            self._augment = lambda images: images
            self._choose_form()

        def compile(self, function):
            self.done.append("augmentation")
            return function

        def _trial(self, form):
            self.done.append(form)
            self._network_seconds[form] = 3.0
            return 1.0 if form == choice.COMPILED[0] else 2.0

        def _set(self, form):
            self.form = form

    best = OnCuda()
    assert (best.variant, best.form) == (said, choice.COMPILED[0])
    assert best.done[:2] == [choice.COMPILED[0], *([] if seconds else ["augmentation"])]
    assert best._compile_seconds["step"] == 3.0 + best._compile_seconds.get("augment", 0.0)


def test_torch_best_without_any_form_that_works_says_why():
    def trial(form):
        raise RuntimeError(f"out of memory: {form}")
    search = choice.Choice(0)
    search.run(choice.EAGER, trial)
    with pytest.raises(UserError, match="no form worked: out of memory: eager float32 NCHW"):
        search.best()


def test_the_table_says_what_was_measured_and_what_failed(rows):
    text = table.text(list(rows.values()))
    ours = next(line for line in text.splitlines() if line.startswith("epoch:lenet@10"))
    assert ours.split()[:7] == ["epoch:lenet@10", "jaxcifar", "50.0", "-", "2.00", "-", "4.00"]
    assert "epoch 10.0 s (extrapolated from 100 images); augmentation 25%" in ours
    assert "torch_eager   PyTorch is not installed" in text
    assert "jaxcifar over torch_best, by time: median 2.00, 2.00 to 2.00 (steps and epochs: 1)" in (
        table.summary(list(rows.values())))


def test_the_plot_is_a_png_of_our_rows(rows, tmp_path):
    figure = plot.bars(list(rows.values()), tmp_path / "plot.png", title="title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["epoch:lenet@10", "augment:lenet@10"]
    for ratios, heights in ((["torch_best"], [0.0]), (["torch_eager", "torch_best"], [0.2, -0.2])):
        row = {**rows["epoch", "jaxcifar"], "ratio": dict.fromkeys(ratios, 2.0)}
        bars = plot.bars([row], tmp_path / "plot.png", title="title").axes[0].patches
        assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx(heights)


def test_a_selection_names_kinds_models_and_batch_sizes():
    assert work.parse("mobilenetv2,epoch:cnn3,lenet@64,eval:cnn3", 32) == [
        ("mobilenetv2", 32, ("step",)), ("cnn3", 32, ("epoch", "eval")), ("lenet", 64, ("epoch",))]
    chosen, = work.select("step:resnet5m", quick=True, on_cpu=True)
    assert (chosen.batch, chosen.optimizer, chosen.compile) == (64, "adam", False)
    assert "autoaugment" in chosen.augment and chosen.epoch_steps == 4
    assert work.select("epoch:resnet5m")[0].epoch_steps == 0  # a GPU does whole epochs


def test_the_short_list_for_a_gpu_begins_with_what_is_wanted_most():
    works = work.select(quick=True, on_cpu=False)
    assert [(w.model, w.batch) for w in works] == [
        ("resnet18", 128), ("resnet5m", 64), ("resnet18", 512), ("cnn3", 128), ("vit", 128)]
    assert works[0].kinds == ("step", "epoch", "eval", "augment")
    assert works[1].kinds == ("step", "epoch", "augment")
    assert [w.compile for w in works] == [True] * 5
    assert {(w.epoch_steps, w.eval_batch) for w in works} == {(100, 1000)}
    assert [len(w.contenders) for w in works] == [4, 4, 2, 2, 2]
    assert {w.eval_batch for w in work.select(on_cpu=True)} == {100}
    assert all(w.compile and w.contenders == work.CONTENDERS for w in work.select(on_cpu=False))


@pytest.mark.parametrize("contender", ["jaxcifar", "torch_eager", "torch_best"])
def test_all_contenders_evaluate_batches_of_one_size(contender, monkeypatch):
    entry = work.create("cnn3", 8, ("eval",), num_train=60, eval_batch=20, compile=False)
    asked = {**dataclasses.asdict(entry), "threads": 1, "caches": False, "on_cpu": True,
             "contender": contender, "choose_seconds": 0}
    if contender == "jaxcifar":
        prepared = jax_contender.prepare(asked)
        assert prepared._config.eval_batch_size == 20
    else:
        module = {"torch_eager": torch_contender, "torch_best": torch_best}[contender]
        prepared, seen = module.prepare(asked), []
        monkeypatch.setattr(torch_data, "loader", functools.partial(torch_data.loader, workers=0))
        network = prepared._model.forward
        monkeypatch.setattr(prepared._model, "forward",
                            lambda x: (seen.append(len(x)), network(x))[1])
        assert prepared.kinds["eval"](2, lambda: None) == 40
        assert set(seen) == {20}
    prepared.idle()


def test_a_pytorch_without_the_gpu_that_jax_uses_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    entry = work.create("lenet", 8, ("step",), num_train=16)
    asked = {**dataclasses.asdict(entry), "threads": 0, "on_cpu": False, "contender": "torch_eager"}
    with pytest.raises(UserError, match="sees no CUDA device, where JAX uses one"):
        torch_contender.prepare(asked)


@pytest.mark.parametrize(("text", "message"), [
    ("resnet81", "did you mean 'resnet18'"), ("stop:lenet", "did you mean 'step'"),
    ("lenet@x", "batch size 'x'")])
def test_a_wrong_selection_is_explained(text, message):
    with pytest.raises(UserError, match=message):
        work.select(text)


def test_a_batch_size_belongs_to_a_selection():
    with pytest.raises(UserError, match="--batch=7 needs --work"):
        work.select(batch=7, quick=True)


def test_every_registered_model_has_a_twin_of_as_many_parameters():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    counts = {name: int(count.replace(",", "")) for name, count in re.findall(
        r"^\| `(\w+)` \|[^|]*\| ([\d,]+) \|", page, re.MULTILINE)}
    assert set(counts) == set(models.names())
    for name in counts.keys() - WITHOUT_TWIN:
        with torch.device("meta"):
            twin = torch_twins.build(name, 10)
        assert sum(p.numel() for p in twin.parameters()) == counts[name], name


def test_missing_torch_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        torch_twins.build("lenet", 10)


def test_the_augmentations_of_all_contenders_do_the_same(sample_images):
    draw = policies.autoaugment((32, 32))
    rows = {name: torch.from_numpy(np.ascontiguousarray(value))
            for name, value in draw.rows._asdict().items()}
    image = sample_images[0]
    batch = torch.from_numpy(image.transpose(2, 0, 1).copy()).unsqueeze(0)
    numbers = jnp.arange(len(draw.operations))
    every = jax.jit(jax.vmap(lambda number: policies.apply(
        draw.rows, View(jnp.asarray(image)), number[None]).read()))(numbers)
    for number, operation in enumerate(draw.operations[1:], start=1):
        ours = np.asarray(every[number])
        pillow = pillow_transforms._operation(Image.fromarray(image), *operation)
        np.testing.assert_array_equal(np.asarray(pillow), ours, err_msg=str(operation))
        theirs = torch_augment.operate(batch, rows, torch.tensor([number]))
        theirs = theirs[0].numpy().transpose(1, 2, 0)
        difference = np.abs(theirs.astype(int) - ours)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01, operation


def test_device_augmentation_crops_flips_and_rotates(sample_images):
    torch.manual_seed(0)
    image = torch.from_numpy(sample_images[1].transpose(2, 0, 1).copy())
    images = image.expand(200, -1, -1, -1)
    flipped = torch_augment.build("flip", CPU)(images)
    same = (flipped == image).flatten(1).all(1)
    assert 70 < same.sum() < 130 and (flipped[~same] == image.flip(2)).all()
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    windows = [padded[:, i:i + 32, j:j + 32] for i in range(5) for j in range(5)]
    found = {next(k for k, w in enumerate(windows) if (w == crop).all())
             for crop in torch_augment.build("crop(2)", CPU)(images)}
    assert found == set(range(25))
    turned = torch_augment.build("rotation(5)", CPU)(images)
    assert (turned[:, :, 15:17, 15:17] == image[:, 15:17, 15:17]).float().mean() > 0.9
    assert (turned[:, :, 0, 0] == 0).all(1).float().mean() > 0.5  # corners turned out of view
    with pytest.raises(UserError, match="cutmix"):
        torch_augment.build("cutmix", CPU)


def test_the_loader_gives_normalised_batches():
    arrays = inputs.generated(20)
    images, labels = next(iter(torch_data.loader(arrays, "crop(4)|flip", 8, train=True, workers=0)))
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    images, labels = next(iter(torch_data.loader(arrays, "", 8, train=False, workers=0)))
    expected = (arrays["images"][:8] / 255 - inputs.MEAN) / inputs.STD
    np.testing.assert_allclose(images.numpy().transpose(0, 2, 3, 1), expected, atol=1e-5)
    assert labels.tolist() == arrays["labels"][:8].tolist()


def test_cpu_seconds_count_worker_processes():
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    before = child.cpu_seconds()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert child.cpu_seconds() - before >= 0.25
