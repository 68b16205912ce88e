"""The speedrun's PyTorch rival: its steps are ours, its images, its command from end to end."""

import functools
import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_configs import load
from test_speedrun import (NUM_TEST, NUM_TRAIN, largest_difference, on_device, small_config,
                           small_run, trained)

from jaxcifar import muon, torch_weights
from jaxcifar.benchmark import children
from jaxcifar.errors import UserError
from jaxcifar.models import speedrun_net
from jaxcifar.speedrun import driver, rival, torch_rival, training
from jaxcifar.speedrun import images as images_lib


__all__ = ["on_device", "trained"]  # fixtures


@pytest.fixture(scope="module")
def dataset():
    return tiny.tiny_dataset(NUM_TRAIN, NUM_TEST)


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def arrays_of(dataset):
    return {f"{split}_{kind}": getattr(dataset, f"{split}_{kind}")
            for split in ("train", "test") for kind in ("images", "labels")}


def rival_of(run, dataset):
    spec = rival.specification(run, runs=1, platform="cpu", compile_mode="off")
    return torch_rival.Rival(json.loads(json.dumps(spec)), arrays_of(dataset))


def start_from(theirs, state, name, options):
    """Give a rival the weights of our State, ready for its first step."""
    theirs.reset(0)
    weights = torch_weights.to_torch(
        name, {"params": state.params, "batch_stats": state.batch_stats}, **options)
    theirs.model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False)
    theirs.start_lookahead()
    theirs.model.train()


def take_step(theirs, batch, number):
    """Take a step on our batch (images, labels)."""
    images, labels = (torch.tensor(np.array(x)) for x in batch)
    theirs.step(images.permute(0, 3, 1, 2), labels.long(), number)


