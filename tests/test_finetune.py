"""Fine-tuning: frozen parameters, frozen BatchNorms, shares of the rate, features computed once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import twins_imagenet
from test_invariants import StopAfter
from torch_twins import randomized

from jaxcifar import config as config_lib
from jaxcifar import features, partition, splits, steps, torch_weights
from jaxcifar.errors import UserError
from jaxcifar.models import counts
from jaxcifar.state import create_state
from jaxcifar.task import create_task
from jaxcifar.train import Interrupted

RESNET = {"channels": (4, 6), "blocks": (1, 1)}
MOBILE = {"blocks": ((3, 8, 8, True, "RE", 2), (3, 12, 10, False, "HS", 2)), "stem_width": 8,
          "last_width": 16}
EFFICIENT = {"stages": (("fused", 1, 1, 8, 1), ("mb", 2, 2, 10, 2)), "stem_width": 8,
             "last_width": 16}


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def configured(model="imagenet_resnet18", options=None, **fields):
    config = tiny.tiny_config(**{"augment": "resize(64)", "trainable": "^fc/", **fields})
    config.model = config_lib.model(model, **(RESNET if options is None else options))
    return config


def task_of(*args, **fields):
    config = configured(*args, **fields)
    config_lib.validate(config)
    return create_task(config, num_train=100, num_classes=10)


def batch_of(task, count=8, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    return steps.Batch(task.normalize(images), jnp.asarray(labels), None, count, jax.random.key(1))


def compiled_step(task, state, batch, optimize=False):
    """Return the train step, compiled; by default without optimisation, in a fraction of the time."""
    lowered = jax.jit(functools.partial(steps.train_step, task)).lower(state, batch)
    options = {} if optimize else {"xla_backend_optimization_level": 0}
    return lowered.compile(compiler_options=options)


def train(task, state, num_steps=2):
    step = compiled_step(task, state.on_device(), batch_of(task))
    state = state.on_device()
    for i in range(num_steps):
        state = step(state, batch_of(task, seed=i))[0]
    return state


def leaves(tree):
    """Return {path: array}."""
    return {partition.path_name(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_split_and_merge_are_inverse():
    params = {"a": {"kernel": 1, "bias": 2}, "b": {"c": {"kernel": 3}}, "d": {"scale": 4}}
    trained, frozen = partition.split(params, "^b/|bias")
    assert trained == {"a": {"bias": 2}, "b": {"c": {"kernel": 3}}}
    assert frozen == {"a": {"kernel": 1}, "d": {"scale": 4}}
    assert partition.merge(trained, frozen) == params == partition.merge(frozen, trained)
    assert partition.split(trained, "^b/|bias") == (trained, {})
    assert partition.split(params, "") == (params, {}) and partition.merge(params, {}) is params


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_frozen_parameters_stay_and_have_no_optimiser_state(norm):
    task = task_of(optimizer__name="adam", optimizer__momentum=0.0, optimizer__weight_decay=0.01,
                   frozen_batch_norm=norm)
    before = create_state(task, 0)
    after = train(task, before)
    old, new = leaves(before.params), leaves(after.params)
    assert {path for path in old if (old[path] != new[path]).any()} == {"fc/kernel", "fc/bias"}
    moments = leaves(after.opt_state)
    assert sum(leaf.size for leaf in moments.values()) == 2 * (6 * 10 + 10) + 1  # Adam's count
    stats = leaves(before.batch_stats), leaves(after.batch_stats)
    changed = {path for path in stats[0] if (stats[0][path] != stats[1][path]).any()}
    assert changed == (set(stats[0]) if norm == "batch" else set())


def test_the_last_stage_trains_with_its_batch_norms():
    task = task_of(trainable="^layer2|^fc/", frozen_batch_norm="running")
    before = create_state(task, 0)
    after = train(task, before)
    old, new = leaves(before.params), leaves(after.params)
    changed = {path for path in old if (old[path] != new[path]).any()}
    assert changed == {path for path in old if path.startswith(("layer2", "fc"))}
    old, new = leaves(before.batch_stats), leaves(after.batch_stats)
    changed = {path for path in old if (old[path] != new[path]).any()}
    assert changed == {path for path in old if path.startswith("layer2")}


def convolutions(function, *arguments):
    """Return the number of convolutions that a function computes, those inside its parts included."""
    return sum(equation.primitive.name == "conv_general_dilated"
               for equation in counts.equations(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_a_frozen_backbone_costs_a_forward_pass():
    counts = {}
    for trainable in ("^fc/", "^layer2.0/conv2/|^fc/", ""):
        task = task_of(trainable=trainable)
        state, batch = create_state(task, 0), batch_of(task)
        counts[trainable] = convolutions(lambda s, t=task, b=batch: steps.train_step(t, s, b), state)
        forward = convolutions(lambda v, t=task, b=batch: t.model.apply(v, b.images, train=False),
                               state.variables())
    assert counts["^fc/"] == forward > 3
    assert forward < counts["^layer2.0/conv2/|^fc/"] <= forward + 2 < counts[""]


@functools.cache
def twin_of(model):
    """Return (a twin with weights of its own, the model's options without dropout)."""
    if model == "imagenet_resnet18":
        return randomized(twins_imagenet.ImageNetResNet(10, **RESNET)), RESNET
    if model == "mobilenet_v3_small":
        return (randomized(twins_imagenet.MobileNetV3(10, dropout=0.0, **MOBILE)),
                MOBILE | {"dropout": 0.0})
    return (randomized(twins_imagenet.EfficientNetV2(10, dropout=0.0, **EFFICIENT)),
            EFFICIENT | {"dropout": 0.0, "stochastic_depth": 0.0})


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize(("model", "head"), [
    ("imagenet_resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"),
    ("efficientnet_v2_s", "classifier.1")])
def test_the_heads_gradient_and_the_statistics_are_torchs(model, head, norm):
    twin, options = twin_of(model)
    task = task_of(model, options, trainable=f"^{head}/", frozen_batch_norm=norm,
                   optimizer__momentum=0.0, optimizer__learning_rate=1.0)
    variables = torch_weights.from_torch(model, twin.state_dict(), image_size=64, **options)
    state = create_state(task, 0).on_device().replace(**variables)
    batch = batch_of(task)
    new = compiled_step(task, state, batch)(state, batch)[0]

    twin = torch_copy(twin, norm)
    loss = torch.nn.functional.cross_entropy(
        twin(torch.from_numpy(np.array(batch.images).transpose(0, 3, 1, 2).copy())),
        torch.from_numpy(np.array(batch.targets)).long())
    loss.backward()
    layer = twin.get_submodule(head)
    for name, grad in (("kernel", layer.weight.grad.T), ("bias", layer.bias.grad)):
        ours = np.asarray(state.params[head][name]) - np.asarray(new.params[head][name])
        grad = grad.numpy()
        np.testing.assert_allclose(ours, grad, rtol=0, atol=1e-4 * np.abs(grad).max())
    expected = torch_weights.from_torch(model, twin.state_dict(), image_size=64, **options)
    for path, value in leaves(expected["batch_stats"]).items():
        np.testing.assert_allclose(leaves(new.batch_stats)[path], value, rtol=1e-4, atol=1e-5,
                                   err_msg=path)


def torch_copy(twin, norm):
    """Return a copy in train mode with frozen weights; its BatchNorms in `norm` mode."""
    import copy
    twin = copy.deepcopy(twin).train()
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(norm == "batch")
    return twin


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_shares_of_the_rate_are_torchs_parameter_groups(name):
    momentum = {"optimizer__momentum": 0.9 if name == "sgd" else 0.0}
    task = task_of(trainable="", optimizer__name=name, optimizer__learning_rate=0.1,
                   optimizer__weight_decay=0.05, lr_multipliers="conv=0.1; ^bn1/|layer=0.5",
                   **momentum)
    params = {"conv1": {"kernel": jnp.arange(4.0)}, "bn1": {"bias": jnp.ones(2)},
              "fc": {"kernel": -jnp.ones(3)}}
    tensors = {key: torch.nn.Parameter(torch.tensor(np.array(jax.tree.leaves(value)[0])))
               for key, value in params.items()}
    shares = {"conv1": 0.1, "bn1": 0.5, "fc": 1.0}
    groups = [{"params": [tensors[key]], "lr": 0.1 * share} for key, share in shares.items()]
    cls = {"sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}
    theirs = cls[name](groups, weight_decay=0.05)
    state = task.tx.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(p + i), params)
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(np.array(jax.tree.leaves(grads[key])[0]))
        updates, state = task.tx.update(grads, state, params, weight_decay=0.05)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        theirs.step()
        for key, tensor in tensors.items():
            np.testing.assert_allclose(jax.tree.leaves(params[key])[0], tensor.detach(), rtol=2e-6)


@pytest.mark.parametrize(("model", "options", "head"), [
    ("imagenet_resnet18", RESNET, "^fc/"), ("mobilenet_v3_small", MOBILE, "^classifier.3/")])
def test_cached_features_change_nothing(model, options, head, tmp_path, monkeypatch):
    """The MobileNet has dropout before its last layer: it is drawn alike on both paths."""
    results = {}
    for cached in (True, False):
        config = configured(model, options, trainable=head, frozen_batch_norm="running",
                            cache_features=cached, ema_decay=0.9)
        summary, rows = tiny.fit(config, tmp_path / str(cached), monkeypatch)
        results[cached] = summary.state, rows, summary.result["test_loss"]
    (one, rows, loss), (other, other_rows, other_loss) = results[True], results[False]
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for row, expected in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_on_cached_features_resumes_to_the_same_bits(tmp_path, monkeypatch):
    config = configured(frozen_batch_norm="running")
    whole, rows = tiny.fit(config, tmp_path / "whole", monkeypatch)
    with pytest.raises(Interrupted):
        tiny.fit(config, tmp_path / "parts", monkeypatch, stop=StopAfter(2))
    parts, part_rows = tiny.fit(config, tmp_path / "parts", monkeypatch)
    assert part_rows == rows
    jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)


