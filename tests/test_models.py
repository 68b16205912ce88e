"""The registry: names, options, parameter counts, types, one compilation per shape."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcifar import models
from jaxcifar.errors import UserError
from jaxcifar.models import counts

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def shapes(name, **options):
    """Shapes of a model's variables and logits, without computing anything."""
    model = models.create(name, **options)
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), IMAGES)


def drawn_variables(name, **options):
    """Variables without compiling the initialisation: ones for vectors, draws for kernels."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        kernel = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(kernel if leaf.ndim > 1 else np.ones(leaf.shape), jnp.float32)
    return jax.tree.map(draw, shapes(name, **options)[1])


BASE = {"blocks": [2, 2, 2, 2], "shortcut_kernel": 1}


@pytest.mark.parametrize("name,options,expected", [
    ("resnet5m", {}, 4951338),
    ("resnet5m", {"channels": [64, 128, 128, 256], "blocks": [5, 4, 3, 2]}, 4951338),
    ("resnet5m", {"channels": [32, 64, 128, 256], "blocks": [10, 8, 6, 2]}, 4915754),
    ("resnet5m", {"channels": [32, 128, 128, 256], "blocks": [10, 4, 4, 2]}, 4988586),
    ("resnet5m", {"channels": [32, 64, 128, 128, 256], "blocks": [5, 4, 4, 3, 2]}, 4970154),
    ("resnet5m", BASE | {"channels": [32, 64, 128, 256]}, 2797610),
    ("resnet5m", BASE | {"channels": [64, 64, 128, 256]}, 2912682),
    ("resnet5m", BASE | {"channels": [32, 128, 128, 256]}, 3232426),
    ("resnet5m", BASE | {"channels": [32, 64, 256, 256]}, 4535594),
    ("resnet5m", BASE | {"channels": [32, 64, 128, 372]}, 4915306),
    ("resnet18", {}, 11173962),
    ("cnn3", {}, 93248 + 512 * 512 + 512 + 512 * 40 + 40 + 40 * 10 + 10),
])
def test_parameter_counts(name, options, expected):
    logits, variables = shapes(name, **options)
    assert models.count_params(variables["params"]) == expected
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32


@pytest.mark.parametrize("kernel,millions", [(1, 2.8), (2, 2.9), (3, 3.1)])
def test_shortcut_kernels_give_the_reports_sizes(kernel, millions):
    _, variables = shapes(
        "resnet5m", channels=[32, 64, 128, 256], blocks=[2] * 4, shortcut_kernel=kernel)
    assert round(models.count_params(variables["params"]) / 1e6, 1) == millions


@pytest.mark.parametrize("options", [
    {"pool": 2}, {"kernel_size": 5}, {"stem_width": 16, "stem_kernel": 5},
    {"channels": [8, 16, 32]}, {"shortcut_kernel": 2, "channels": [8, 16, 16, 32]}])
def test_every_option_changes_the_shapes_and_still_fits(options):
    base = {"channels": [4, 8, 8, 8]}
    merged = base | options
    merged["blocks"] = [1] * len(merged["channels"])
    logits, variables = shapes("resnet5m", **merged)
    _, plain = shapes("resnet5m", **base, blocks=[1] * 4)
    assert logits.shape == (2, 10)
    assert models.count_params(variables) != models.count_params(plain)


@pytest.mark.parametrize("name", models.names())
def test_every_model_describes_itself_and_is_hashable(name):
    model = models.create(name, 7, dtype=jnp.bfloat16)
    assert model.__doc__ and model.num_classes == 7
    options = models.options(name)
    assert models.create(name, 7, dtype=jnp.bfloat16, **options) == model
    assert hash(model) == hash(models.create(name, 7, dtype=jnp.bfloat16))


def test_unknown_names_and_options_suggest_the_nearest():
    with pytest.raises(UserError, match=r"unknown model 'resnet5' \(did you mean 'resnet5m'\?\)"):
        models.create("resnet5")
    with pytest.raises(UserError, match=r"unknown option of model 'resnet5m' 'chanels' \(did you"):
        models.create("resnet5m", chanels=[1])


def test_a_model_of_ones_own_whose_file_or_class_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(models.MODELS, "absent", ("absent", "MyNet", {}))
    with pytest.raises(UserError, match="'absent' in the file jaxcifar/models/absent.py, and there"):
        models.create("absent")
    monkeypatch.setitem(models.MODELS, "absent", ("lenet", "MyNet", {}))
    with pytest.raises(UserError, match="class MyNet of jaxcifar/models/lenet.py, which defines no"):
        models.create("absent")


@pytest.mark.parametrize(("function", "returned"), [
    (lambda x: x.reshape(1, -1)[:, :10], r"\[1, 10\]"), (lambda x: x.mean((1, 2)), r"\[2, 3\]"),
    (lambda x: (x, x), "a tuple")])
def test_a_model_that_returns_no_logits_is_refused_before_it_is_trained(function, returned):
    class MyNet(nn.Module):
        num_classes: int = 10

        @nn.compact
        def __call__(self, images, train):
            return function(images)

    with pytest.raises(ValueError, match=f"of 2 images it makes {returned}, expected logits"):
        models.shapes(MyNet())


def test_different_numbers_of_widths_and_blocks_are_refused():
    with pytest.raises(UserError, match="different numbers of stages: channels .2., blocks .1."):
        shapes("resnet5m", channels=[8, 8], blocks=[1])


SMALL = {"resnet5m": {"channels": [4, 6], "blocks": [1, 1], "stem_width": 4},
         "cnn3": {"filters": [4, 4, 8]}}


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_forward_is_finite_and_near_float32(name):
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = drawn_variables(name, **SMALL[name])
    logits = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models.create(name, dtype=dtype, **SMALL[name])
        _, initial = shapes(name, dtype=dtype, **SMALL[name])
        assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
        forward = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))
        out, new = forward(variables)
        assert {leaf.dtype for leaf in jax.tree.leaves(new)} <= {jnp.dtype("float32")}
        logits[dtype] = out
        assert out.dtype == jnp.float32
    scale = np.abs(logits[jnp.float32]).max()
    np.testing.assert_allclose(logits[jnp.bfloat16], logits[jnp.float32], atol=0.06 * scale)
    assert not np.array_equal(logits[jnp.bfloat16], logits[jnp.float32])


def first_of_each_class():
    """Names of models that together have every class of models."""
    entries = reversed(models.MODELS.items())
    return sorted({(module, cls): name for name, (module, cls, _) in entries}.values())


@pytest.mark.parametrize("name", first_of_each_class())
def test_no_gradient_is_a_long_sum_in_bfloat16(name, monkeypatch):
    """Biases, gates, tokens: on a GPU, such a sum of 257 ones is 256."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = models.create(name, dtype=jnp.bfloat16)

    def gradient(variables, images):
        def loss(params):
            out, _ = model.apply({**variables, "params": params}, images, train=True,
                                 rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
            return out.sum()
        return jax.grad(loss)(variables["params"])

    images = jax.ShapeDtypeStruct((32, 64, 64, 3), jnp.float32)
    traced = jax.make_jaxpr(gradient)(models.shapes(model, (64, 64, 3)), images)
    sums = [equation for equation in counts.equations(traced.jaxpr)
            if equation.primitive.name.startswith("reduce_sum")]
    long = [f"{s.invars[0].aval.str_short()} to {s.outvars[0].aval.str_short()}" for s in sums
            if s.invars[0].aval.dtype == jnp.bfloat16
            and s.invars[0].aval.size > 8 * s.outvars[0].aval.size]
    assert sums and not long


@pytest.mark.parametrize(("name", "options"), [
    ("resnet5m", {"bottleneck": "yes"}), ("wide_resnet28_10", {"width": True}),
    ("resnet18", {"stem_width": "64"}), ("pnasnet_a", {"cell": 3})])
def test_an_option_of_another_kind_is_refused(name, options):
    (key, value), = options.items()
    with pytest.raises(UserError, match=f"config.model.{key} = {value!r}: must be of the kind of"):
        models.create(name, **options)


def test_one_trace_per_shape():
    model = models.create("cnn3", **SMALL["cnn3"], dropout=0.5)
    images = jnp.zeros((2, 32, 32, 3))
    variables = drawn_variables("cnn3", **SMALL["cnn3"])
    traces = []

    @jax.jit
    def forward(variables, images, key):
        traces.append(images.shape)
        return model.apply(variables, images, train=True, rngs={"dropout": key})
    for seed in range(3):
        forward(variables, images, jax.random.key(seed))
    forward(variables, images[:1], jax.random.key(0))
    assert traces == [(2, 32, 32, 3), (1, 32, 32, 3)]