def check_equal(variables, theirs, name, options):
    after = torch_weights.from_torch(name, theirs.model.state_dict(), **options)
    ours = {key: variables[key] for key in ("params", "batch_stats")}
    for a, b in zip(*map(jax.tree.leaves, (ours, after)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4 * np.abs(b).max())


def test_its_steps_are_ours_with_muon(trained, dataset):
    """Same weights, same batches: the same parameters after each of five steps."""
    trainer, prepared, states = trained
    run, options = trainer.run, {"channels": (4, 6), "head_scale": 1 / 256}
    theirs = rival_of(run, dataset)
    start_from(theirs, states[0], "speedrun94", options)
    batch = jax.jit(functools.partial(training.batch, run))
    for number in range(5):
        take_step(theirs, batch(prepared, jnp.uint32(3), jnp.int32(number)), number)
        check_equal(vars(states[number + 1]), theirs, "speedrun94", options)
    assert largest_difference(states[5].params, states[0].params) > 0.05


@pytest.mark.parametrize(("variant", "every", "options"), [
    ("94_sgd", 2, {"channels": (4, 6)}), ("96", 3, {"channels": (4, 6), "depth": 3})])
def test_its_steps_are_ours_with_sgd_and_lookahead(variant, every, options, dataset):
    run = small_run(variant, lookahead_every=every)
    name = run.config.model.name
    theirs = rival_of(run, dataset)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    prepared, state = jax.jit(functools.partial(training.start, run))(
        jnp.uint32(3), images, labels)
    first = state.params
    start_from(theirs, state, name, options)
    batch = jax.jit(functools.partial(training.batch, run))
    step = jax.jit(functools.partial(training.step, run, True))
    for number in range(run.bias_steps):
        numbers = jnp.uint32(3), jnp.int32(number)
        take_step(theirs, batch(prepared, *numbers), number)
        state = step(state, prepared, *numbers)
        check_equal(vars(state), theirs, name, options)
    assert largest_difference(state.params, first) > 1e-3
    theirs.finish()
    check_equal(training.result(state), theirs, name, options)


def test_its_muon_scales_matrices_of_more_outputs_than_inputs(dataset):
    config = small_config()
    config.model.channels, config.speedrun.unit_filters = (4, 48), False
    theirs = rival_of(training.create(config, NUM_TRAIN, 10), dataset)
    gradient = np.random.default_rng(0).normal(size=(48, 4, 3, 3)).astype(np.float32)
    p = torch.nn.Parameter(torch.zeros(48, 4, 3, 3))
    p.grad = torch.tensor(gradient)
    with torch.no_grad():
        theirs._muon(p, torch.zeros_like(p), 1.0)
    options, kernel = config.optimizer, {"kernel": jnp.asarray(gradient.transpose(2, 3, 1, 0))}
    rule = muon.scale_by_muon(options.muon_momentum, options.muon_steps)
    ours = rule.update(kernel, rule.init(kernel))[0]["kernel"]
    np.testing.assert_allclose(-p.detach().permute(2, 3, 1, 0), ours, atol=3e-4 * np.abs(ours).max())


def test_its_first_layer_whitens_as_ours(dataset):
    run = small_run()
    theirs = rival_of(run, dataset)
    theirs.reset(0)
    theirs.whiten()
    kernel = theirs.model.whiten.weight.detach().permute(2, 3, 1, 0).numpy()
    seen = run.task.normalize(jnp.asarray(dataset.train_images))
    ours = np.asarray(speedrun_net.whitening_kernel(seen, run.config.speedrun.whiten_eps))
    signs = np.sign((kernel * ours).sum((0, 1, 2)))  # an eigenvector's sign is anyone's choice
    np.testing.assert_allclose(kernel * signs, ours, rtol=1e-2, atol=2e-3)
    np.testing.assert_array_equal(kernel[..., :12], -kernel[..., 12:])


def test_its_weights_start_as_published(dataset):
    config = small_config()
    config.model.channels = (4, 32)
    theirs = rival_of(training.create(config, NUM_TRAIN, 10), dataset)
    theirs.reset(0)
    first = {key: value.clone() for key, value in theirs.model.state_dict().items()}
    theirs.model.group1.norm1.bn.running_mean += 1
    theirs.reset(0)
    assert all(torch.equal(first[key], value) for key, value in theirs.model.state_dict().items())
    theirs.reset(1)
    assert not torch.equal(first["head.weight"], theirs.model.head.weight)
    assert float(first["head.weight"].std()) == pytest.approx(1, abs=1e-5)
    centre = first["group2.conv1.weight"][:4, :, 1, 1]
    assert torch.equal(centre, torch.eye(4)) and first["group2.conv1.weight"][:4].sum() == 4


def test_its_images_are_windows_mirrored_in_turn_and_cut(dataset):
    theirs = rival_of(small_run(translate=2), dataset)
    images = theirs._data["train"][0]
    padded = torch_rival.padded_images(images, 2)
    np.testing.assert_array_equal(padded.numpy(), np.asarray(images_lib.pad(images.numpy(), 2)))
    torch.manual_seed(0)
    even, odd = (theirs._augmented(padded, epoch) for epoch in (0, 1))
    found = []
    for seen, side in ((even, 1), (odd, -1)):
        for image, wide in zip(seen.numpy()[:, :, ::side], padded.numpy()):
            places = [(y, x) for y in range(5) for x in range(5)
                      if np.array_equal(image, wide[y:y + 32, x:x + 32])]
            assert len(places) == 1
            found += places
    assert len(set(found)) == 25
    theirs.spec["speedrun"]["cutout"] = 12
    cut = theirs._augmented(padded + 1, 0).numpy() == 0
    assert (cut.sum((1, 2, 3)) == 12 * 12 * 3).all()
    corners = {(int(c[..., 0].any(1).argmax()), int(c[..., 0].any(0).argmax())) for c in cut}
    assert len(corners) > 50 and {y for y, _ in corners} <= set(range(21))


def test_its_evaluation_averages_the_views(dataset):
    theirs = rival_of(small_run(), dataset)
    theirs.reset(0)
    theirs.whiten()
    theirs.model.eval()
    images = theirs._normalized("test")
    wide = np.asarray(images_lib.pad(images.numpy(), 1))
    expected = 0
    with torch.no_grad():
        for at, weight in ((1, 0.25), (0, 0.125), (2, 0.125)):
            view = wide[:, at:at + 32, at:at + 32]
            for seen in (view, view[:, :, ::-1]):
                tensor = torch.tensor(seen.transpose(0, 3, 1, 2).copy())
                expected = expected + weight * theirs.model(tensor).numpy()
        np.testing.assert_allclose(theirs._view_logits(images).numpy(), expected, atol=1e-6)
        plain = theirs._logits(images).argmax(1)
    for views, answers in ((True, torch.tensor(expected).argmax(1)), (False, plain)):
        theirs._data["test"] = (theirs._data["test"][0], answers)
        assert theirs._accuracy(views=views) == 100
        theirs._data["test"] = (theirs._data["test"][0], (answers + (torch.arange(30) < 3)) % 10)
        assert theirs._accuracy(views=views) == pytest.approx(90)


def test_it_learns(dataset):
    config = small_config()
    config.model.update(channels=(8, 16), head_scale=1 / 64)
    config.batch_size = 50
    config.speedrun.epochs, config.optimizer.learning_rate = 8.0, 0.24
    dataset = tiny.tiny_dataset(400, 100)
    found = rival_of(training.create(config, 400, 10), dataset).run(0)
    assert found["accuracy"] > 60 and found["accuracy_tta"] > 60  # of ten classes, after 64 steps


def test_its_parameters_have_the_published_rates():
    run = training.create(load("speedrun").get_config("94"), 50_000, 10)
    spec = rival.specification(run, runs=1, platform="gpu", compile_mode="auto")
    rules = spec["parameters"]
    assert len(spec["rates"]) == 200 and len(spec["bias_shares"]) == 75
    by_muon = {name for name, rule in rules.items() if rule["muon"]}
    assert by_muon == {f"group{i}.conv{j}.weight" for i in (1, 2, 3) for j in (1, 2)}
    rate = {name: spec["rates"][0] * rule["factor"] for name, rule in rules.items()}
    decay = {name: spec["optimizer"]["weight_decay"] * spec["rates"][0] * rule["decays"]
             for name, rule in rules.items()}
    assert rate["head.weight"] == pytest.approx(0.67)
    assert rate["whiten.bias"] == pytest.approx(0.053) == rate["group2.norm1.bias"]
    assert decay["head.weight"] == pytest.approx(0.004) and not decay["group1.conv1.weight"]
    assert "whiten.weight" not in rules


def test_the_command_measures_both(trained, dataset, monkeypatch, tmp_path):
    """Two runs each at reduced width: the lines, the ratio, the file."""
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: dataset)
    stream = io.StringIO()
    monkeypatch.setattr(driver, "Trainer", lambda *_, rolled: trained[0])  # compiled already
    content = driver.run(small_config(), 2, name="speedrun_94", out=str(tmp_path), rival=True,
                         stream=stream)
    written = json.loads((tmp_path / "speedrun_94_cpu.json").read_text(encoding="utf-8"))
    assert written["rival"] == content["rival"] and len(written["rival"]["runs"]) == 2
    theirs, ours = content["rival"], content["seconds_with_evaluation"]["mean"]
    assert content["rival_over_ours"]["seconds_with_evaluation"] == pytest.approx(
        theirs["seconds_with_evaluation"]["mean"] / ours)
    assert all(0 < row["seconds"] < row["seconds_with_evaluation"] for row in theirs["runs"])
    assert theirs["environment"]["torch"] == torch.__version__ and theirs["compile"] == "off"
    text = stream.getvalue()
    assert text.count("mean of 2 run(s)") == 3 and "PyTorch's seconds over ours: training" in text


