"""Every model against its torch twin, same weights: logits, gradients, BatchNorm statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch_twins import TWINS, randomized

from jaxcifar import models, torch_weights

TINY = {"blocks": (1, 1), "channels": (4, 6), "stem_width": 4}
CASES = {
    "k1": ("resnet5m", TINY | {"shortcut_kernel": 1}),
    "k2": ("resnet5m", TINY | {"shortcut_kernel": 2, "channels": (6, 8)}),
    "k3": ("resnet5m", {"blocks": (1, 2, 1), "channels": (6, 6, 8), "stem_width": 4}),
    "kernel 5, pool 4": ("resnet5m", TINY | {"kernel_size": 5, "stem_kernel": 5, "pool": 4}),
    "cnn3": ("cnn3", {"filters": (4, 6, 8), "hidden": (12, 5)}),
}


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=CASES, ids=str)
def pair(request):
    """A model, its variables, and the torch twin that they were taken from."""
    name, options = CASES[request.param]
    torch.manual_seed(0)
    twin = randomized(TWINS[name](num_classes=7, **options))
    variables = torch_weights.from_torch(name, twin.state_dict(), num_classes=7, **options)

    def exported(variables):
        return torch_weights.to_torch(name, variables, num_classes=7, **options)
    return models.create(name, 7, **options), variables, twin, exported


def batch(sample_images):
    """Eight images, scaled like a normalised batch, and labels.

    No flat ones: there a ReLU whose input is zero to rounding flips for a thousand pixels at once.
    """
    images = (sample_images[1::4][:8].astype(np.float32) / 255 - 0.45) / 0.2
    return images, np.arange(8) % 7


def assert_close(actual, expected, scale, name=""):
    expected = np.asarray(expected)
    atol = scale * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


def test_logits_in_evaluation(pair, sample_images):
    model, variables, twin, _ = pair
    images, _ = batch(sample_images)
    with torch.no_grad():
        expected = twin.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert_close(jax.jit(model.apply, static_argnums=2)(variables, images, False), expected, 1e-4)


def test_training_logits_gradients_and_running_statistics(pair, sample_images):
    model, variables, twin, exported = pair
    images, labels = batch(sample_images)

    @jax.jit
    def gradients(params):
        def loss(params):
            logits, new = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
            return losses.mean(), (logits, new)
        return jax.grad(loss, has_aux=True)(params)

    grads, (logits, new) = gradients(variables["params"])
    twin = twin.double().train()  # the oracle's own rounding stays out of the comparison
    theirs = twin(torch.from_numpy(images.transpose(0, 3, 1, 2)).double())
    F.cross_entropy(theirs, torch.from_numpy(labels)).backward()
    assert_close(logits, theirs.detach().numpy(), 1e-4)
    largest = max(float(p.grad.abs().max()) for p in twin.parameters())
    ours = exported({**variables, "params": grads})
    for key, parameter in twin.named_parameters():
        np.testing.assert_allclose(
            ours[key], parameter.grad, rtol=1e-3, atol=1e-5 * largest, err_msg=key)
    ours = exported({**variables, **new})
    for key, buffer in twin.named_buffers():
        if "running" in key:
            assert_close(ours[key], buffer, 1e-5, key)
