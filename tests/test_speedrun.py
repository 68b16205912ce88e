"""The speedrun: its network, its step, both of its forms, and its command."""

import functools
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_configs import load

from jaxcifar import models, parallel, seeds, torch_weights, train
from jaxcifar import config as config_lib
from jaxcifar.augment import ops
from jaxcifar.errors import UserError
from jaxcifar.models import conv, speedrun_net
from jaxcifar.speedrun import driver, torch_network, training
from jaxcifar.speedrun import trainer as trainer_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_TRAIN, NUM_TEST = 100, 30


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def small_config(variant="94", **options):
    """Return a speedrun configuration with a narrow network: 6 steps to an epoch, float32."""
    config = load("speedrun").get_config(variant)
    config.model.channels = (4, 6)
    config.dtype = "float32"
    config.precision = "highest"
    config.batch_size = config.eval_batch_size = 16
    config.compilation_cache = tiny.CACHE
    config.optimizer.learning_rate *= 0.2
    config.speedrun.update(epochs=1.5, whiten_bias_epochs=0.5, **options)
    return config


def small_run(variant="94", **options):
    return training.create(small_config(variant, **options), NUM_TRAIN, 10)


@pytest.fixture(scope="module")
def dataset():
    return tiny.tiny_dataset(NUM_TRAIN, NUM_TEST)


@pytest.fixture(scope="module")
def on_device(dataset):
    return tuple(jax.tree.map(jnp.asarray, split) for split in driver._splits(dataset))


@pytest.fixture(scope="module")
def trained(on_device):
    """The loop form, step by step: (Trainer, Prepared, State before each step and at the end)."""
    run = small_run()
    trainer = trainer_lib.Trainer(run, parallel.create(run.config), rolled=False)
    trainer.compile(*on_device)
    prepared, state = trainer._start(jnp.uint32(3), *on_device[0])
    states = [jax.tree.map(np.asarray, state)]
    for number in range(run.total_steps):
        state = trainer._steps[number < run.bias_steps](
            state, prepared, jnp.uint32(3), jnp.int32(number))
        states.append(jax.tree.map(np.asarray, state))
    return trainer, prepared, states


def largest_difference(a, b):
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return float(np.max([np.abs(x - y).max() for x, y in pairs]))  # NaN stays NaN


# The network


@pytest.mark.parametrize("depth", [2, 3])
def test_the_network_equals_its_torch_twin(depth, sample_images):
    torch.manual_seed(0)
    images = np.asarray(ops.normalize(sample_images[:4], (0.5,) * 3, (0.25,) * 3))
    options = {"channels": (4, 6, 8), "depth": depth, "head_scale": 0.25}
    twin = torch_network.create(**options).train()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p += 0.1 * torch.randn(p.shape)
    seen = torch.tensor(images.transpose(0, 3, 1, 2))
    start = torch_weights.from_torch("speedrun94", twin.state_dict(), **options)
    expected = twin(seen).detach().numpy()
    model = models.create("speedrun94", **options)
    with jax.default_matmul_precision("highest"):
        actual, changed = jax.jit(functools.partial(
            model.apply, train=True, mutable=["batch_stats"]))(start, images)
        after = torch_weights.from_torch("speedrun94", twin.state_dict(), **options)
        evaluated = jax.jit(functools.partial(model.apply, train=False))(after, images)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=1e-4 * scale)
    np.testing.assert_allclose(evaluated, twin.eval()(seen).detach().numpy(), atol=1e-4 * scale)
    assert largest_difference(changed["batch_stats"], after["batch_stats"]) < 1e-4
    assert largest_difference(changed["batch_stats"], start["batch_stats"]) > 1e-2


def test_whitening_gives_identity_covariance(sample_images):
    images = ops.normalize(sample_images, (0.5,) * 3, (0.25,) * 3)
    kernel = speedrun_net.whitening_kernel(images, eps=0.0)
    assert kernel.shape == (2, 2, 3, 24)
    with jax.default_matmul_precision("highest"):
        outputs = np.asarray(conv.conv2d(images, kernel), np.float64)
    first, second = np.split(outputs.reshape(-1, 24), 2, axis=1)
    np.testing.assert_allclose(first.T @ first / len(first), np.eye(12), atol=2e-3)
    np.testing.assert_array_equal(first, -second)
    damped = speedrun_net.whitening_kernel(images, eps=0.1)
    assert (jnp.linalg.norm(damped[..., 0]) < 0.9 * jnp.linalg.norm(kernel[..., 0]))


