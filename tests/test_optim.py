"""Every optimiser and option against torch.optim, 50 steps; clipping, accumulation, masks, EMA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_twins import timm_decay

from jaxcifar import optim
from jaxcifar.errors import UserError

STEPS = 50


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def layer(n_in, n_out):
        return {
            "kernel": rng.normal(0, n_in**-0.5, (n_in, n_out)).astype(np.float32),
            "bias": rng.normal(0, 0.1, n_out).astype(np.float32),
        }

    return {"fc1": layer(12, 16), "bn1": {"scale": np.ones(16, np.float32)}, "fc2": layer(16, 5)}


@functools.cache
def batches(count=STEPS):
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (count, 32, 12)).astype(np.float32)
    y = (x @ rng.normal(0, 1, (12, 5)) + rng.normal(0, 0.3, (count, 32, 5))).astype(np.float32)
    return x, y


def loss_of(params, x, y):
    """A small smooth network, written so that torch tensors and jax arrays both run it."""
    hidden = x @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    hidden = hidden * params["bn1"]["scale"]
    hidden = hidden * hidden / (1 + hidden * hidden) + hidden
    return (((hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]) - y) ** 2).mean()


def rate_at(step, base):
    return base * (1 + 0.5 * np.cos(step / 5))  # a rate that changes at every step


@functools.cache
def compiled_step(optimizer):
    """One program per optimiser, whatever the learning rate and the weight decay."""

    @jax.jit
    def step(params, state, x, y, lr, wd, beta):
        extra = {} if beta is None else {"momentum": beta}
        grads = jax.grad(loss_of)(params, x, y)
        directions, state = optimizer.update(
            grads, state, params, weight_decay=wd, learning_rate=lr, **extra
        )
        return optim.apply_updates(params, directions, lr), state

    return step


def train(optimizer, base_lr, weight_decay, momentum=None):
    """Return the parameters after every step, a list of trees."""
    params = jax.tree.map(jnp.asarray, make_params())
    state = optimizer.init(params)
    step = compiled_step(optimizer)
    history = []
    for i, (x, y) in enumerate(zip(*batches())):
        beta = None if momentum is None else jnp.float32(momentum[i])
        lr, wd = jnp.float32(rate_at(i, base_lr)), jnp.float32(weight_decay)
        params, state = step(params, state, x, y, lr, wd, beta)
        history.append(params)
    return history


def torch_train(make, base_lr, every=1, prepare=None, momentum=None):
    """The same in torch: make(torch.optim, parameters) -> optimizer; `prepare` clips, masks..."""
    torch = pytest.importorskip("torch")
    tree = jax.tree.map(lambda p: torch.nn.Parameter(torch.tensor(p)), make_params())
    leaves = jax.tree.leaves(tree)
    optimizer = make(torch.optim, leaves)
    history = []
    for i, (x, y) in enumerate(zip(*batches())):
        (loss_of(tree, torch.tensor(x), torch.tensor(y)) / every).backward()
        if (i + 1) % every == 0:
            if prepare:
                prepare(torch, leaves)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(i, base_lr)
                if momentum is not None and "betas" in group:
                    group["betas"] = (float(momentum[i]), group["betas"][1])
                elif momentum is not None:
                    group["momentum"] = float(momentum[i])
            optimizer.step()
            optimizer.zero_grad()
        history.append(jax.tree.map(lambda p: p.detach().numpy().copy(), tree))
    return history


def assert_same_path(ours, theirs, tolerance=1e-6):
    """Compare every parameter after every step: max error relative to the largest parameter."""
    assert len(ours) == len(theirs) == STEPS
    start = make_params()
    error = moved = 0.0
    for a, b in zip(ours, theirs):
        for p, q, r in zip(*map(jax.tree.leaves, (a, b, start)), strict=True):
            assert np.isfinite(p).all()  # max() would pass over NaN
            error = max(error, float(np.abs(np.asarray(p) - q).max() / np.abs(q).max()))
            moved = max(moved, float(np.abs(q - r).max()))
    print(f"largest error {error:.2e}, largest move {moved:.2e}")
    assert moved > 0.02 and error < tolerance


SGD = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    for momentum, dampening, nesterov in itertools.product((0.0, 0.9), (0.0, 0.3), (False, True))
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_equals_torch(options):
    optimizer = optim.create("sgd", **options)
    for decay in (0.0, 0.02):
        theirs = torch_train(lambda o, p: o.SGD(p, 1, weight_decay=decay, **options), 0.02)
        assert_same_path(train(optimizer, 0.02, decay), theirs)
    assert compiled_step(optimizer)._cache_size() == 1


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.8, 0.95), "eps": 1e-3}, {"betas": (0.0, 0.5)}], ids=str
)
def test_adam_and_adamw_equal_torch(name, options):
    optimizer = optim.create(name, **options)
    for decay in (0.0, 0.05):

        def make(o, parameters):
            kind = {"adam": o.Adam, "adamw": o.AdamW}[name]
            return kind(parameters, 1, weight_decay=decay, **options)

        ours = train(optimizer, 0.005, decay)
        assert_same_path(ours, torch_train(make, 0.005), tolerance=2e-6)


def test_adam_first_steps_are_exact():
    """1 - 0.999**t in float32 would be wrong by 1e-5 at the first step."""
    gradient = np.geomspace(1e-6, 10, 64).astype(np.float32) * np.resize([1, -1], 64)
    params = {"w": jnp.zeros(64)}
    optimizer = optim.create("adam")
    state = optimizer.init(params)
    mu = nu = np.zeros(64)
    for t in range(1, 6):
        directions, state = optimizer.update({"w": gradient}, state, params, weight_decay=0.0)
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.999 * nu + 0.001 * gradient.astype(float) ** 2
        exact = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(directions["w"], exact, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_cycled_momentum_equals_torch(name):
    momentum = 0.9 + 0.05 * np.sin(np.arange(STEPS) / 4)

    def make(o, p):
        return o.SGD(p, 1, momentum=0.9) if name == "sgd" else o.Adam(p, 1)

    ours = train(optim.create(name, momentum=0.9), 0.01, 0.0, momentum=momentum)
    theirs = torch_train(make, 0.01, momentum=momentum)
    assert_same_path(ours, theirs, tolerance=2e-6)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping_equals_torch(kind):
    limit = {"norm": 0.3, "value": 0.02}[kind]

    def prepare(torch, leaves):
        if kind == "norm":
            torch.nn.utils.clip_grad_norm_(leaves, limit)
        else:
            torch.nn.utils.clip_grad_value_(leaves, limit)

    optimizer = optim.create("sgd", momentum=0.9, **{f"max_grad_{kind}": limit})
    ours = train(optimizer, 0.05, 0.01)
    theirs = torch_train(
        lambda o, p: o.SGD(p, 1, momentum=0.9, weight_decay=0.01), 0.05, prepare=prepare
    )
    assert_same_path(ours, theirs)
    free = train(optim.create("sgd", momentum=0.9), 0.05, 0.01)
    assert np.abs(free[-1]["fc1"]["kernel"] - ours[-1]["fc1"]["kernel"]).max() > 0.01


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e6, np.inf, np.nan])
def test_clip_norm_factor_equals_torch(scale):
    torch = pytest.importorskip("torch")
    gradient = (np.linspace(-1, 2, 30) * np.float64(scale)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.zeros(30))
    parameter.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_([parameter], 1e-3)
    optimizer = optim.create("sgd", max_grad_norm=1e-3)
    params = {"w": jnp.zeros(30)}
    ours, _ = optimizer.update({"w": gradient}, optimizer.init(params), params, weight_decay=0.0)
    np.testing.assert_allclose(ours["w"], parameter.grad.numpy(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("name, every", [("sgd", 3), ("adamw", 4)])
def test_accumulation_equals_torch(name, every):
    """50 is no multiple of 3 or 4; clipping and weight decay see the mean gradient."""

    def make(o, p):
        if name == "sgd":
            return o.SGD(p, 1, momentum=0.9, weight_decay=0.02)
        return o.AdamW(p, 1, weight_decay=0.02)

    def clip(torch, leaves):
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)

    optimizer = optim.create(name, momentum=0.9, accumulate_steps=every, max_grad_norm=0.5)
    ours = train(optimizer, 0.02, 0.02)
    assert_same_path(ours, torch_train(make, 0.02, every, clip), tolerance=2e-6)
    previous = jax.tree.map(jnp.asarray, make_params())
    for i, params in enumerate(ours):
        same = [
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(previous), jax.tree.leaves(params), strict=True)
        ]
        assert all(same) if (i + 1) % every else not any(same), f"step {i}"
        previous = params


def test_accumulation_changes_nothing_in_between():
    optimizer = optim.create("adam", accumulate_steps=3)
    params = {"w": jnp.array([1.0, -0.0, 2.0])}
    state = optimizer.init(params)
    bad = {"w": jnp.array([jnp.inf, 1.0, jnp.nan])}
    directions, after = optimizer.update(bad, state, params, weight_decay=0.1)
    assert (directions["w"] == 0).all()  # a later step may stop on it; the parameters are intact
    kept = optim.apply_updates(params, directions, jnp.float32(0.1))["w"]
    assert np.asarray(kept).tobytes() == np.asarray(params["w"]).tobytes()
    assert after.count == 1 and jax.tree.leaves(after.inner)[0] == 0


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_decay_exclude_equals_torch_parameter_groups(name):
    def make(o, leaves):  # leaves in the order of the tree: bn1/scale, fc1/bias, fc1/kernel, ...
        kernels = [p for p in leaves if p.ndim == 2]
        others = [p for p in leaves if p.ndim == 1]
        groups = [{"params": kernels, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}]
        return {"sgd": o.SGD, "adam": o.Adam, "adamw": o.AdamW}[name](groups, 1)

    ours = train(optim.create(name, decay_exclude="bias$|bn[0-9]+/"), 0.01, 0.05)
    assert_same_path(ours, torch_train(make, 0.01), tolerance=2e-6)
    everywhere = train(optim.create(name), 0.01, 0.05)
    assert np.abs(everywhere[-1]["bn1"]["scale"] - ours[-1]["bn1"]["scale"]).max() > 1e-3


OPTIONS = {"momentum": 0.9, "dampening": 0.1, "accumulate_steps": 2, "max_grad_norm": 1.0}


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_state_holds_arrays_and_runs_under_scan_vmap_and_pmap(name):
    optimizer = optim.create(name, **OPTIONS)
    params = jax.tree.map(jnp.asarray, make_params())
    state = optimizer.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    x, y = (jnp.asarray(a[:6]) for a in batches())

    def run(params, x, y, lr, wd):
        def step(carry, xy):
            params, state = carry
            grads = jax.grad(loss_of)(params, *xy)
            directions, state = optimizer.update(grads, state, params, weight_decay=wd)
            return (optim.apply_updates(params, directions, lr), state), None

        return jax.lax.scan(step, (params, state), (x, y))[0]

    rates = jnp.array([0.01, 0.02])
    decays = jnp.array([0.0, 0.1])
    single_run = jax.jit(run)
    one = [single_run(params, x, y, lr, wd) for lr, wd in zip(rates, decays)]
    swept = jax.jit(jax.vmap(run, in_axes=(None, None, None, 0, 0)))(params, x, y, rates, decays)
    mapped = jax.pmap(run, in_axes=(None, None, None, 0, 0))(params, x, y, rates, decays)
    assert jax.tree.structure(one[0][1]) == jax.tree.structure(state)
    for several in (swept, mapped):
        for i, single in enumerate(one):
            for a, b in zip(jax.tree.leaves(several), jax.tree.leaves(single), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sdg", {}, "did you mean 'sgd'"),
        ("lbfgs-like", {}, "there are"),
        ("sgd", {"momentum": -0.1}, "momentum is -0.1"),
        ("sgd", {"nesterov": True}, "nesterov needs"),
        ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs"),
        ("adam", {"betas": (0.9, 1.0)}, "betas are"),
        ("adam", {"eps": -1}, "eps is -1"),
        ("sgd", {"accumulate_steps": 0}, "accumulate_steps is 0"),
        ("sgd", {"max_grad_norm": -1}, "max_grad_norm"),
        ("sgd", {"decay_exclude": "("}, "no regular expression"),
        ("sgd", {"decay_exclude": "embedding"}, "matches no parameter"),
        ("muon", {"decay_exclude": "embedding"}, "matches no parameter"),
        ("muon", {"muon_exclude": "bias"}, "matches no matrix"),
        ("muon", {"muon_exclude": "fc"}, "finds no matrix"),
        ("muon", {"muon_rest": "muon"}, "unknown rule muon_rest 'muon'"),
        ("muon", {"muon_momentum": 1.0}, "muon_momentum is 1.0"),
        ("muon", {"muon_steps": 0}, "muon_steps 0"),
    ],
)
def test_bad_optimizers_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        optim.create(name, **options).init(make_params())


@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.3])
@pytest.mark.parametrize("warmup, counted", [(False, False), (False, True), (True, True)])
def test_ema_equals_torch_lerp_with_timm_decay(decay, warmup, counted):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    ema = {"w": jnp.ones(20), "count": jnp.int32(0)}
    theirs = torch.ones(20)
    update = jax.jit(functools.partial(optim.ema_update, decay=decay, warmup=warmup))
    for step in range(1, 41):
        new = rng.normal(0, 1, 20).astype(np.float32)
        number = step if counted else None
        ema = update(ema, {"w": new, "count": jnp.int32(step)}, step=number)
        theirs.lerp_(torch.tensor(new), 1.0 - timm_decay(decay, number, warmup))
        np.testing.assert_allclose(ema["w"], theirs.numpy(), rtol=1e-6, atol=1e-6)
        assert ema["count"] == step
        if counted and step == 1:
            np.testing.assert_array_equal(ema["w"], new)


def test_apply_updates_keeps_dtypes():
    params = {"w": jnp.ones(3), "half": jnp.ones(3, jnp.bfloat16)}
    new = optim.apply_updates(params, jax.tree.map(jnp.ones_like, params), jnp.float32(0.5))
    assert new["w"].dtype == jnp.float32 and new["half"].dtype == jnp.bfloat16
    assert (new["w"] == 0.5).all() and (new["half"] == 0.5).all()
