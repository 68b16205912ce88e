"""config.init_from: what a run starts from, where it is found, and what is said of it."""

import hashlib
import io
import urllib.error

import jax
import numpy as np
import pytest
import tiny
import torch
import twins_imagenet
from torch_twins import randomized

from jaxcifar import config as config_lib
from jaxcifar import convert, init_from, torch_weights, weight_files
from jaxcifar.errors import UserError
from jaxcifar.state import create_state
from jaxcifar.task import create_task

RESNET = {"channels": (4, 6), "blocks": (1, 1)}
MOBILE = {"blocks": ((3, 8, 8, True, "RE", 2), (3, 12, 10, False, "HS", 2)), "stem_width": 8,
          "last_width": 16}
EFFICIENT = {"stages": (("fused", 1, 1, 8, 1), ("mb", 2, 2, 10, 2)), "stem_width": 8,
             "last_width": 16}
NAME = "ResNet18_Weights.IMAGENET1K_V1"


def configured(source, model="imagenet_resnet18", options=None, **fields):
    config = tiny.tiny_config(**{"augment": "resize(64)", "init_from": str(source), **fields})
    config.model = config_lib.model(model, **(RESNET if options is None else options))
    return config


def started(config, num_classes=10):
    """Return (task, fresh state, state to start from, lines)."""
    task = create_task(config, num_train=100, num_classes=num_classes)
    fresh = jax.tree.map(np.asarray, create_state(task, 0))
    return task, fresh, *init_from.start(task, fresh)


def twin_of(model, num_classes):
    cls, options = {"imagenet_resnet18": (twins_imagenet.ImageNetResNet, RESNET),
                    "mobilenet_v3_small": (twins_imagenet.MobileNetV3, MOBILE),
                    "efficientnet_v2_s": (twins_imagenet.EfficientNetV2, EFFICIENT)}[model]
    return randomized(cls(num_classes, **options)).eval(), options


@pytest.mark.parametrize(("model", "size"), [
    ("imagenet_resnet18", 224), ("mobilenet_v3_small", 224), ("efficientnet_v2_s", 384)])
def test_a_torch_files_logits_at_the_size_of_the_weights(model, size, tmp_path):
    twin, options = twin_of(model, 12)
    torch.save(twin.state_dict(), tmp_path / "weights.pth")
    config = configured(tmp_path / "weights.pth", model, options, augment=f"resize({size})",
                        frozen_batch_norm="batch")
    task, _, state, lines = started(config, num_classes=12)
    counted = sum(not key.endswith("num_batches_tracked") for key in twin.state_dict())
    assert lines == [f"{counted} tensors of {tmp_path / 'weights.pth'}", "new: none"]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    with jax.default_matmul_precision("highest"):
        inputs = task.normalize(images)
        apply = jax.jit(lambda v, x: task.model.apply(v, x, train=False))
        ours = apply(state.variables(), inputs)
    assert inputs.shape == (2, size, size, 3)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(np.array(inputs).transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(("model", "head"), [
    ("imagenet_resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"),
    ("efficientnet_v2_s", "classifier.1")])
def test_a_classifier_of_other_classes_starts_anew(model, head, tmp_path):
    twin, options = twin_of(model, 1000)
    arrays = {key: value.numpy() for key, value in twin.state_dict().items()}
    weight_files.save_file(tmp_path / "weights.safetensors", arrays)
    config = configured(tmp_path / "weights.safetensors", model, options, ema_decay=0.9)
    _, fresh, state, lines = started(config)
    assert lines[1] == f"new: {head}.bias, {head}.weight"
    np.testing.assert_array_equal(state.params[head]["kernel"], fresh.params[head]["kernel"])
    loaded = set(state.params) - {head}
    same = [np.array_equal(ours, initial) for key in loaded for ours, initial in zip(
        jax.tree.leaves(state.params[key]), jax.tree.leaves(fresh.params[key]), strict=True)]
    assert not any(same)
    for one, other in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.variables()),
                          strict=True):
        np.testing.assert_array_equal(one, other)
    del arrays[f"{head}.weight"], arrays[f"{head}.bias"]  # a backbone alone will do as well
    weight_files.save_file(tmp_path / "weights.safetensors", arrays)
    assert started(config)[3] == lines


def test_weights_of_another_model_are_refused(tmp_path):
    twin, _ = twin_of("imagenet_resnet18", 10)
    torch.save(twin.state_dict(), tmp_path / "weights.pth")
    config = configured(tmp_path / "weights.pth", options=RESNET | {"channels": (4, 8)})
    with pytest.raises(UserError, match="config.init_from = .*layer2.0.conv1.weight has shape"):
        started(config)


def test_keys_behind_a_prefix_are_named_though_the_classifier_is_new(tmp_path):
    twin, _ = twin_of("imagenet_resnet18", 7)
    torch.save({f"net.{key}": value for key, value in twin.state_dict().items()}, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match="^config.init_from = .*its keys begin with 'net.'"):
        started(configured(tmp_path / "w.ckpt", options=RESNET))