@pytest.mark.parametrize(("channels", "features"), [(5, 8), (6, 4), (6, 6)])
def test_dirac_filters_pass_their_channel_on(channels, features):
    kernel = speedrun_net.dirac(jax.random.key(0), (3, 3, channels, features))
    x = jax.random.normal(jax.random.key(1), (2, 7, 7, channels))
    y = conv.conv2d(x, kernel, padding=((1, 1), (1, 1)))
    same = min(channels, features)
    np.testing.assert_allclose(y[..., :same], x[..., :same], atol=1e-6)
    drawn = np.asarray(kernel[..., same:])
    assert np.abs(drawn).max(initial=0) <= (9 * channels) ** -0.5
    assert (drawn != 0).all()


def test_the_head_has_the_asked_deviation():
    kernel = speedrun_net.scaled_to(1.0)(jax.random.key(0), (16, 10))
    assert np.std(kernel, ddof=1) == pytest.approx(1, abs=1e-5)


# The training


def test_one_program_equals_the_loop(trained, on_device):
    trainer, _, states = trained
    whole = trainer_lib.Trainer(trainer.run, trainer.devices, rolled=True)
    whole.compile(*on_device)
    variables = whole.train(3, on_device[0])
    ours = jax.tree.map(np.asarray, variables)
    loop = training.result(states[-1])
    assert whole.evaluate(variables, on_device[1]) == trainer.evaluate(loop, on_device[1])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(loop), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert largest_difference(loop["params"], states[0].params) > 0.05
    again = jax.tree.map(np.asarray, trainer.train(3, on_device[0]))
    jax.tree.map(np.testing.assert_array_equal, again, loop)


def test_the_first_layer_is_whitening_and_its_bias_freezes(trained, dataset):
    trainer, _, states = trained
    config = trainer.run.config
    seen = ops.normalize(dataset.train_images, config.mean, config.std)
    kernel = speedrun_net.whitening_kernel(seen, config.speedrun.whiten_eps)
    for state in states:
        np.testing.assert_allclose(state.params["whiten"]["kernel"], kernel, rtol=1e-2, atol=1e-3)
    biases = [state.params["whiten"]["bias"] for state in states]
    moved = [not np.array_equal(a, b) for a, b in zip(biases, biases[1:])]
    assert moved == [True] * 3 + [False] * 6


def test_a_step_turns_filters_of_fixed_norm_by_an_orthogonal_update(trained):
    trainer, _, states = trained
    for number in (0, 5):
        before, after = (s.params["group2"]["conv2"]["kernel"].reshape(-1, 6)
                         for s in states[number:number + 2])
        unit = before * 6**0.5 / np.linalg.norm(before)
        rate = float(training.learning_rate(trainer.run, number))
        values = np.linalg.svd((unit - after) / rate, compute_uv=False)
        assert 0.2 < values.min() and values.max() < 1.3 and values.mean() > 0.6


def torch_muon(p, buffer, rate):
    """Take airbench94_muon's step of one filter bank [out, ...], by its singular values."""
    buffer.mul_(0.6).add_(p.grad)
    ahead = (p.grad + 0.6 * buffer).double().flatten(1)
    u, values, vt = torch.linalg.svd(ahead, full_matrices=False)
    values = values / values.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    p.data *= len(p) ** 0.5 / p.data.norm()
    p.data -= rate * (u * values @ vt).reshape(p.shape).float()


