"""The mobile, aggregated and searched families against their torch twins, with equal weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
import twins_aggregated
import twins_mobile
from torch_twins import randomized

from jaxcifar import models, torch_weights
from jaxcifar.errors import UserError
from jaxcifar.models import efficientnet, units

REGNET_400MF = {"channels": (32, 64, 160, 384), "blocks": (1, 2, 7, 12), "group_width": 16}
# name: (twin, its options, number of parameters of the original)
ZOO = {
    "mobilenet": (twins_mobile.MobileNet, {}, 3217226),
    "mobilenetv2": (twins_mobile.MobileNetV2, {}, 2296922),
    "efficientnet_b0": (twins_mobile.EfficientNet, {}, 3599686),
    "shufflenet_g2": (twins_mobile.ShuffleNet, {}, 887582),
    "shufflenet_g3": (
        twins_mobile.ShuffleNet, {"channels": (240, 480, 960), "groups": 3}, 862768),
    "shufflenetv2_0_5": (twins_mobile.ShuffleNetV2, {"channels": (48, 96, 192)}, 352042),
    "shufflenetv2_1": (twins_mobile.ShuffleNetV2, {}, 1263854),
    "shufflenetv2_1_5": (twins_mobile.ShuffleNetV2, {"channels": (176, 352, 704)}, 2488874),
    "shufflenetv2_2": (
        twins_mobile.ShuffleNetV2, {"channels": (224, 488, 976), "head_width": 2048}, 5338026),
    "dpn26": (twins_aggregated.DPN, {}, 11574842),
    "dpn92": (twins_aggregated.DPN, {"blocks": (3, 4, 20, 3)}, 34236634),
    "regnetx_200mf": (twins_aggregated.RegNet, {}, 2321946),
    "regnetx_400mf": (twins_aggregated.RegNet, REGNET_400MF, 4779338),
    "regnety_400mf": (twins_aggregated.RegNet, REGNET_400MF | {"se_ratio": 0.25}, 5714362),
    "pnasnet_a": (twins_aggregated.PNASNet, {}, 130646),
    "pnasnet_b": (twins_aggregated.PNASNet, {"cell": "B", "width": 32}, 451626),
    "dla": (twins_aggregated.DLA, {}, 16291386),
    "simpledla": (twins_aggregated.DLA, {"simple": True}, 15142970),
}
# One small network per family, for what needs gradients.
SMALL = {
    "mobilenet": {"channels": (8, 12), "strides": (1, 2), "stem_width": 8},
    "mobilenetv2": {"expansion": (1, 3), "channels": (6, 8), "blocks": (1, 2), "strides": (1, 2),
                    "stem_width": 4, "head_width": 16},
    "efficientnet_b0": {"expansion": (1, 2, 2), "channels": (8, 8, 12), "blocks": (2, 1, 1),
                        "kernel_sizes": (3, 5, 3), "strides": (1, 2, 1), "stem_width": 8,
                        "dropout": 0.0},
    "shufflenet_g3": {"channels": (48, 96, 192), "blocks": (2, 1, 1)},
    "shufflenetv2_0_5": {"channels": (8, 12, 16), "blocks": (1, 1, 1), "head_width": 16},
    "dpn26": {"widths": (8, 8, 8, 16), "channels": (8, 12, 12, 16), "blocks": (1, 2, 1, 1),
              "dense": (2, 3, 2, 4), "groups": 4, "stem_width": 8},
    "regnety_400mf": {"channels": (8, 16), "blocks": (1, 2), "strides": (1, 2), "group_width": 4,
                      "bottleneck_ratio": 0.5, "stem_width": 8},
    "pnasnet_b": {"num_cells": 1, "width": 4},
    "dla": {"channels": (8, 12), "levels": (1, 2), "strides": (1, 2), "stem_channels": (4, 6)},
}


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads of torch wait for each other longer than so few images take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compiled(function, *arguments):
    """Compile without optimisation, in a fraction of the time; convolutions are the same."""
    return jax.jit(function).lower(*arguments).compile(
        compiler_options={"xla_backend_optimization_level": 0})


def scaled(images):
    return (images.astype(np.float32) / 255 - 0.45) / 0.2


def channels_first(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def calibrated(twin, images):
    """Give a twin weights of its own, and running statistics near those that the images have.

    With the initial statistics the signal would fade on its way, and logits be biases.
    """
    randomized(twin)
    norms = [m for m in twin.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        twin.train()(channels_first(images))
        for norm in norms:
            norm.momentum = 0.1
            norm.num_batches_tracked.fill_(1)  # of the unused ones too
            noise = torch.empty(norm.num_features).normal_(generator=generator)
            norm.running_mean += 0.1 * norm.running_var.sqrt() * noise
            norm.running_var *= torch.exp(0.1 * noise.roll(1)).add_(1e-3)
    return twin


def assert_close(actual, expected, scale, name=""):
    expected = np.asarray(expected)
    atol = scale * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


@functools.cache
def shapes(name, dtype=jnp.float32):
    """Shapes of a model's logits and variables, without computing anything."""
    model = models.create(name, dtype=dtype)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), images)