def test_features_are_computed_on_several_devices_too(tmp_path, monkeypatch):
    rows = [tiny.fit(configured(frozen_batch_norm="running", num_devices=count),
                     tmp_path / str(count), monkeypatch)[1] for count in (1, 4)]
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("why", "fields"), [
    ("", {}),
    ("", {"augment": "resize(70)|center_crop(64)"}),
    ("nothing is frozen", {"trainable": "", "frozen_batch_norm": "batch"}),
    ("config.cache_features = False", {"cache_features": False}),
    ("the augmentation is random", {"augment": "flip|resize(64)"}),
    ("the augmentation is random", {"augment": "resize(64)|mixup(1.0)"}),
    ("more than the last layer is trained", {"trainable": "^fc/|^layer2"}),
    ("frozen BatchNorms use batch statistics", {"frozen_batch_norm": "batch"}),
])
def test_features_are_cached_only_where_they_stay_the_same(why, fields):
    found = features.obstacle(task_of(**{"frozen_batch_norm": "running", **fields}))
    assert found.startswith(why) and bool(found) == bool(why)


def test_stochastic_depth_and_models_without_a_head_are_not_cached():
    fields = {"trainable": "^classifier.1/", "frozen_batch_norm": "running"}
    found = features.obstacle(task_of("efficientnet_v2_s", EFFICIENT, **fields))
    assert found == "the backbone has dropout or stochastic depth"
    options = EFFICIENT | {"stochastic_depth": 0.0}
    assert features.obstacle(task_of("efficientnet_v2_s", options, **fields)) == ""
    options = {"channels": (4, 8), "blocks": (1, 1), "stem_width": 4}
    found = features.obstacle(task_of("resnet5m", options, trainable="linear", augment="",
                                      frozen_batch_norm="running"))
    assert found == "model 'resnet5m' has no separate head"