def test_steps_equal_those_of_torch(trained):
    """Five steps, the last two without the first layer's bias: our images, all else torch's."""
    trainer, prepared, states = trained
    run, base, options = trainer.run, 0.2 * 0.24, {"channels": (4, 6), "head_scale": 1 / 256}
    twin = torch_network.create(**options).train()
    start = {"params": states[0].params, "batch_stats": states[0].batch_stats}
    weights = torch_weights.to_torch("speedrun94", start, **options)
    twin.load_state_dict({key: torch.tensor(value) for key, value in weights.items()}, strict=False)
    named = dict(twin.named_parameters())
    filters = {p: torch.zeros_like(p) for key, p in named.items() if "conv" in key}
    rates = {key: base * (0.67 if key == "head.weight" else 0.053) / 0.24
             for key, p in named.items() if p not in filters and key != "whiten.weight"}
    # Our small base rate leaves weight_decay / rate as it is, so a step takes less than 0.004.
    sgd = torch.optim.SGD([
        {"params": [named[key]], "lr": rate, "weight_decay": 0.2 * 0.004 / rate}
        for key, rate in rates.items()], momentum=0.85, nesterov=True)
    batch = jax.jit(functools.partial(training.batch, run))
    for number in range(5):
        images, labels = (torch.tensor(np.array(x)) for x in batch(
            prepared, jnp.uint32(3), jnp.int32(number)))
        logits = twin(images.permute(0, 3, 1, 2))
        twin.zero_grad()
        torch.nn.functional.cross_entropy(
            logits, labels.long(), reduction="sum", label_smoothing=0.2).backward()
        if number >= run.bias_steps:
            twin.whiten.bias.grad = None
        for group, (key, rate) in zip(sgd.param_groups, rates.items(), strict=True):
            group["lr"] = rate * (1 - number / (run.bias_steps if "whiten" in key else 9))
        sgd.step()
        for p, buffer in filters.items():
            torch_muon(p, buffer, base * (1 - number / 9))
        after = torch_weights.from_torch("speedrun94", twin.state_dict(), **options)
        ours = {"params": states[number + 1].params, "batch_stats": states[number + 1].batch_stats}
        for a, b in zip(*map(jax.tree.leaves, (ours, after)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max(), err_msg=str(number))


def test_rates_and_decay_are_those_of_the_recipes():
    """Rates at the ends; every parameter that decays loses the same share of itself in a step."""
    create = functools.partial(training.create, num_train=50_000, num_classes=10)
    speedrun = load("speedrun")
    runs = {v: create(speedrun.get_config(v)) for v in speedrun.VARIANTS}
    assert {v: (r.total_steps, r.bias_steps) for v, r in runs.items()} == {
        "94": (200, 75), "94_sgd": (476, 144), "96": (1776, 144), "96_selected": (2160, 144)}
    rate = {v: [float(training.learning_rate(r, s))
                for s in (0, int(0.23 * r.total_steps), r.total_steps)] for v, r in runs.items()}
    base = 11.5 / 1024 / (1 + 1 / 0.15)
    np.testing.assert_allclose(rate["94"], [0.24, 0.24 * 0.77, 0], rtol=1e-6)
    np.testing.assert_allclose(rate["94_sgd"], [0.2 * base, base, 0.07 * base], rtol=1e-6)
    own = [float(training.bias_share(runs["94"], s)) * float(training.learning_rate(runs["94"], s))
           for s in (0, 30, 75)]
    np.testing.assert_allclose(own, [0.24, 0.24 * 0.6, 0], rtol=1e-5)
    leaf = jnp.ones(3)
    tree = {"group1": {"conv1": {"kernel": leaf}, "norm1": {"bias": leaf}},
            "head": {"kernel": leaf}, "whiten": {"bias": leaf}}
    zeros = jax.tree.map(jnp.zeros_like, tree)
    decay = {v: training._decayed(r.config, zeros, tree) for v, r in runs.items()}
    for variant, path, factor, share in (
            ("94", ("group1", "conv1", "kernel"), 1, 0), ("94", ("head", "kernel"), 0.67, 0.004),
            ("94", ("group1", "norm1", "bias"), 0.053, 0.004),
            ("94", ("whiten", "bias"), 0.053, 0.004),
            ("94_sgd", ("head", "kernel"), base, 0.0153 * 1024 * base / 11.5),
            ("94_sgd", ("group1", "norm1", "bias"), 64 * base, 0.0153 * 1024 * base / 11.5)):
        added = functools.reduce(lambda tree, key: tree[key], path, decay[variant])
        assert float(added[0]) * factor == pytest.approx(share, rel=1e-4), (variant, path)


@pytest.mark.parametrize(("variant", "epochs", "kept"), [("96", 37, 1.0), ("96_selected", 45, 0.5)])
def test_both_recipes_for_96_have_the_newer_network_and_rates(variant, epochs, kept):
    """Those of airbench96 after the paper: narrower, torch's momentum in BatchNorm, no rate left."""
    run = training.create(load("speedrun").get_config(variant), 50_000, 10)
    model, options = run.task.model, run.config.speedrun
    assert (model.channels, model.depth, model.bn_momentum) == ((128, 384, 512), 3, 0.1)
    assert (options.epochs, options.keep_share) == (epochs, kept)
    assert (options.translate, options.cutout, options.lookahead_every) == (4, 12, 5)
    base, total = 9.0 / 1024 / (1 + 1 / 0.15), run.total_steps
    rates = [float(training.learning_rate(run, step)) for step in (0, int(0.1 * total), total)]
    np.testing.assert_allclose(rates, [0.2 * base, base, 0], rtol=1e-6)
    assert run.config.optimizer.weight_decay * base == pytest.approx(0.012 * 1024 * base / 9.0)


def test_lookahead_equals_its_recurrence():
    run = small_run("94_sgd", lookahead_every=2)
    fast = slow = np.float64(1.0)
    state = training.State({"w": jnp.float32(1)}, {"m": jnp.float32(1)}, (), {
        "params": {"w": jnp.float32(1)}, "batch_stats": {"m": jnp.float32(1)}})
    for number in range(run.total_steps):
        fast += 0.5 + number
        moved = jax.tree.map(lambda x: x + 0.5 + number, (state.params, state.batch_stats))
        state = training._looked_ahead(
            run, training.State(*moved, (), state.slow), jnp.int32(number))
        if number % 2:
            decay = 0.95**2 * ((number + 1) / run.total_steps) ** 3
            slow = fast = decay * slow + (1 - decay) * fast
        np.testing.assert_allclose(state.params["w"], fast, rtol=1e-5)
    np.testing.assert_allclose(training.result(state)["params"]["w"], slow, rtol=1e-5)
    np.testing.assert_allclose(training.result(state)["batch_stats"]["m"], slow, rtol=1e-5)


# The command


def test_runs_are_summed_up(trained, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: dataset)
    monkeypatch.setattr(driver, "Trainer", lambda *_, rolled: trained[0])  # compiled already
    stream = io.StringIO()
    content = driver.run(small_config(), 2, name="speedrun_94", out=str(tmp_path), stream=stream)
    rows = content["runs"]
    assert [row["seed"] for row in rows] == [0, 1]
    assert content["accuracy_tta"]["mean"] == np.mean([row["accuracy_tta"] for row in rows])
    assert content["seconds"]["std"] == pytest.approx(
        np.std([row["seconds"] for row in rows], ddof=1))
    assert all(0 < row["seconds"] < row["seconds_with_evaluation"] for row in rows)
    assert set(content["apart_seconds"]) == {"data", "transfer", "compile"}
    written = json.loads((tmp_path / "speedrun_94_cpu.json").read_text(encoding="utf-8"))
    assert written["runs"] == rows and written["environment"]["jax"] == jax.__version__
    text = stream.getvalue()
    assert "mean of 2 run(s)" in text and "9 steps of 16 images (1.5 epochs)" in text


@pytest.mark.parametrize(("change", "message"), [
    ({"speedrun.epochs": 0.0}, "is no speedrun"),
    ({"model.name": "resnet5m"}, "made for"),
    ({"batch_size": 101}, "larger than the training set"),
    ({"optimizer.muon_rest": "sdg"}, "did you mean 'sgd'"),
    ({"augment": "flip"}, "a speedrun does not read it.*config.speedrun.translate"),
    ({"val_size": 20}, "val_size = 20: a speedrun does not read it, and it must be 0"),
    ({"seed": 3}, "--runs=N takes the seeds"),
    ({"num_devices": 0}, "one program on one device; set 1 and auto"),
    ({"parallel": "pmap"}, "one program on one device"),
])
def test_what_is_no_speedrun_is_explained(change, message):
    config = small_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        training.create(config, NUM_TRAIN, 10)


def test_another_configuration_is_refused_in_one_line():
    process = subprocess.run(
        [sys.executable, "-m", "jaxcifar.speedrun", "--config=configs/quickstart.py", "--runs=2"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120)
    assert process.returncode == 2
    assert process.stderr.startswith("error: config.speedrun.epochs = 0")
    assert len(process.stderr.splitlines()) == 1


def test_speedrun_fields_leave_older_hashes_valid():
    fields = config_lib.flatten(config_lib.to_dict(config_lib.default()))
    assert not [path for path in config_lib.effective(fields)
                if path.startswith(("speedrun.", "optimizer.muon_"))]


def test_the_training_loops_refuse_a_speedrun(tmp_path):
    config = load("speedrun").get_config("94")
    with pytest.raises(UserError, match="python -m jaxcifar.speedrun"):
        train.fit(config, tmp_path)
    with pytest.raises(UserError, match="python -m jaxcifar.speedrun"):
        seeds.run(config, [0, 1], tmp_path, way="yes")