def test_a_rival_that_ends_leaves_our_results(dataset, monkeypatch, tmp_path):
    def measure(spec, dataset, *, ready, row):
        ready({"ready": {"compile": "off", "failed": [], "warm_up_seconds": 1.0},
               "environment": {"torch": "2"}})
        row({"seed": 0, "accuracy": 1.0, "accuracy_tta": 2.0, "seconds": 3.0,
             "seconds_with_evaluation": 4.0})
        raise UserError("the PyTorch rival: out of memory")

    class Quick:
        rolled = False

        def __init__(self, run, devices, *, rolled):
            self.run, self.devices = run, devices

        def compile(self, train, test):
            pass

        def train(self, seed, train):
            return {}

        def evaluate(self, variables, test):
            return {"accuracy": 90.0, "accuracy_tta": 91.0}

    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: dataset)
    monkeypatch.setattr(driver, "Trainer", Quick)
    monkeypatch.setattr(rival, "measure", measure)
    with pytest.raises(UserError, match="out of memory"):
        driver.run(small_config(), 2, name="speedrun_94", out=str(tmp_path), rival=True,
                   stream=io.StringIO())
    written = json.loads((tmp_path / "speedrun_94_cpu.json").read_text(encoding="utf-8"))
    assert written["accuracy"]["mean"] == 90 and len(written["runs"]) == 2
    assert written["rival"]["error"] == "the PyTorch rival: out of memory"
    assert written["rival"]["runs"][0]["seconds"] == 3


