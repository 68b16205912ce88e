"""Muon against its definition by singular values; Newton-Schulz; which parameters it takes."""

import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
from absl import flags
from test_optim import assert_same_path, make_params, torch_train, train

from jaxcifar import muon, optim, overrides, partition
from jaxcifar.state import create_state
from jaxcifar.task import create_task

ROOT = pathlib.Path(__file__).resolve().parent.parent


class PlainMuon:
    """Muon for one matrix [in, out], by singular values in float64; torch's AdamW for the rest."""

    def __init__(self, torch_optim, leaves, matrix, momentum, decay, steps):
        self.matrix, self.momentum, self.decay, self.steps = leaves[matrix], momentum, decay, steps
        rest = [p for i, p in enumerate(leaves) if i != matrix]
        self.rest = torch_optim.AdamW(rest, 1, weight_decay=decay)
        self.param_groups, self.buffer = [{"lr": 1}, *self.rest.param_groups], 0

    def zero_grad(self):
        self.rest.zero_grad()
        self.matrix.grad = None

    def step(self):
        self.rest.step()
        gradient = self.matrix.grad.double().numpy()
        self.buffer = self.momentum * self.buffer + gradient
        u, values, vt = np.linalg.svd(gradient + self.momentum * self.buffer, full_matrices=False)
        values /= np.linalg.norm(values)
        for _ in range(self.steps):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        rows, columns = self.matrix.shape
        update = (u * values) @ vt * max(1, columns / rows) ** 0.5
        p = self.matrix.data
        p -= self.param_groups[0]["lr"] * (p.new_tensor(update) + self.decay * p)


def test_muon_equals_its_definition():
    def make(o, leaves):  # bn1/scale, fc1/bias, fc1/kernel, fc2/bias, fc2/kernel
        optimizer = PlainMuon(o, leaves, 2, 0.9, 0.05, 5)
        optimizer.rest.param_groups[0]["betas"] = (0.8, 0.95)
        return optimizer

    options = {"muon_momentum": 0.9, "muon_exclude": "^fc2/", "betas": (0.8, 0.95)}
    ours = train(optim.create("muon", **options), 0.01, 0.05)
    assert_same_path(ours, torch_train(make, 0.01), tolerance=1e-4)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_newton_schulz_makes_singular_values_near_one(shape):
    matrices = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    matrices *= np.array([1e-4, 1, 1e4], np.float32)[:, None, None]
    done = np.asarray(muon.orthogonalize(matrices, 5))
    for matrix, result in zip(matrices, done):
        u, _, vt = np.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ result @ vt.T  # diagonal: the singular vectors stay
        values = np.diag(inside)
        assert 0.65 < np.sort(values)[1] and values.max() < 1.3
        assert np.abs(inside - np.diag(values)).max() < 1e-3
        np.testing.assert_allclose(muon.orthogonalize(matrix, 5), result, rtol=1e-4, atol=1e-5)
    assert (np.asarray(muon.orthogonalize(np.zeros(shape), 5)) == 0).all()


def test_kernels_of_one_shape_are_orthogonalised_each_for_itself():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 3, 4, 8), "b": (3, 3, 4, 8), "c": (36, 8), "d": (8, 36), "e": (3, 3, 4, 8)}
    gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    rule = muon.scale_by_muon(0.0, 3)
    updates, _ = rule.update(gradients, rule.init(gradients))
    for name, gradient in gradients.items():
        matrix = gradient.reshape(-1, gradient.shape[-1])
        rows, columns = matrix.shape
        alone = muon.orthogonalize(matrix, 3) * max(1, columns / rows) ** 0.5
        np.testing.assert_allclose(updates[name], alone.reshape(gradient.shape), atol=1e-5)


