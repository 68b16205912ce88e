"""jaxcifar.evaluate: the run's own numbers again, every image once, and the run left as it is."""

import json

import jax
import numpy as np
import pytest
import tiny

from jaxcifar import checkpoint, evaluate, inference, saved, selection
from jaxcifar import config as config_lib
from jaxcifar.data import Dataset
from jaxcifar.errors import UserError
from jaxcifar.state import create_state
from jaxcifar.task import create_task

DATA = tiny.tiny_dataset()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, Summary, rows) of a run of a ResNet with BatchNorm."""
    with pytest.MonkeyPatch.context() as patch:
        config = tiny.tiny_config(
            selection="best_val_accuracy", label_smoothing=0.1, ema_decay=0.5, augment="",
            model=config_lib.model("resnet5m", channels=(4,), blocks=(1,), stem_width=4,
                                   shortcut_kernel=1))
        summary, rows = tiny.fit(config, tmp_path_factory.mktemp("run"), patch, DATA)
        yield summary.workdir, summary, rows


def measured(*arguments, **options):
    lines = []
    return evaluate.evaluate(*arguments, say=lines.append, **options), "\n".join(lines)


def test_the_test_set_gives_result_json_again(run, tmp_path, capsys):
    workdir, summary, _ = run
    evaluate.main(["evaluate", f"--workdir={workdir}", f"--out={tmp_path}/e.json", "--confusion"])
    result, said = json.loads((tmp_path / "e.json").read_text()), capsys.readouterr().out
    assert result["accuracy"] == summary.result["test_accuracy"]
    assert result["loss"] == pytest.approx(summary.result["test_loss"], rel=1e-6)
    assert result["images"] == 50 and "accuracy_top5" not in result
    assert result["config_hash"] == summary.result["config_hash"]
    assert f"accuracy {result['accuracy']:.2f}%" in said and "result.json says the same" in said
    assert (tmp_path / "e_confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not (workdir / "evaluation.json").exists()
    evaluate.evaluate(workdir, say=lambda line: None)
    assert json.loads((workdir / "evaluation.json").read_text()) == result


def test_each_class_is_counted(run, tmp_path):
    trained = inference.load(run[0])
    logits = np.concatenate(list(inference.logits(
        trained, inference.batches_of(trained, DATA.test_images))))
    right = logits.argmax(-1) == DATA.test_labels
    result, _ = measured(run[0], out=tmp_path / "e.json")
    assert 0 < right.sum() < 50
    for label, entry in enumerate(result["classes"].values()):
        of_class = DATA.test_labels == label
        assert (entry["images"], entry["correct"]) == (of_class.sum(), right[of_class].sum())
        assert entry["accuracy"] == pytest.approx(100 * right[of_class].mean())


@pytest.mark.parametrize(("which", "epoch"), [("selected", None), ("last", 2)])
def test_validation_is_the_split_that_the_run_held_out(which, epoch, run, tmp_path):
    workdir, summary, rows = run
    epoch = epoch or summary.result["selection"]["epoch"]
    result, said = measured(workdir, split="val", checkpoint=which, out=tmp_path / "e.json")
    assert result["checkpoint"] == {"which": which, "epoch": epoch, "step": 4 * epoch,
                                    "run_finished": True}
    assert result["accuracy"] == rows[epoch - 1]["val_accuracy"]
    assert result["loss"] == pytest.approx(rows[epoch - 1]["val_loss"], rel=1e-6)
    assert result["images"] == 20 and "result.json says" not in said


def test_training_images_are_counted_once_and_not_augmented(run, tmp_path):
    result, _ = measured(run[0], split="train", flip=True, out=tmp_path / "e.json")
    assert (result["images"], result["flip"]) == (100, True)
    whole = np.bincount(DATA.train_labels, minlength=10)
    held_out, _ = measured(run[0], split="val", out=tmp_path / "e.json")
    assert [a["images"] + b["images"] for a, b in zip(
        result["classes"].values(), held_out["classes"].values(), strict=True)] == whole.tolist()
    trained = inference.load(run[0])
    images, labels = inference.split_arrays(trained, "train")
    logits = [np.concatenate(list(inference.logits(trained, inference.batches_of(trained, x))))
              for x in (images, images[:, :, ::-1])]
    mean = (logits[0] + logits[1]) / 2
    losses = np.log(np.exp(mean).sum(-1)) - mean[np.arange(100), labels]
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-4)


def new_run(workdir, **fields):
    """A run folder at epoch 0, as jaxcifar.convert writes it."""
    config = tiny.tiny_config(**fields)
    classes = 100 if config.dataset == "cifar100" else 10
    task = create_task(config, 100, classes)
    state = jax.tree.map(np.asarray, create_state(task, 0))
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(state, None)
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    return state


def test_cifar100_has_top5_and_lists_its_worst_classes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 20, 60).astype(np.int32)  # 80 classes have no image
    data = Dataset("cifar100", images, labels, images, labels, tuple(map(str, range(100))))
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: data)
    new_run(tmp_path, dataset="cifar100", model=config_lib.model("lenet"))
    trained = inference.load(tmp_path)
    logits = np.concatenate(list(inference.logits(
        trained, inference.batches_of(trained, images))))
    rank = (logits > logits[np.arange(60), labels][:, None]).sum(-1)
    result, said = measured(tmp_path)
    assert result["accuracy_top5"] == pytest.approx(100 * np.mean(rank < 5))
    assert result["accuracy"] == pytest.approx(100 * np.mean(rank < 1))
    assert f"top-5 {result['accuracy_top5']:.2f}%" in said
    assert "the newest checkpoint; the run is not finished" in said
    assert "the 10 worst of 20 classes" in said
    assert result["classes"]["worm"] == {"accuracy": None, "correct": 0, "images": 0}


def test_help_does_not_say_that_the_folder_is_only_read(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["evaluate", "--help"])
    said = capsys.readouterr().out
    assert "only read" not in said and "evaluation.json in the run folder" in said


@pytest.mark.parametrize(("arguments", "message"), [
    (["--split=tset"], "unknown split 'tset' .did you mean 'test'"),
    (["--split=val"], r"has no validation set \(val_size = 0\)"),
    (["--checkpoint=best"], "compares no epochs .*--checkpoint=last"),
    (["--checkpoint=bset"], "did you mean 'best'"),
    (["--out={tmp}/no/e.json"], "there is no folder .*no; create it first"),
    (["--flop"], "unrecognized arguments: --flop"),
])
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: DATA)
    new_run(tmp_path, val_size=0, model=config_lib.model("lenet"))
    with pytest.raises(UserError, match=message) as raised:
        evaluate.main(["evaluate", f"--workdir={tmp_path}",
                       *(word.format(tmp=tmp_path) for word in arguments)])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "evaluation.json").exists()


def test_the_hash_is_the_run_s_on_fewer_devices_too(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: DATA)
    new_run(tmp_path, model=config_lib.model("lenet"), bn_sync="replica", num_devices=16)
    trained = inference.load(tmp_path)
    assert trained.devices.num_devices < 16
    config = saved.read_config(tmp_path)
    assert trained.run_hash == config_lib.config_hash(config)
    result = evaluate.evaluate(tmp_path, say=lambda line: None)
    assert result["config_hash"] == trained.run_hash


def test_a_model_whose_code_was_changed_is_no_damage(run, monkeypatch):
    other = create_state(create_task(tiny.tiny_config(ema_decay=0.5), 100, 10), 0)
    monkeypatch.setattr(saved, "template", lambda task: jax.tree.map(np.asarray, other))
    for which in saved.WHICH:
        with pytest.raises(UserError, match="^the checkpoints in .* are of another model than this"):
            inference.load(run[0], which)


def test_a_folder_that_lacks_a_part_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: DATA)
    state = new_run(tmp_path, model=config_lib.model("lenet"), selection="best_val_loss")
    result = {"selection": {"rule": "best_val_loss", "epoch": 1}, "steps": 8, "test_loss": 1.0,
              "test_accuracy": 50.0}
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="no row of epoch 1, .*--checkpoint=last"):
        inference.load(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 4}\n')
    with pytest.raises(UserError, match=r"step 4 is not in .*\(there are 0\)"):
        inference.load(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="result.json cannot be read"):
        inference.load(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(result))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state.replace(step=np.int32(4), epoch=np.int32(1), history=selection.record(
        state.history, 1, {"val_loss": 1.0})), 4)
    checkpoints.close()
    assert inference.load(tmp_path).step == inference.load(tmp_path, "best").step == 4
    for file in (tmp_path / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match="/4 cannot be read .*--checkpoint=last"):
        inference.load(tmp_path)
    with pytest.warns(UserWarning, match="4 is damaged"):
        last = inference.load(tmp_path, "last")
    assert last.step == 0 and "newer checkpoints are damaged" in last.description
    assert (tmp_path / "checkpoints" / "4").is_dir()  # a reader sets nothing aside


def test_broken_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: DATA)
    state = new_run(tmp_path, model=config_lib.model("lenet"))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state.replace(step=np.int32(4), params=jax.tree.map(
        lambda x: np.full_like(x, 1e30), state.params)), None)
    checkpoints.close()
    with pytest.raises(UserError, match="logits of image 1 are not finite"):
        measured(tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