@pytest.mark.parametrize("name", ZOO)
def test_parameter_count_and_types(name):
    twin, options, count = ZOO[name]
    with torch.device("meta"):
        original = twin(**options)
    assert sum(p.numel() for p in original.parameters()) == count
    for dtype in (jnp.float32, jnp.bfloat16):
        logits, variables = shapes(name, dtype)
        assert models.count_params(variables["params"]) == count
        assert logits.shape == (2, 10) and logits.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ZOO)
def test_logits_and_export(name, sample_images):
    twin, options, _ = ZOO[name]
    images = scaled(sample_images[[1, 5]])
    torch.manual_seed(0)
    twin = calibrated(twin(num_classes=7, **options), images)
    state_dict = {key: value.numpy() for key, value in twin.state_dict().items()}
    variables = torch_weights.from_torch(name, state_dict, num_classes=7)
    exported = torch_weights.to_torch(name, variables, num_classes=7, num_batches_tracked=1)
    assert set(exported) == set(state_dict)
    for key, value in state_dict.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)
    with torch.no_grad():
        expected = twin.eval()(channels_first(images)).numpy()
    model = models.create(name, 7)
    forward = compiled(lambda v, x: model.apply(v, x, False), variables, images)
    assert np.abs(expected[0] - expected[1]).max() > 0.02 * np.abs(expected).max()
    assert_close(forward(variables, images), expected, 1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_training_logits_gradients_and_running_statistics(name, sample_images):
    options = ZOO[name][1] | SMALL[name]
    images, labels = scaled(sample_images[1::4][:6, ::2, ::2]), np.arange(6)
    torch.manual_seed(0)
    twin = calibrated(ZOO[name][0](num_classes=7, **options), images)
    variables = torch_weights.from_torch(name, twin.state_dict(), num_classes=7, **options)
    model = models.create(name, 7, **options)

    def gradients(variables):
        def loss(params):
            logits, new = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
            return losses.mean(), (logits, new)
        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, (logits, new) = compiled(gradients, variables)(variables)
    twin = twin.double().train()  # the oracle's own rounding stays out of the comparison
    theirs = twin(channels_first(images).double())
    F.cross_entropy(theirs, torch.from_numpy(labels)).backward()
    assert_close(logits, theirs.detach().numpy(), 1e-4)
    unused = {f"layers.{i}.{leaf}" for i in (0, 1)  # of EfficientNet's blocks of expansion 1
              for leaf in ("conv1.weight", "bn1.weight", "bn1.bias")}
    largest = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    ours = torch_weights.to_torch(name, {**variables, "params": grads}, num_classes=7, **options)
    for key, parameter in twin.named_parameters():
        if parameter.grad is None:
            assert name == "efficientnet_b0" and key in unused
            assert not ours[key].any()
            continue
        np.testing.assert_allclose(
            ours[key], parameter.grad, rtol=1e-3, atol=1e-5 * largest, err_msg=key)
    ours = torch_weights.to_torch(name, {**variables, **new}, num_classes=7, **options)
    for key, buffer in twin.named_buffers():
        if "running" in key:
            assert_close(ours[key], buffer, 1e-5, key)


def test_bfloat16_forward_is_finite_and_near_float32(sample_images):
    images = scaled(sample_images[1::4][:4, ::2, ::2])
    options = SMALL["mobilenetv2"]
    torch.manual_seed(0)
    twin = calibrated(ZOO["mobilenetv2"][0](num_classes=7, **options), images)
    variables = torch_weights.from_torch(
        "mobilenetv2", twin.state_dict(), num_classes=7, **options)
    logits = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models.create("mobilenetv2", 7, dtype=dtype, **options)
        forward = compiled(lambda v: model.apply(v, images, train=False), variables)
        logits[dtype] = forward(variables)
    scale = np.abs(logits[jnp.float32]).max()
    np.testing.assert_allclose(logits[jnp.bfloat16], logits[jnp.float32], atol=0.06 * scale)
    assert not np.array_equal(logits[jnp.bfloat16], logits[jnp.float32])


def test_drop_connect_skips_whole_examples():
    x = np.broadcast_to(np.random.default_rng(0).normal(size=(1, 4, 4, 8)), (64, 4, 4, 8))
    x = x.astype(np.float32)

    def branch(rate):  # without the shortcut
        block = efficientnet.Block(8, 3, 1, 1, drop_connect=rate)
        out, _ = block.init_with_output(
            {"params": jax.random.key(1), "dropout": jax.random.key(2)}, x, train=True)
        return out - x
    kept, out = compiled(lambda: (branch(0.0), branch(0.25)))()
    dropped = np.abs(out).max(axis=(1, 2, 3)) == 0
    assert 4 <= dropped.sum() <= 30  # 16 expected, standard deviation 3.5
    np.testing.assert_allclose(out[~dropped], kept[~dropped] / 0.75, rtol=1e-4, atol=1e-5)


def test_drop_connect_grows_with_depth_and_is_off_as_in_the_original(sample_images):
    images = scaled(sample_images[:2, ::2, ::2])
    rates = {}
    for rate in (0.0, 0.4):
        model = models.create("efficientnet_b0", **SMALL["efficientnet_b0"], drop_connect=rate)
        seen = []

        def record(next_function, arguments, keywords, context):
            if isinstance(context.module, efficientnet.Block):
                seen.append(context.module.drop_connect)
            return next_function(*arguments, **keywords)
        with nn.intercept_methods(record):
            jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
        rates[rate] = seen
    assert rates == {0.0: [0.0] * 4, 0.4: pytest.approx([0.0, 0.1, 0.2, 0.3])}
    assert models.options("efficientnet_b0")["drop_connect"] == 0.0


def test_channel_shuffle_is_torchs():
    x = np.arange(2 * 2 * 3 * 12, dtype=np.float32).reshape(2, 2, 3, 12)
    for groups in (1, 2, 3):
        theirs = twins_mobile.shuffled(channels_first(x), groups).numpy()
        np.testing.assert_array_equal(
            units.channel_shuffle(jnp.asarray(x), groups), theirs.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(
        units.interleave(x[..., :6], x[..., 6:]), units.channel_shuffle(jnp.asarray(x), 2))


@pytest.mark.parametrize("name,options,message", [
    ("mobilenet", {"channels": (8,)}, r"mobilenet: .*channels \(1\), strides \(13\)"),
    ("mobilenetv2", {"expansion": (0,) * 7}, r"expansion\[0\] is 0"),
    ("efficientnet_b0", {"blocks": ()}, r"blocks is \(\)"),
    ("efficientnet_b0", {"kernel_sizes": (4,) * 7}, r"kernel_sizes .*: give odd ones"),
    ("regnety_400mf", {"group_width": 0}, r"group_width is 0"),
    ("efficientnet_b0", {"drop_connect": 1.5}, r"drop_connect is 1.5"),
    ("shufflenet_g2", {"channels": (220, 400, 800)}, r"49 channels inside a block"),
    ("shufflenet_g3", {"groups": 7}, r"cannot be split into 7 groups"),
    ("shufflenetv2_1", {"channels": (116, 231, 464)}, r"231 channels cannot be split into 2"),
    ("dpn26", {"groups": 5}, r"96 channels .* cannot be split into 5 groups"),
    ("regnetx_200mf", {"group_width": 9}, r"24 channels cannot be split into .* of 9"),
    ("pnasnet_a", {"cell": "C"}, r"unknown cell 'C': choose 'A' or 'B'"),
    ("dla", {"levels": (1, 3, 2, 1)}, r"choose 1 or 2 for each stage"),
])
def test_bad_options_are_refused_in_one_line(name, options, message):
    model = models.create(name, **options)
    with pytest.raises(UserError, match=message) as refused:
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))
    assert "\n" not in str(refused.value)