def test_training_features_take_the_training_transform():
    task = task_of(frozen_batch_norm="running", augment="resize(96)|center_crop(64)",
                   eval_transform="resize(64)")
    state = create_state(task, 0)
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    data = {"images": images, "labels": np.arange(6, dtype=np.int32)}
    arrays = splits.Arrays(data, data, {}, ())
    cached, arrays = features.on_features(task, state.variables(), arrays)
    keys = jax.random.split(jax.random.key(0), 6)
    seen = task.augment(jnp.asarray(images), data["labels"], keys, keys[0])[0]
    for inputs, found in ((seen, arrays.train), (task.normalize(images), arrays.held_out)):
        logits = task.model.apply(state.variables(), inputs, train=False)
        ours = cached.model.apply(state.variables(), found["images"], train=False)
        np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-5)
    assert np.abs(arrays.train["images"] - arrays.held_out["images"]).max() > 1e-2


@pytest.mark.parametrize(("model", "options"), [
    ("imagenet_resnet18", {"channels": (8, 8), "blocks": (2, 2)}), ("mobilenet_v3_small", MOBILE)])
def test_rematerialisation_changes_memory_not_gradients(model, options):
    results, memory = [], []
    for remat in (False, True):
        task = task_of(model, options, trainable="", remat=remat)
        state, batch = create_state(task, 0).on_device(), batch_of(task)
        program = compiled_step(task, state, batch, optimize=True)
        results.append(program(state, batch)[0])
        memory.append(program.memory_analysis().temp_size_in_bytes)
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    if model == "imagenet_resnet18":
        assert memory[1] < memory[0]