def test_attentions_projection_is_the_kernel_of_torchs_layout_and_tokens_are_none():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(8, 24)), "pos_embedding": np.ones((1, 5, 8)),
              "cls_token": np.ones((1, 1, 8))}
    params["in_proj_weight"] = params["kernel"].T
    assert re.findall(r"\w+_?\w+", muon.matrices(params, "")) == ["in_proj_weight", "kernel"]
    gradients = {name: params[name].astype(np.float32) for name in ("kernel", "in_proj_weight")}
    rule = muon.scale_by_muon(0.9, 5)
    updates, _ = rule.update(gradients, rule.init(gradients))
    np.testing.assert_allclose(updates["in_proj_weight"], updates["kernel"].T, atol=1e-5)
    np.testing.assert_allclose(  # each of 8 directions near sqrt(3), for 3 outputs of each input
        np.linalg.svd(updates["kernel"], compute_uv=False), np.sqrt(3), rtol=0.35)


@pytest.mark.parametrize("rest", ["sgd", "adam"])
def test_muon_leaves_the_rest_to_its_rule(rest):
    options = {"momentum": 0.9, "decay_exclude": "bias$"}
    params = make_params()
    gradient = jax.tree.map(lambda p: np.float32(0.1) * np.ones_like(p), params)
    both = [optim.create(rest, **options), optim.create("muon", muon_rest=rest, **options)]
    results = [o.update(gradient, o.init(params), params, weight_decay=0.02)[0] for o in both]
    for path in (("fc1", "bias"), ("bn1", "scale")):
        plain, with_muon = (result[path[0]][path[1]] for result in results)
        np.testing.assert_array_equal(plain, with_muon)
    assert np.abs(results[0]["fc2"]["kernel"] - results[1]["fc2"]["kernel"]).max() > 0.01


def test_unit_filters_have_the_norm_of_the_square_root_of_their_number():
    params = make_params()
    scaled = muon.unit_filters(params, "^fc2/")
    np.testing.assert_allclose(np.linalg.norm(scaled["fc1"]["kernel"]), 4, rtol=1e-6)
    ratio = scaled["fc1"]["kernel"] / params["fc1"]["kernel"]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert scaled["fc2"]["kernel"] is params["fc2"]["kernel"]


def config_of(command):
    """Return the configuration that a command line of jaxcifar.main gives."""
    argv = [word.replace("=configs/", f"={ROOT}/configs/") for word in shlex.split(command)[2:]]
    overrides.check(argv)
    given = flags.FlagValues()
    holder = overrides.define("", flag_values=given, sys_argv=argv)
    assert given(argv) == ["jaxcifar.main"]
    return holder.value


def test_the_readmes_command_gives_hidden_layers_to_muon_and_the_rest_to_adamw_at_its_rate():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    command, = re.findall(r"^ +(python .*optimizer\.name=muon.*)$", readme, re.MULTILINE)
    config = config_of(command)
    assert (config.model.name, config.optimizer.name) == ("resnet18", "muon")
    task = create_task(config, 1000, 10)
    params = jax.eval_shape(lambda: create_state(task, 0)).params
    shapes = {partition.path_name(path): leaf.shape
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    hidden = {name for name, shape in shapes.items()
              if len(shape) == 4 and name.startswith("layer")}
    assert len(hidden) == 19 and {"conv1/kernel", "linear/kernel"} <= set(shapes) - hidden
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(  # of a narrow network: only paths and numbers of axes count
        lambda p: rng.normal(size=np.minimum(p.shape, 8)).astype(np.float32), params)
    zeros = jax.tree.map(np.zeros_like, gradients)
    directions, _ = task.tx.update(
        gradients, task.tx.init(zeros), zeros, weight_decay=config.optimizer.weight_decay)
    for path, direction in jax.tree_util.tree_leaves_with_path(directions):
        name, step = partition.path_name(path), config.optimizer.learning_rate * direction
        if name in hidden:  # 0.02 times singular values near 1, for more outputs than inputs more
            matrix = step.reshape(-1, step.shape[-1])
            gain = max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
            value = np.linalg.norm(matrix) / min(matrix.shape) ** 0.5 / gain  # their quadratic mean
            assert 0.7 * 0.02 < value < 1.2 * 0.02, name
        else:  # AdamW's first step is the rate, with the gradient's sign
            np.testing.assert_allclose(np.abs(step), 3e-4, rtol=1e-3, err_msg=name)
