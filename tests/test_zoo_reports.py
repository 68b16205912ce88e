"""The reports' own networks and the ImageNet ones against torch: sizes, logits, gradients."""

import contextlib
import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
import twins_imagenet
import twins_reports

from jaxcifar import models, torch_weights
from jaxcifar.errors import UserError
from jaxcifar.models import imagenet

TWINS = {
    "mlp_s": twins_reports.MLP,
    "mlp_l": functools.partial(
        twins_reports.MLP, hidden=(2048, 1024, 512, 256, 128, 64, 32, 16)),
    "vit": twins_reports.ViT,
    "cifar100_nn": functools.partial(
        twins_reports.MLP, hidden=(4096, 4096), dropout_last=0, activation="sigmoid"),
    "cifar100_cnn": twins_reports.CIFAR100CNN,
    "se_dla": twins_reports.SEDLA,
    "imagenet_resnet18": twins_imagenet.ImageNetResNet,
    "mobilenet_v3_small": functools.partial(
        twins_imagenet.MobileNetV3, blocks=twins_imagenet.SMALL),
    "efficientnet_v2_s": functools.partial(twins_imagenet.EfficientNetV2, stages=twins_imagenet.S),
}
IMAGENET = ("imagenet_resnet18", "mobilenet_v3_small", "efficientnet_v2_s")

COUNTS = [  # name, classes, options, parameters
    ("mlp_s", 10, {}, 5411110),
    ("mlp_l", 10, {}, 9091738),
    ("vit", 10, {}, 132774),
    ("vit", 10, {"depth": 6}, 776764),
    ("cifar100_nn", 100, {}, 29778020),
    ("cifar100_cnn", 100, {}, 17791076),
    ("cifar100_cnn", 100, {"filters": (32, 32, 32, 64)}, 4647524),
    ("cifar100_cnn", 100, {"batch_norm": True}, 17792356),
    ("cifar100_cnn", 100, {"batch_norm": True, "fc_width": 8192}, 34983268),
    ("cifar100_cnn", 100, {"batch_norm": True, "fc_batch_norm": True}, 17800548),
    ("cifar100_cnn", 100, {"kernel_sizes": (3, 3, 3, 3)}, 17784932),
    ("se_dla", 10, {}, 10102042),
    ("se_dla", 10, {"pool_size": 2}, 10071322),
    ("se_dla", 10, {"filter_size": 5, "shortcut_kernel": 3}, 12011546),
    ("imagenet_resnet18", 1000, {}, 11689512),
    ("imagenet_resnet18", 10, {}, 11181642),
    ("mobilenet_v3_small", 1000, {}, 2542856),
    ("efficientnet_v2_s", 1000, {}, 21458488),
]

FULL = {  # every registry name as it is, and the options that change the computation
    **{name: (name, {}) for name in TWINS},
    "vit depth 6": ("vit", {"depth": 6}),
    "cifar100_cnn BN": ("cifar100_cnn", {
        "filters": (8, 8, 8, 16), "batch_norm": True, "fc_batch_norm": True, "fc_width": 64}),
    "cifar100_cnn kernels": ("cifar100_cnn", {
        "filters": (8, 8, 8, 16), "kernel_sizes": (3, 3, 5, 1), "fc_width": 64}),
    "se_dla searched": ("se_dla", {
        "C1": 8, "C2": 8, "C3": 8, "C4": 32, "filter_size": 5, "shortcut_kernel": 3,
        "pool_size": 2}),
}

SMALL = {  # one per family, without dropout, to be trained
    "mlp_s": {"hidden": (24, 12), "dropout_last": 0.0},
    "cifar100_nn": {"hidden": (24, 12)},
    "vit": {"depth": 2, "width": 12, "heads": 3, "mlp_dim": 32, "dropout": 0.0, "patch": 8},
    "cifar100_cnn": {"filters": (4, 4, 6, 8), "batch_norm": True, "fc_batch_norm": True,
                     "fc_width": 16},
    "se_dla": {"C1": 4, "C2": 4, "C3": 8, "C4": 16, "pool_size": 2},
    "imagenet_resnet18": {"channels": (4, 6), "blocks": (1, 1)},
    "mobilenet_v3_small": {"blocks": (
        (3, 8, 8, True, "RE", 2), (3, 16, 12, False, "RE", 1), (5, 24, 12, True, "HS", 1)),
        "stem_width": 8, "last_width": 16, "dropout": 0.0},
    "efficientnet_v2_s": {"stages": (
        ("fused", 1, 1, 8, 1), ("fused", 2, 2, 8, 2), ("mb", 2, 1, 16, 2)),
        "stem_width": 8, "last_width": 24, "dropout": 0.0, "stochastic_depth": 0.0},
}


