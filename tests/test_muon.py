"""Muon against its definition by singular values; Newton-Schulz; which parameters it takes."""

import jax
import numpy as np
import pytest
from test_optim import assert_same_path, make_params, torch_train, train

from jaxcifar import muon, optim


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