def test_what_is_wrong_with_the_weights_names_the_field(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "weights.npz").write_bytes(b"")
    for source, reason in ((tmp_path / "folder", "is not a run folder"),
                           (tmp_path / "weights.npz", "is not a file of weights"),
                           (tmp_path / "weights.safetensors", "is damaged")):
        with pytest.raises(UserError, match=f"^config.init_from = '{source}': .*{reason}"):
            started(configured(source))


def test_weights_of_another_model_are_refused_before_they_are_fetched(monkeypatch):
    monkeypatch.setattr(init_from, "torchvision_file", lambda name: pytest.fail("fetched"))
    config = configured(NAME)
    config.model = config_lib.model("resnet18")
    with pytest.raises(UserError, match=f"^config.init_from = '{NAME}': they are the weights of "
                       "model 'imagenet_resnet18', and config.model is 'resnet18'$"):
        started(config)


def test_a_run_starts_from_another_and_resumes_without_it(tmp_path, monkeypatch):
    twin, _ = twin_of("imagenet_resnet18", 10)
    torch.save(twin.state_dict(), tmp_path / "weights.pth")
    convert.import_weights(tmp_path / "weights.pth", tmp_path / "one", configured("", epochs=1))
    config = configured(tmp_path / "one", epochs=1, val_size=0, trainable="^fc/",
                        frozen_batch_norm="running")
    second, rows = tiny.fit(config, tmp_path / "two", monkeypatch)
    started_from = torch_weights.from_torch("imagenet_resnet18", twin.state_dict(), **RESNET)
    for key, params in started_from["params"].items():
        same = [np.array_equal(one, other) for one, other in zip(
            jax.tree.leaves(params), jax.tree.leaves(second.state.params[key]), strict=True)]
        assert not any(same) if key == "fc" else all(same), key
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    again, rows_again = tiny.fit(config, tmp_path / "two", monkeypatch)
    assert rows_again == rows
    for one, other in zip(jax.tree.leaves(second.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="there is no such run folder"):
        tiny.fit(config, tmp_path / "three", monkeypatch)


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """A TORCH_HOME for a file of ResNet-18's name: (folder, content, name with the right hash)."""
    content = b"weights" * 1000
    file_name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setitem(init_from.TORCHVISION, NAME, file_name)
    return tmp_path / "torch" / "hub" / "checkpoints", content, file_name


def test_torchvisions_weights_are_found_where_torch_keeps_them(torch_home, monkeypatch):
    folder, content, file_name = torch_home
    monkeypatch.setattr("urllib.request.urlopen", None)  # nothing is fetched
    folder.mkdir(parents=True)
    (folder / file_name).write_bytes(content)
    assert init_from.torchvision_file(NAME) == folder / file_name
    (folder / file_name).write_bytes(content + b"!")
    with pytest.raises(UserError, match="is damaged .* remove it"):
        init_from.torchvision_file(NAME)


def test_the_default_place_is_torchs(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    monkeypatch.setattr(init_from, "_download", lambda address, path: None)
    assert init_from.torchvision_file(NAME) == expected
    torch_hub = tmp_path / "torch" / "hub"
    assert str(torch_hub) == torch.hub.get_dir()


def test_torchvisions_weights_are_fetched_and_checked(torch_home, tmp_path, monkeypatch):
    folder, content, file_name = torch_home
    server = tmp_path / "server"
    server.mkdir()
    monkeypatch.setattr(init_from, "ADDRESS", server.as_uri() + "/")
    (server / file_name).write_bytes(content[:-1])
    with pytest.raises(UserError, match="came damaged"):
        init_from.torchvision_file(NAME)
    assert not list(folder.iterdir())
    (server / file_name).write_bytes(content)
    assert init_from.torchvision_file(NAME).read_bytes() == content
    assert [path.name for path in folder.iterdir()] == [file_name]


def test_without_a_network_one_line_says_what_to_put_where(torch_home, monkeypatch):
    folder, _, file_name = torch_home

    def refuse(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError) as raised:
        started(configured(NAME))
    message = str(raised.value)
    assert message.startswith(f"cannot download {file_name} (Name or service not known): ")
    assert f"https://download.pytorch.org/models/{file_name}" in message
    assert str(folder / file_name) in message


@pytest.mark.parametrize(("source", "message"), [
    ("ResNet18_Weights.IMAGENET1K_V2", "unknown torchvision weights .*did you mean .*_V1"),
    ("missing.pth", "no file missing.pth"),
    ("missing/run", "no such run folder"),
])
def test_an_unknown_source_is_named(source, message):
    with pytest.raises(UserError, match=message):
        started(configured(source))


def test_the_names_of_the_weights_are_the_configurations():
    assert {name for name, *_ in config_lib.IMAGENET.values()} == set(init_from.TORCHVISION)


def test_a_download_that_is_stopped_leaves_nothing(torch_home, monkeypatch):
    class Reply(io.BytesIO):
        def read(self, size):
            raise KeyboardInterrupt

    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: Reply())
    with pytest.raises(KeyboardInterrupt):
        init_from.torchvision_file(NAME)
    assert not list(torch_home[0].iterdir())