@pytest.fixture(autouse=True)
def setting():
    """Full precision, two torch threads, and no word about small images but in its own test."""
    torch.set_num_threads(2)
    with jax.default_matmul_precision("highest"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model .* has an ImageNet stem")
        yield


def randomized(name, num_classes=10, gain=None, **options):
    """A twin with no vector of parameters or statistics at 0 or 1.

    gain: draw the kernels from N(0, gain / fan_in), so that the signal survives to the logits: with
    the initial kernels the images hardly change those of the deep networks, and agreement would
    mean that the classifiers' biases agree. None: the initial kernels.
    """
    torch.manual_seed(0)
    twin = TWINS[name](num_classes=num_classes, **options)
    with torch.no_grad():
        for key, value in [*twin.named_parameters(), *twin.named_buffers()]:
            if value.ndim > 1 and gain is not None:
                value.normal_(0, (gain / value[0].numel()) ** 0.5)
            elif key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1:
                value.normal_(0, 0.1)
    return twin


def compiled(function, *arguments):
    """Compile without optimisation: several times faster, and the convolutions are the same."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def images(size, count=2):
    """float32 [count, size, size, 3] of noise, normalised like real images."""
    return np.random.default_rng(0).normal(0.2, 1, (count, size, size, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("name", "num_classes", "options", "expected"), COUNTS)
def test_parameter_counts(name, num_classes, options, expected):
    model = models.create(name, num_classes, **options)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), x)
    assert models.count_params(variables["params"]) == expected
    assert logits.shape == (2, num_classes) and logits.dtype == jnp.float32
    with torch.device("meta"):
        twin = TWINS[name](num_classes=num_classes, **options)
    assert sum(p.numel() for p in twin.parameters()) == expected


@pytest.mark.parametrize("case", FULL)
def test_logits_in_evaluation_and_the_round_trip(case):
    name, options = FULL[case]
    x = images(64 if name in IMAGENET else 32)
    # 40 blocks double the signal more often than float32 (torch's too) stays exact to 1e-4.
    twin = randomized(name, gain=1.2 if name == "efficientnet_v2_s" else 2, **options).eval()
    state_dict = twin.state_dict()
    variables = torch_weights.from_torch(name, state_dict, **options)
    model = models.create(name, **options)
    logits = compiled(functools.partial(model.apply, train=False), variables, x)(variables, x)
    with torch.no_grad():
        expected = twin(to_torch(x)).numpy()
    scale = np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * scale
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * scale)
    back = torch_weights.to_torch(name, variables, **options)
    assert set(back) == set(state_dict)
    for key, value in state_dict.items():
        np.testing.assert_array_equal(back[key], value.numpy(), err_msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_training_logits_gradients_and_running_statistics(name):
    options, labels = SMALL[name], np.arange(6) % 5
    x = images(32, count=6)
    twin = randomized(name, 5, **options)
    variables = torch_weights.from_torch(name, twin.state_dict(), num_classes=5, **options)
    model = models.create(name, 5, **options)

    def loss(params, x):
        logits, new = model.apply({**variables, "params": params}, x, train=True,
                                  mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
        return losses.mean(), (logits, new)

    gradients = compiled(jax.grad(loss, has_aux=True), variables["params"], x)
    grads, (logits, new) = gradients(variables["params"], x)
    twin = twin.double().train()  # the oracle's own rounding stays out of the comparison
    theirs = twin(to_torch(x).double())
    F.cross_entropy(theirs, torch.from_numpy(labels)).backward()
    expected = theirs.detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    ours = torch_weights.to_torch(name, {**variables, "params": grads}, num_classes=5, **options)
    largest = max(float(p.grad.abs().max()) for p in twin.parameters())
    for key, parameter in twin.named_parameters():
        np.testing.assert_allclose(
            ours[key], parameter.grad, rtol=1e-3, atol=1e-5 * largest, err_msg=key)
    ours = torch_weights.to_torch(name, {**variables, **new}, num_classes=5, **options)
    for key, buffer in twin.named_buffers():
        if "running" in key:
            np.testing.assert_allclose(ours[key], buffer, rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_near_float32(name):
    options = SMALL[name]
    state_dict = randomized(name, 5, **options).state_dict()
    variables = torch_weights.from_torch(name, state_dict, num_classes=5, **options)
    x, logits = images(32), {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models.create(name, 5, dtype=dtype, **options)
        forward = compiled(functools.partial(model.apply, train=False), variables, x)
        logits[dtype] = np.asarray(forward(variables, x))
    whole, half = logits.values()
    np.testing.assert_allclose(half, whole, rtol=0, atol=0.1 * np.abs(whole).max())
    assert half.dtype == np.float32 and not np.array_equal(half, whole)
    assert (half.view(np.uint32) & 0xFFFF).any()  # the classifier computes in float32


def initial(name, **options):
    """The params that a model starts from, {path with dots: array}."""
    model = models.create(name, **options)
    x = jnp.zeros((1, 32, 32, 3))
    init = compiled(lambda key: model.init(key, x, train=False)["params"], jax.random.key(0))
    paths = jax.tree_util.tree_flatten_with_path(init(jax.random.key(0)))[0]
    return {".".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in paths}


@pytest.mark.parametrize("name", IMAGENET)
def test_initialisation_is_torchvisions(name):
    params = initial(name, **SMALL[name])
    classifier = {"imagenet_resnet18": "fc", "mobilenet_v3_small": "classifier.",
                  "efficientnet_v2_s": "classifier."}[name]
    standard = [leaf * (np.prod(leaf.shape[:2]) * leaf.shape[-1] / 2) ** 0.5
                for key, leaf in params.items()
                if key.endswith("kernel") and not key.startswith(classifier)]
    assert len(standard) > 3
    for leaf in standard:  # convolutions: kaiming_normal_(mode="fan_out")
        assert leaf.std() == pytest.approx(1, rel=4 / leaf.size ** 0.5), leaf.shape
    assert 2.5 < max(np.abs(leaf).max() for leaf in standard) < 6  # normal, not uniform
    for key, leaf in params.items():
        if key.endswith("bias") and key != "fc.bias":
            assert not leaf.any(), key
    if name == "mobilenet_v3_small":
        assert params["classifier.0.kernel"].std() == pytest.approx(0.01, rel=0.1)
    if name == "efficientnet_v2_s":
        kernel = params["classifier.1.kernel"]
        assert 0.9 / 10 ** 0.5 < np.abs(kernel).max() <= 1 / 10 ** 0.5


def test_initialisation_of_the_vit_is_torchs():
    params = initial("vit", mlp_dim=64)
    layer = "transformer.layers.0."
    assert params["pos_embedding"].std() == pytest.approx(1, rel=0.1)
    assert params["cls_token"].shape == (1, 1, 30)
    assert 0.97 * 0.05 ** 0.5 < params[layer + "self_attn.in_proj_weight"].max() <= 0.05 ** 0.5
    assert not params[layer + "self_attn.in_proj_bias"].any()
    assert not params[layer + "self_attn.out_proj.bias"].any()
    assert params[layer + "linear1.kernel"].std() == pytest.approx(90 ** -0.5, rel=0.1)
    assert params[layer + "linear1.bias"].any()


@contextlib.contextmanager
def dropouts(found):
    """Collect (rate, shape) of every Dropout layer that a model passes through."""
    def record(call, arguments, keywords, context):
        if isinstance(context.module, models.layers.Dropout):
            found.append((context.module.rate, arguments[0].shape))
        return call(*arguments, **keywords)
    with nn.intercept_methods(record):
        yield


def dropouts_of(name, size=32, **options):
    model, found = models.create(name, **options), []
    with dropouts(found):
        jax.eval_shape(lambda x: model.init(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, train=True),
            jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
    return found


def test_dropout_is_where_the_originals_have_it():
    assert dropouts_of("vit") == [
        (0.1, (2, 6, 65, 65)), (0.1, (2, 65, 30)), (0.1, (2, 65, 2048)), (0.1, (2, 65, 30))]
    assert dropouts_of("mlp_s") == [(0.1, (2, 100))]
    assert dropouts_of("cifar100_cnn", dropout=0.5) == [(0.5, (2, 4096))]
    assert dropouts_of("mobilenet_v3_small") == [(0.2, (2, 1024))]
    found = dropouts_of("efficientnet_v2_s", size=64)
    assert found[-1] == (0.2, (2, 1280))
    # Stochastic depth 0.2 i / 40 of block i, where the block has a residual.
    rates = [rate for rate, _ in found[:-1]]
    assert len(rates) == 35 and rates == sorted(rates)
    assert rates[:2] == [0, 0.2 * 1 / 40] and rates[-1] == pytest.approx(0.2 * 39 / 40)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("mlp_s", {"activation": "gelu"}, "activation = 'gelu': expected one of relu, sigmoid"),
    ("vit", {"heads": 7}, "width = 30 and heads = 7"),
    ("vit", {"patch": 5}, "patch = 5: images of 32x32"),
    ("cifar100_cnn", {"filters": (8, 8)}, r"filters = \(8, 8\): expected four"),
    ("cifar100_cnn", {"kernel_sizes": (5, 5, 5, 7)}, "the map before conv_final is 6x6"),
    ("se_dla", {"filter_size": 4}, "filter_size = 4: expected 3 or 5"),
    ("se_dla", {"C4": 40}, "C4 = 40: expected a multiple of 16"),
    ("imagenet_resnet18", {"channels": (8, 8)}, "imagenet_resnet18: its options name"),
    ("efficientnet_v2_s", {"stages": (("fusd", 1, 1, 8, 1),)}, "stages: .'fusd', 1, 1, 8, 1."),
])
def test_options_that_cannot_be_are_refused_in_one_line(name, options, message):
    model = models.create(name, **options)
    with pytest.raises(UserError, match=message) as raised:
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False),
                       jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_stem_warns_once_of_small_images(name):
    imagenet._warn.cache_clear()
    model = models.create(name, **SMALL[name])

    def shapes(size):
        x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shapes(64)
        assert not caught
        shapes(32)
        shapes(32)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert repr(name) in message and "of 32x32" in message
    instead = message.split("use '")[1].split("'")[0]
    assert instead in models.MODELS, f"{instead} is not a registered model"
