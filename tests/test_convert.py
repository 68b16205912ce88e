"""jaxcifar.convert: a run's weights to a file and back are the same, bit for bit, and go on."""

import functools
import io
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from torch_twins import ResNet

from jaxcifar import (checkpoint, convert, run_folder, saved, selection, torch_weights,
                      weight_files)
from jaxcifar import config as config_lib
from jaxcifar.errors import UserError
from jaxcifar.run import Run
from jaxcifar.state import create_state
from jaxcifar.task import create_task

SMALL = {"channels": (4, 8), "blocks": (1, 1), "stem_width": 4, "shortcut_kernel": 1}


@functools.cache
def template(ema_decay):
    """A run's state before its first step, numpy arrays."""
    config = tiny.tiny_config(epochs=4, ema_decay=ema_decay)
    return jax.tree.map(np.asarray, create_state(create_task(config, 100, 10), config.seed))


def states_of(workdir):
    """{epoch: state} of the checkpoints in the folder of a run that averages its weights."""
    checkpoints = checkpoint.Checkpoints(workdir)
    found = [checkpoints.restore(step, template(0.5)) for step in checkpoints.steps()]
    checkpoints.close()
    return {int(state.epoch): state for state in found}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of four epochs with averaged weights, whose second epoch is the best."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny.tiny_config(epochs=4, ema_decay=0.5)
    state = template(0.5)
    (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    rng, saved = np.random.default_rng(0), {}
    checkpoints = checkpoint.Checkpoints(workdir)
    for epoch, accuracy in enumerate((50, 70, 60, 55), start=1):
        def noise(leaf):
            return leaf + rng.normal(0, 1, leaf.shape).astype(leaf.dtype)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        state = state.replace(
            step=np.int32(4 * epoch), epoch=np.int32(epoch), ema=jax.tree.map(noise, variables),
            **jax.tree.map(noise, variables),
            history=selection.record(state.history, epoch, {"val_accuracy": accuracy}))
        checkpoints.save(state, best_step=4 * min(epoch, 2))
        run_folder.append_row(workdir, {"epoch": epoch, "step": 4 * epoch})
        saved[epoch] = state
    checkpoints.close()
    assert sorted(states_of(workdir)) == [2, 3, 4]
    return workdir, config, saved, 2


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(("suffix", "options", "epoch", "field"), [
    (".safetensors", {"checkpoint": "best"}, 2, "ema"),
    (".pth", {"checkpoint": "best", "raw": True}, 2, "raw"),
    (".pth", {}, 4, "ema"),  # what result.json measures: config.selection is "last"
    (".safetensors", {"checkpoint": "last", "raw": True}, 4, "raw")])
def test_a_run_survives_the_way_out_and_in_exactly(suffix, options, epoch, field, run, tmp_path):
    workdir, config, states, _ = run
    path = tmp_path / f"w{suffix}"
    assert convert.export_run(workdir, path, **options).startswith(f"epoch {epoch} of ")
    state = states[epoch]
    raw = {"params": state.params, "batch_stats": state.batch_stats}
    expected = raw if field == "raw" else state.ema
    kernels = [tree["params"]["conv1"]["kernel"] for tree in (state.ema, raw)]
    assert not np.array_equal(*kernels)

    convert.import_weights(path, tmp_path / "new", config)
    new, = states_of(tmp_path / "new").values()
    assert_equal({"params": new.params, "batch_stats": new.batch_stats}, expected)
    assert_equal(new.ema, expected)
    assert (int(new.step), int(new.epoch)) == (0, 0)
    convert.export_run(tmp_path / "new", tmp_path / f"again{suffix}")
    first, again = weight_files.load_file(path), weight_files.load_file(tmp_path / f"again{suffix}")
    assert set(first) == set(again)
    for key, value in first.items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(value, again[key], err_msg=key)


def test_only_the_wanted_checkpoint_has_to_be_whole(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)

    def damage(step):
        for file in (folder / "checkpoints" / str(step)).rglob("*"):
            if file.is_file():
                file.write_bytes(b"")

    damage(12)  # the third epoch; the second is the best
    assert convert.export_run(folder, tmp_path / "w.safetensors", checkpoint="best") == (
        "epoch 2 of 4: the best val accuracy so far")
    damage(8)
    with pytest.raises(UserError, match="/8 cannot be read .*--checkpoint=last"):
        convert.export_run(folder, tmp_path / "w.safetensors", checkpoint="best")
    assert "epoch 4 of 4" in convert.export_run(folder, tmp_path / "w.safetensors",
                                                checkpoint="last")


def test_the_epoch_that_a_run_selected_is_written(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"selection": "best_val_accuracy"}))
    assert convert.export_run(folder, tmp_path / "w.safetensors") == (
        "epoch 4 of 4: the newest checkpoint; the run is not finished")
    result = {"selection": {"rule": "best_val_accuracy", "epoch": 2}, "steps": 16, "test_loss": 1.0,
              "test_accuracy": 50.0}
    (folder / "result.json").write_text(json.dumps(result))
    assert convert.export_run(folder, tmp_path / "w.safetensors") == (
        "epoch 2 of 4: selected by the rule best val accuracy")
    assert "epoch 4 of 4" in convert.export_run(folder, tmp_path / "w.safetensors",
                                                checkpoint="last")