def test_a_child_that_fails_says_why(dataset):
    spec = rival.specification(small_run(), runs=1, platform="gpu", compile_mode="off")
    with pytest.raises(UserError, match="the PyTorch rival: PyTorch .* sees no CUDA device"):
        rival.measure(spec, dataset, ready=None, row=None)


def test_a_mode_that_compiles_too_long_gives_way_in_auto_only(dataset, monkeypatch):
    """On a GPU: a child that sleeps in max-autotune, and in any other mode is ready at once."""
    code = ("import json, sys, time\nspec = json.load(open(sys.argv[-1]))\n"
            "time.sleep(0 if 'modes' in spec else 60)\n"
            "print(json.dumps({'ready': {'failed': [], 'modes': spec['modes']}}))")
    popen = subprocess.Popen
    monkeypatch.setattr(children.subprocess, "Popen", lambda command, **options: popen(
        [sys.executable, "-c", code, command[-1]], **options))
    monkeypatch.setattr(rival, "_PATIENCE_SECONDS", 0.2)
    spec, heard = {"compile": "auto", "platform": "gpu"}, []
    rival.measure(spec, dataset, ready=heard.append, row=None)
    assert heard == [{"ready": {"failed": ["auto from max-autotune on: not ready within 0.2 s"],
                                "modes": ["default", "off"]}}]
    for options in ({"compile": "max-autotune"}, {"platform": "cpu"}):
        asked = []

        class Child:
            def __init__(self, *words):
                pass

            def receive(self, limit=0, *, may_end=False, asked=asked):
                asked.append(limit)
                return None if may_end else {"ready": {"failed": []}}

            def close(self):
                pass

        with monkeypatch.context() as patch:
            patch.setattr(children, "Child", Child)
            rival.measure({**spec, **options}, dataset, ready=heard.append, row=None)
        assert asked == [0, 0]


def test_a_compile_mode_that_fails_gives_way_in_auto_only(monkeypatch):
    class Fake:
        cuda = True

        def __init__(self, spec, arrays, *, compile_mode):
            self.mode = compile_mode

        def run(self, seed):
            if self.mode == "max-autotune":
                raise RuntimeError("no Triton")

    monkeypatch.setattr(torch_rival, "Rival", Fake)
    spec = {"platform": "gpu", "compile": "auto", "runs": 3}
    made, apart = torch_rival.prepare(spec, {})
    assert made.mode == apart["compile"] == "default"
    assert apart["failed"] == ["max-autotune: RuntimeError: no Triton"]
    with pytest.raises(RuntimeError, match="no Triton"):
        torch_rival.prepare(spec | {"compile": "max-autotune"}, {})


@pytest.mark.parametrize(("change", "message"), [
    ({"speedrun.keep_share": 0.5}, "no data selection"),
    ({"optimizer.name": "adam"}, "has SGD, and Muon"),
    ({"optimizer.muon_rest": "adamw"}, "muon_rest 'adamw'"),
    ({"speedrun.tta_share": 0.2}, "has no config.speedrun.tta_share: set it to 1.0"),
    ({"max_grad_norm": 1.0}, "has no config.max_grad_norm"),
    ({"max_grad_value": 0.1}, "has no config.max_grad_value"),
    ({"accumulate_steps": 2}, "has no config.accumulate_steps: set it to 1"),
])
def test_what_has_no_rival_is_explained(change, message):
    config = small_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        rival.check(config)


def test_decay_that_the_rival_has_not_is_refused_before_our_runs(dataset, monkeypatch, tmp_path):
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: dataset)
    config = small_config()
    config.optimizer.decay_exclude = ""
    with pytest.raises(UserError, match="rival's Muon has no weight decay, and .*conv.* has"):
        driver.run(config, 1, name="speedrun_94", out=str(tmp_path), rival=True)
    assert not list(tmp_path.iterdir()), "no run"


def test_a_rival_without_torch_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        rival.check(small_config())