@pytest.mark.parametrize(("fields", "message"), [
    ({"trainable": "^head/"}, "config.trainable = '.head/' matches no parameter.*conv1.*fc"),
    ({"trainable": "(fc"}, "config.trainable '.fc' is no regular expression"),
    ({"lr_multipliers": "conv1"}, "config.lr_multipliers: 'conv1' is not PATTERN=FACTOR"),
    ({"lr_multipliers": "fc=x"}, "config.lr_multipliers: 'fc=x' is not PATTERN=FACTOR"),
    ({"lr_multipliers": "fc=0.1; conv1=0.2"}, "'conv1' matches no trained parameter"),
    ({"trainable": "", "frozen_batch_norm": "running"}, "must be \"batch\" where nothing is frozen"),
    ({"frozen_batch_norm": "eval"}, "there are: batch, running"),
    ({"augment": "resize(64)|crop(0, size=48)"}, "of 48x48 in training and of 64x64 in evaluation.*"
                                                 r"'resize\(64\)\|center_crop\(48\)'$"),
    ({"eval_transform": "flip"}, "flip is random"),
])
def test_what_cannot_be_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        task_of(**fields)


def test_a_model_whose_parameters_depend_on_the_size_needs_one_size():
    with pytest.raises(UserError, match="other parameters for training images"):
        task_of("lenet", {}, trainable="", augment="resize(40)", eval_transform="")
    with pytest.raises(UserError, match="config.remat = True: model 'lenet' does not offer it"):
        task_of("lenet", {}, trainable="", augment="", remat=True)


def test_the_task_is_the_same_but_for_its_images():
    task = task_of(frozen_batch_norm="running")
    names = {field.name for field in dataclasses.fields(task)}
    data = {"images": np.zeros((3, 32, 32, 3), np.uint8), "labels": np.zeros(3, np.int32)}
    cached, arrays = features.on_features(task, create_state(task, 0).variables(),
                                          splits.Arrays(data, data, {}, ()))
    changed = {name for name in names if getattr(task, name) is not getattr(cached, name)}
    assert changed == {"model", "augment", "normalize"}
    assert arrays.train["images"].shape == (3, 6)