def test_what_is_written_loads_into_the_pytorch_original(run, tmp_path):
    import torch
    workdir, _, states, best = run
    convert.export_run(workdir, tmp_path / "w.pth", checkpoint="best", raw=True)
    twin = ResNet(**SMALL)
    twin.load_state_dict(torch.load(tmp_path / "w.pth"))
    kernel = states[best].params["layer2.0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(
        twin.layer2[0].conv1.weight.detach(), np.transpose(kernel, (3, 2, 0, 1)))
    assert int(twin.bn1.num_batches_tracked) == int(states[best].step) > 0


def test_training_starts_from_imported_weights_as_from_its_own(tmp_path):
    """A run from a file of the initial weights begins as the run that draws them."""
    config = tiny.tiny_config(epochs=4)
    start = template(0.0)
    state_dict = torch_weights.to_torch(
        "resnet5m", {"params": start.params, "batch_stats": start.batch_stats}, **SMALL)
    weight_files.save_file(tmp_path / "w.safetensors", state_dict)
    config.seed = 1  # other random numbers: the weights can only come from the file
    convert.import_weights(tmp_path / "w.safetensors", tmp_path / "new", config)
    opened = Run(create_task(config, 100, 10), tmp_path / "new", io.StringIO())
    opened.close()
    assert opened.resumed and opened.best_epoch(opened.state.history) is None
    assert_equal(opened.state, start.replace(seed=np.uint32(1)))


def test_fresh_keys_keep_the_models_own_start(run, tmp_path):
    workdir, config, states, best = run
    convert.export_run(workdir, tmp_path / "w.pt", checkpoint="best")
    weights = weight_files.load_file(tmp_path / "w.pt")
    weights["linear.weight"] = np.zeros((1000, 8), np.float32)  # of 1,000 classes
    weights["linear.bias"] = np.zeros(1000, np.float32)
    weight_files.save_file(tmp_path / "w.pt", weights)
    with pytest.raises(UserError, match=r"linear.weight has shape \(1000, 8\), expected \(10, 8\)"):
        convert.import_weights(tmp_path / "w.pt", tmp_path / "new", config)
    assert not (tmp_path / "new").exists()
    convert.import_weights(tmp_path / "w.pt", tmp_path / "new", config, fresh="^linear")
    new, = states_of(tmp_path / "new").values()
    assert_equal(new.params["linear"], template(0.5).params["linear"])
    assert_equal(new.params["conv1"], states[best].ema["params"]["conv1"])
    with pytest.raises(UserError, match="matches no key of the model; its keys are like"):
        convert.import_weights(tmp_path / "w.pt", tmp_path / "other", config, fresh="fc")
    with pytest.raises(UserError, match="is not a regular expression"):
        convert.import_weights(tmp_path / "w.pt", tmp_path / "other", config, fresh="(")


CONFIG = """
from jaxcifar import config as config_lib
def get_config(variant=""):
    config = config_lib.default()
    config.model = config_lib.model("resnet5m", channels=(4, 8), blocks=(1, 1), stem_width=4,
                                    shortcut_kernel=1)
    config.epochs = 4
    config.optimizer.momentum = 0.9 if variant == "fast" else 0.0
    return config
"""


def test_the_command_line_both_ways(run, tmp_path, capsys):
    workdir = run[0]
    (tmp_path / "tiny.py").write_text(CONFIG)
    path, new = f"{tmp_path}/w.safetensors", f"{tmp_path}/new"
    convert.main(["convert", f"--from={workdir}", f"--to={path}", "--checkpoint=last"])
    assert ", epoch 4 of 4: the newest" in capsys.readouterr().out
    convert.main(["convert", f"--from={path}", f"--to={new}", f"--config={tmp_path}/tiny.py:fast",
                  "--config.seed=3", "--config.mean=(0.5,0.5,0.5)"])
    assert "a run at epoch 0" in capsys.readouterr().out
    config = saved.read_config(new)
    assert (config.seed, config.optimizer.momentum, tuple(config.mean)) == (3, 0.9, (0.5,) * 3)
    assert config_lib.to_dict(config) == json.loads((tmp_path / "new/config.json").read_text())


