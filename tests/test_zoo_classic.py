"""The classic families against their torch twins: counts, names, logits, gradients, statistics."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from test_zoo_mobile import ZOO
from test_zoo_reports import TWINS as REPORTS
from torch_twins import TWINS, WITHOUT_TWIN, randomized
from twins_classic import GOOGLENETS, MODELS
from twins_densenet import DenseNet
from twins_googlenet import GoogLeNet
from twins_googlenet import Inception as TwinInception
from twins_resnet import (Bottleneck, PreActBlock, PreActBottleneck, ResNet, ResNeXt, SEBlock,
                          WideResNet)
from twins_vgg import VGG, LeNet

from jaxcifar import models, torch_weights
from jaxcifar.errors import UserError
from jaxcifar.models.googlenet import VARIANTS, Inception

FAST_COMPILE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass
class Pair:
    """A model's name and options, its variables, and the twin that these were taken from."""

    name: str
    options: dict
    twin: nn.Module
    variables: Any
    num_classes: int = 10

    def model(self, dtype=jnp.float32):
        return models.create(self.name, self.num_classes, dtype=dtype, **self.options)

    def exported(self, variables):
        return torch_weights.to_torch(
            self.name, variables, num_classes=self.num_classes, **self.options)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def batch(sample_images, count):
    """Images that are scaled like a normalised batch."""
    return (sample_images[1::4][:count].astype(np.float32) / 255 - 0.45) / 0.2


def channels_first(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def calibrated(twin, images):
    """Give BatchNorms random weights and running statistics near those of the images.

    At torch's initial statistics the signal of a deep network dies on its way: logits would show
    the last biases only, and no mistake of the first layers.
    """
    randomized(twin)
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        twin.train()(channels_first(images))
        for norm in norms:
            norm.momentum = 0.1
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))
            norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
            norm.num_batches_tracked.zero_()
    return twin.eval()


def make_pair(name, options, twin, images):
    twin = calibrated(twin, images)
    variables = torch_weights.from_torch(name, twin.state_dict(), **options)
    return Pair(name, options, twin, variables)


@pytest.fixture(scope="module", params=MODELS)
def full_size(request, sample_images):
    torch.manual_seed(0)
    return make_pair(request.param, {}, MODELS[request.param][1](), batch(sample_images, 2))


def compiled(function, *args):
    """Compile without optimisation: several times sooner, and convolutions are as fast."""
    return jax.jit(function).lower(*args).compile(compiler_options=FAST_COMPILE)


def assert_same_logits(pair, images):
    model = pair.model()

    def logits(variables, images):
        return model.apply(variables, images, train=False)
    actual = compiled(logits, pair.variables, images)(pair.variables, images)
    with torch.no_grad():
        expected = pair.twin(channels_first(images)).numpy()
    scale = np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 0.02 * scale  # the logits tell images apart
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)


def test_every_registered_name_has_a_torch_twin_whose_weights_it_takes():
    elsewhere = {"shake_shake26_2x32d", "speedrun94", "speedrun96"}  # test_zoo_best, test_speedrun
    assert set(models.names()) == {*MODELS, *ZOO, *REPORTS, *TWINS, *elsewhere, *WITHOUT_TWIN}


def torch_shapes(variables):
    """Return the shape of every entry of the state_dict that holds these variables."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        path, shape = tuple(entry.key for entry in path), leaf.shape
        if path[-1] == "kernel":
            shape = (*shape[:-3:-1], *shape[:-2])
        shapes[torch_weights.torch_key(path)] = shape
        if path[-1] == "var":
            shapes[".".join((*path[1:-1], "num_batches_tracked"))] = ()
    return shapes


def assert_count_and_shapes(name, options, count, make_twin):
    """Check parameters' number, names, shapes and types, without computing anything."""
    model = models.create(name, dtype=jnp.bfloat16, **options)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), images)
    assert models.count_params(variables["params"]) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32
    with torch.device("meta"):
        expected = make_twin().state_dict()
    assert torch_shapes(variables) == {key: tuple(t.shape) for key, t in expected.items()}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_names_and_shapes(name):
    assert_count_and_shapes(name, {}, *MODELS[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reports_googlenets(variant):
    count, options = GOOGLENETS[variant]
    assert_count_and_shapes(
        "googlenet", VARIANTS[variant], count, lambda: GoogLeNet(**options))


def test_logits_in_evaluation(full_size, sample_images):
    assert_same_logits(full_size, batch(sample_images, 2))


def test_export_is_exact_and_has_the_originals_names(full_size):
    original, exported = full_size.twin.state_dict(), full_size.exported(full_size.variables)
    assert set(exported) == set(original)
    for key, value in original.items():
        np.testing.assert_array_equal(exported[key], value.numpy(), err_msg=key)


def test_logits_of_a_googlenet_with_a_padded_average_pool(sample_images):
    variant, images = "k3_k5_0_5_p2_k5", batch(sample_images, 2)
    torch.manual_seed(0)
    twin = GoogLeNet(**GOOGLENETS[variant][1] | {"width": 0.25})
    options = VARIANTS[variant] | {"width": 0.25}
    assert_same_logits(make_pair("googlenet", options, twin, images), images)


STEM = {"stem_width": 4}
TINY = {"channels": (4, 6), "blocks": (2, 1)} | STEM
SMALL = {  # name, options, the twin: one of each family, and of each kind of block
    "lenet": ("lenet", {}, LeNet),
    "vgg": ("vgg16", {"channels": (4, 6), "blocks": (1, 2)}, lambda: VGG([4, "M", 6, 6, "M"])),
    "bottleneck": ("resnet50", TINY, lambda: ResNet(Bottleneck, **TINY)),
    "preact": ("preact_resnet18", TINY, lambda: ResNet(PreActBlock, norm=False, **TINY)),
    "preact bottleneck": (
        "preact_resnet50", TINY, lambda: ResNet(PreActBottleneck, norm=False, **TINY)),
    "senet": ("senet18", {"channels": (16, 32), "blocks": (1, 1)} | STEM,
              lambda: ResNet(SEBlock, (1, 1), channels=(16, 32), **STEM)),
    "resnext": ("resnext29_2x64d", {"bottleneck_width": 4, "blocks": (1, 1)} | STEM,
                lambda: ResNeXt(2, 4, (1, 1), **STEM)),
    "densenet": ("densenet121", {"growth_rate": 4, "blocks": (2, 1)},
                 lambda: DenseNet((2, 1), 4)),
    "wide_resnet": ("wide_resnet28_10", {"depth": 10, "width": 1}, lambda: WideResNet(10, 1)),
}


def noise(count):
    """Generated images for gradients: in flat areas a ReLU flips for a thousand pixels at once."""
    return np.random.default_rng(0).normal(size=(count, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module", params=SMALL)
def small(request):
    name, options, twin = SMALL[request.param]
    torch.manual_seed(0)
    return make_pair(name, options, twin(), noise(4))


def training(model, variables, images, labels):
    """Return (gradients, (logits, updated statistics)) of the mean cross-entropy."""
    def loss(params):
        logits, new = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, new)
    return jax.grad(loss, has_aux=True)(variables["params"])


def assert_same_statistics(exported, twin):
    for key, buffer in twin.named_buffers():
        if "running" in key:
            buffer = buffer.numpy()
            np.testing.assert_allclose(
                exported[key], buffer, rtol=0, atol=1e-5 * np.abs(buffer).max(), err_msg=key)


def assert_same_training(pair, grads, logits, new):
    """Check a training step's values on noise(4) beside the twin's."""
    images, labels = noise(4), np.arange(4)
    twin = pair.twin.double().train()  # the oracle's own rounding stays out of the comparison
    expected = twin(channels_first(images).double())
    F.cross_entropy(expected, torch.from_numpy(labels)).backward()
    expected = expected.detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    largest = max(float(p.grad.abs().max()) for p in twin.parameters())
    ours = pair.exported({**pair.variables, "params": grads})
    for key, parameter in twin.named_parameters():
        np.testing.assert_allclose(
            ours[key], parameter.grad, rtol=1e-3, atol=1e-5 * largest, err_msg=key)
    assert_same_statistics(pair.exported({**pair.variables, **new}), twin)


def test_training_logits_gradients_and_running_statistics(small):
    images, labels = noise(4), np.arange(4)
    model = small.model()
    step = compiled(lambda v, x, y: training(model, v, x, y), small.variables, images, labels)
    grads, (logits, new) = step(small.variables, images, labels)
    assert_same_training(small, grads, logits, new)


def test_training_forward_of_a_googlenet_with_larger_pools(sample_images):
    """Without gradients: one of its hundred thousand ReLU inputs is always zero to rounding."""
    torch.manual_seed(0)
    images = batch(sample_images, 4)
    twin = GoogLeNet(width=0.125, max_pool=(5, 1), avg_pool=(7, 0))  # as the report's 0_5_v5
    options = {"width": 0.125, "max_pool_kernel": 5, "avg_pool_kernel": 7}
    pair = make_pair("googlenet", options, twin, images)
    model = pair.model()

    def forward(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])
    logits, new = compiled(forward, pair.variables, images)(pair.variables, images)
    twin = pair.twin.double().train()
    expected = twin(channels_first(images).double()).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert_same_statistics(pair.exported({**pair.variables, **new}), twin)


def test_gradients_of_an_inception_block():
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 6)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(4, 8, 8, 17)).astype(np.float32)
    widths = (4, 3, 5, 2, 3, 5)
    twin = randomized(TwinInception(6, *widths, kernel=5)).double().train()
    inputs = channels_first(images).double().requires_grad_()
    (twin(inputs) * channels_first(weights)).sum().backward()
    block = Inception(widths, kernel=5, padding=2)
    state = {key: value.detach().numpy() for key, value in twin.state_dict().items()}
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), images, train=True))

    def fill(path, leaf):
        value = state[torch_weights.torch_key(tuple(entry.key for entry in path))]
        value = np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim == 4 else value
        return value.reshape(leaf.shape).astype(np.float32)
    variables = jax.tree_util.tree_map_with_path(fill, shapes)

    def loss(params, images):
        out, _ = block.apply({**variables, "params": params}, images, train=True,
                             mutable=["batch_stats"])
        return (out * weights).sum()
    args = variables["params"], images
    grads, to_images = compiled(jax.grad(loss, argnums=(0, 1)), *args)(*args)
    expected = {key: p.grad.numpy() for key, p in twin.named_parameters()}
    largest = max(np.abs(grad).max() for grad in expected.values())
    for path, grad in jax.tree_util.tree_leaves_with_path({"params": grads}):
        key = torch_weights.torch_key(tuple(entry.key for entry in path))
        grad = np.moveaxis(grad, (-1, -2), (0, 1)) if grad.ndim == 4 else grad
        np.testing.assert_allclose(
            grad, expected.pop(key), rtol=1e-3, atol=1e-5 * largest, err_msg=key)
    assert not expected
    to_inputs = inputs.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(to_images, to_inputs, rtol=1e-3, atol=1e-5 * np.abs(to_inputs).max())