def test_every_configuration_survives_config_json(tmp_path):
    config = tiny.tiny_config(schedule__name="multistep", schedule__milestones=(1, 2))
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    assert saved.read_config(tmp_path) == config


@pytest.mark.parametrize(("arguments", "message"), [
    (["--from=w.pth"], "the following arguments are required: --to"),
    (["--from={run}", "--to=w.pth", "--checkpoint=bst"], "choice of checkpoint 'bst' .did you mean"),
    (["--from={run}", "--to=w.pth", "--config=x.py"], "belong to --from=FILE"),
    (["--from={run}", "--to=w.pth", "--chekpoint=last"], "unexpected argument '--chekpoint=last'"),
    (["--from={run}", "--to=w.ckpt"], "expected a name that ends in"),
    (["--from={tmp}/nothing", "--to=w.pth"], "is not a run folder"),
    (["--from={tmp}/seeds", "--to=w.pth"],
     r"holds several seeds \(seed2, seed10\), .* such as .*/seeds/seed2$"),
    (["--from=w.pth", "--to={tmp}/new"], "--config is missing"),
    (["--from=w.pth", "--to={tmp}/new", "--config=nothing.py"], "unknown configuration file"),
    (["--from=w.pth", "--to={tmp}/new", "--config={tmp}/tiny.py"], "no file w.pth"),
    (["--from=w.pth", "--to={run}", "--config={tmp}/tiny.py"], "holds a run already"),
    (["--from=w.pth", "--to={tmp}/ended", "--config={tmp}/tiny.py"], "holds a run already"),
    (["--from=w.pth", "--to={tmp}/seeds", "--config={tmp}/tiny.py"],
     r"holds several seeds \(seed2, seed10\): choose another"),
    (["--from=w.pth", "--to={tmp}/new", "--config={tmp}/tiny.py", "--raw"], "belong to --from=RUN"),
    (["--from={tmp}/tiny.py", "--to={tmp}/new", "--config={tmp}/tiny.py"],
     "tiny.py is not a file of weights: expected a name that ends in .pt, .pth, .safetensors"),
    (["--from={tmp}/ended", "--to={tmp}/w.pth"], "a finished run whose checkpoints are gone"),
    (["--from={tmp}/study/trials/0003", "--to={tmp}/w.pth"],
     "0003 is a trial of a search, whose weights are not kept: train .*/study/best.py"),
    (["--from=w.pth", "--to={tmp}/new", "--config={tmp}/tiny.py", "--config.sed=1"],
     "there is no config field .sed."),
    (["--from=w.pth", "--to={tmp}/new", "--config={tmp}/tiny.py", "--sed=1"],
     "unexpected argument"),
    (["--from={tmp}/old", "--to={tmp}/w.pth"], "is not a configuration of this version"),
    (["--from={tmp}/empty", "--to={tmp}/w.pth"], "holds no checkpoint yet"),
])
def test_mistakes_are_one_line(arguments, message, run, tmp_path):
    workdir, config, _, _ = run
    (tmp_path / "tiny.py").write_text(CONFIG)
    for name, fields in (("old", {"sead": 1}), ("empty", {}), ("ended", {}),
                         ("seeds/seed10", {}), ("seeds/seed2", {}), ("study/trials/0003", {})):
        (tmp_path / name).mkdir(parents=True)
        text = json.dumps(config_lib.to_dict(config) | fields)
        (tmp_path / name / "config.json").write_text(text)
    for name in ("ended/result.json", "study/study.json"):
        (tmp_path / name).write_text("{}")
    arguments = [word.format(run=workdir, tmp=tmp_path) for word in arguments]
    with pytest.raises(UserError, match=message) as raised:
        convert.main(["convert", *arguments])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()


def test_weights_of_a_network_of_resized_images_go_both_ways(tmp_path):
    config = tiny.tiny_config(augment="resize(8)")
    config.model = config_lib.model("mlp_s", hidden=(6, 5))
    convert_there, file, back = tmp_path / "run", tmp_path / "w.safetensors", tmp_path / "back"
    shape = (192, 6)  # 8 * 8 * 3 inputs
    state = jax.tree.map(np.asarray, create_state(create_task(config, 100, 10), 0))
    assert state.params["fc1"]["kernel"].shape == shape
    convert_there.mkdir()
    (convert_there / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    checkpoints = checkpoint.Checkpoints(convert_there)
    checkpoints.save(state, None)
    checkpoints.close()
    convert.export_run(convert_there, file)
    convert.import_weights(file, back, config)
    checkpoints = checkpoint.Checkpoints(back)
    jax.tree.map(np.testing.assert_array_equal,
                 checkpoints.restore_latest(state).params, state.params)
    checkpoints.close()