def test_bfloat16_forward_is_finite_and_near_float32(small):
    images = noise(4)
    logits = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = small.model(dtype)
        forward = compiled(lambda v, x: model.apply(v, x, train=False), small.variables, images)
        logits.append(forward(small.variables, images))
    scale = np.abs(logits[0]).max()
    assert logits[1].dtype == jnp.float32 and not np.array_equal(*logits)
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=0.1 * scale)


def test_wide_resnet_drops_values_by_the_dropout_key():
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = models.create("wide_resnet16_8", depth=10, width=1, dropout=0.3)

    def logits(key):
        rngs = {"params": jax.random.key(0), "dropout": key}
        return model.init_with_output(rngs, images, train=True)[0]
    forward = compiled(logits, jax.random.key(0))
    first, again, other = (forward(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_wide_resnet_starts_as_the_published_code():
    model = models.create("wide_resnet16_8", depth=10, width=4)
    params = compiled(lambda key: model.init(
        key, jnp.zeros((1, 32, 32, 3)), train=False)["params"], jax.random.key(0))(
            jax.random.key(0))
    kernel = params["block3.layer.0"]["conv2"]["kernel"]
    assert abs(kernel.std() / np.sqrt(2 / (9 * 256)) - 1) < 0.01
    kernel = params["block2.layer.0"]["convShortcut"]["kernel"]
    assert abs(kernel.std() / np.sqrt(2 / 128) - 1) < 0.05
    assert not params["fc"]["bias"].any() and params["fc"]["kernel"].any()


@pytest.mark.parametrize("name,options,message", [
    ("vgg16", {"channels": [8, 8]}, "vgg: its options name different numbers of stages"),
    ("vgg16", {"blocks": 3}, "vgg: blocks is 3: give a list"),
    ("preact_resnet18", {"blocks": [1, 1, 0, 1]}, r"blocks\[2\] is 0: give an integer"),
    ("senet18", {"reduction": 128}, "channels // reduction is 0"),
    ("resnext29_2x64d", {"cardinality": 0}, "resnext: cardinality is 0"),
    ("densenet121", {"blocks": []}, r"densenet: blocks is \(\): give a list"),
    ("wide_resnet28_10", {"depth": 20}, "depth is 20: give 6 n"),
    ("wide_resnet28_10", {"dropout": 1.5}, "dropout is 1.5: give a number from 0 to below 1"),
    ("googlenet", {"stem_kernel": 4}, "stem_kernel is 4: give an odd"),
    ("googlenet", {"inception_kernel": 5, "inception_padding": 1}, "inception_padding is 1"),
    ("googlenet", {"max_pool_padding": 2}, "max_pool_padding is 2: give 0 up to half"),
    ("googlenet", {"avg_pool_kernel": 9}, "avg_pool_kernel 9 is larger than the map of 8x8"),
    ("googlenet", {"width": 0}, "width is 0: give a number above 0"),
    ("googlenet", {"full_width": ["a6"]}, r"full_width 'a6' \(did you mean"),
])
def test_bad_options_are_one_line(name, options, message):
    model = models.create(name, **options)
    with pytest.raises(UserError, match=message) as raised:
        jax.eval_shape(lambda: model.init(
            jax.random.key(0), jnp.zeros((2, 32, 32, 3)), train=False))
    assert "\n" not in str(raised.value)
