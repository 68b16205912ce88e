"""Optimisers with torch.optim's semantics, as optax gradient transformations.

`create` returns a transformation whose updates are *descent directions*. The learning rate stays
outside, in `apply_updates`, so that one value serves the update, the log line and the plateau rule;
weight decay is an argument of every update. Both may be traced: one program serves a whole sweep.
"""

import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcifar import muon, partition
from jaxcifar.errors import UserError, unknown


def create(
    name,
    *,
    momentum=0.0,
    dampening=0.0,
    nesterov=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    max_grad_norm=0.0,
    max_grad_value=0.0,
    accumulate_steps=1,
    decay_exclude="",
    trainable="",
    lr_multipliers="",
    muon_momentum=0.95,
    muon_steps=5,
    muon_exclude="",
    muon_rest="adamw",
):
    """Build the optimiser `name`: "sgd", "adam", "adamw" or "muon".

    Options that belong to another optimiser are checked and ignored; defaults are torch.optim's.
    Every update goes: mean gradient over `accumulate_steps` consecutive calls; clip to
    `max_grad_norm` (torch.nn.utils.clip_grad_norm_), then to +-`max_grad_value` (clip_grad_value_),
    0 = off; weight decay (coupled L2 for sgd and adam, decoupled for adamw) of every parameter
    whose path "a/b/c" does not match the regular expression `decay_exclude`; the optimiser's own
    rule; the factor of the learning rate that `lr_multipliers` gives the path (see
    `partition.multipliers`), which acts on the weight decay too, as the rate of a torch parameter
    group does (but for a schedule's floor, such as eta_min: the factor is of the finished rate, so
    the floor of a path is scaled too).

    "muon" (see muon.py) orthogonalises the momentum, `muon_momentum`, of every kernel (and attention's
    in_proj_weight) whose path `muon_exclude`, a regular expression, does not match, in `muon_steps`
    Newton-Schulz steps, with decoupled weight decay. All other parameters take the rule `muon_rest`,
    which the other options are for. Exclude the first and the last layer, as the write-up does, and
    give the rest a rate of its own by `lr_multipliers`.

    With `trainable`, a regular expression, the optimiser is one of the parameters whose path it
    matches: gradients and updates are those of `partition.split`, and nothing is kept for the rest.

    Where `accumulate_steps` > 1, calls are counted over the whole run: gradients left over at the
    end of an epoch go into the first update of the next one. Calls in between return zeros and
    change no optimiser state.

    Returns:
      optax.GradientTransformationExtraArgs: `update(grads, opt_state, params, *, weight_decay)`
      gives directions u for `apply_updates`; `momentum=` optionally replaces the momentum (Adam:
      the first beta; muon: that of `muon_rest`) for this call, as torch's OneCycleLR does; other
      keywords are ignored. The state holds arrays only. Gradients and state are float32 like the
      parameters.

    Raises:
      UserError: unknown name, an option out of range, or a `decay_exclude` that is no regular
        expression or (at `init`) matches no parameter.
    """
    _check_name(name)
    _check_options(momentum, dampening, nesterov, betas, eps)
    if max_grad_norm < 0 or max_grad_value < 0:
        raise UserError("max_grad_norm and max_grad_value must be positive, or 0 to switch off")
    if accumulate_steps != int(accumulate_steps) or accumulate_steps < 1:
        raise UserError(f"accumulate_steps is {accumulate_steps}: expected an integer, 1 or more")
    rule = OPTIMIZERS[name](
        decay=_add_weight_decay(decay_exclude),
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        betas=betas,
        eps=eps,
        muon_momentum=muon_momentum,
        muon_steps=muon_steps,
        muon_exclude=muon_exclude,
        muon_rest=muon_rest,
    )
    parts = [_clip_by_torch_norm(max_grad_norm)] if max_grad_norm else []
    parts += [optax.clip(max_grad_value)] if max_grad_value else []
    rates = [_scale_by_path(lr_multipliers)] if lr_multipliers else []
    chain = optax.with_extra_args_support(optax.chain(*parts, *rule, *rates))
    chain = _accumulate(chain, int(accumulate_steps)) if accumulate_steps > 1 else chain
    return _of_trained(chain, trainable) if trainable else chain


def option_names(name, muon_rest="adamw"):
    """Return the names of the options of optimiser `name`, a tuple of str; UserError if unknown.

    Muon's are its own, and those of the rule that takes the rest.
    """
    _check_name(name)
    if name == "muon":
        _check_rest(muon_rest)
        own = [key for key in _parameters(name) if key.startswith("muon_")]
        return (*own, *_parameters(muon_rest))
    return _parameters(name)


def _parameters(name):
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    return tuple(key for key in parameters if key not in ("decay", "_"))


def apply_updates(params, updates, learning_rate):
    """Return params - learning_rate * updates, each leaf in its own dtype.

    `learning_rate` is a float or a (traced) float32 scalar.
    """
    return jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), params, updates)


def ema_update(ema, new, decay, step=None, *, warmup=False):
    """Return the exponential moving average `ema` moved towards `new` by 1 - `decay`.

    Args:
      ema, new: pytrees of one structure (params, or params and batch_stats). Leaves that are no
        floats are copied from `new`.
      decay: Python float, for instance 0.9999.
      step: number of this update, counted from 1, int or traced int32: the first update copies
        `new`. None: every update uses `decay`.
      warmup: use the smaller of `decay` and 1 - step**(-2/3); needs `step`.

    Source: timm.utils.ModelEmaV3.update(model, step) with use_warmup, warmup_gamma 1 and
    warmup_power 2/3 (steps below count from 0 after the first update, as there).
    """
    weight = 1.0 - decay  # in Python: 1 - 0.9999 in float32 is wrong by 2e-4 of itself
    if step is not None:
        if warmup:
            updates = jnp.maximum(step, 1).astype(jnp.float32)  # timm: 1 + (step - 1) / gamma
            weight = jnp.maximum(weight, updates ** (-2 / 3))
        weight = jnp.where(step <= 1, 1.0, weight)

    def lerp(old, value):
        if not jnp.issubdtype(jnp.result_type(old), jnp.floating):
            return value
        delta = value - old  # two forms, as torch.lerp: exact at both ends
        mixed = jnp.where(weight < 0.5, old + weight * delta, value - (1 - weight) * delta)
        return mixed.astype(old.dtype)

    return jax.tree.map(lerp, ema, new)


def _check_name(name):
    if name not in OPTIMIZERS:
        raise UserError(unknown("optimizer", name, OPTIMIZERS))


def _check_rest(muon_rest):
    known = [name for name in OPTIMIZERS if name != "muon"]
    if muon_rest not in known:
        raise UserError(unknown("rule muon_rest", muon_rest, known))


def _check_options(momentum, dampening, nesterov, betas, eps):
    """Raise UserError where torch.optim's constructors raise ValueError."""
    if momentum < 0:
        raise UserError(f"momentum is {momentum}: expected 0 or more")
    if nesterov and (momentum == 0 or dampening != 0):
        raise UserError("nesterov needs a momentum above 0 and dampening 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas are {tuple(betas)}: expected two numbers from 0 to below 1")
    if eps < 0:
        raise UserError(f"eps is {eps}: expected 0 or more")


def _sgd(*, decay, momentum, dampening, nesterov, **_):
    """torch.optim.SGD: weight decay is part of the gradient, before momentum."""
    parts = [decay]
    if momentum and dampening:
        parts.append(_dampen(dampening))
    if momentum:
        parts.append(_momentum(momentum, nesterov))
    return parts


def _adam(*, decay, betas, eps, **_):
    """torch.optim.Adam: weight decay is part of the gradient, before the moments."""
    return [decay, _scale_by_adam(*betas, eps)]


def _adamw(*, decay, betas, eps, **_):
    """torch.optim.AdamW: p *= 1 - lr wd, then Adam's step; as a direction, Adam's + wd p."""
    return [_scale_by_adam(*betas, eps), decay]


def _muon(*, decay, momentum, dampening, nesterov, betas, eps, muon_momentum, muon_steps,
          muon_exclude, muon_rest, **_):
    """Muon and decoupled weight decay for the matrices; `muon_rest` for the other parameters."""
    _check_rest(muon_rest)
    if not 0 <= muon_momentum < 1 or muon_steps != int(muon_steps) or muon_steps < 1:
        raise UserError(f"muon_momentum is {muon_momentum} and muon_steps {muon_steps}: expected a "
                        "number from 0 to below 1, and an integer, 1 or more")
    # What decay_exclude matches may lie in either part: its check sees all parameters.
    check = optax.GradientTransformationExtraArgs(decay.init, lambda u, s, params=None, **_: (u, s))
    of_part = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), decay.update)
    rest = OPTIMIZERS[muon_rest](decay=of_part, momentum=momentum, dampening=dampening,
                                 nesterov=nesterov, betas=betas, eps=eps)
    rule = [muon.scale_by_muon(muon_momentum, int(muon_steps)), of_part]
    return [check, muon.for_matrices(muon_exclude, optax.chain(*rule), optax.chain(*rest))]


# name -> builder: the options of `create` -> a list of transformations, in order
OPTIMIZERS = {"sgd": _sgd, "adam": _adam, "adamw": _adamw, "muon": _muon}


def _add_weight_decay(exclude):
    """Add weight_decay * p to the updates of the parameters whose path `exclude` does not match."""
    pattern = partition.pattern(exclude, "decay_exclude") if exclude else None

    def excluded(path):
        return pattern is not None and pattern.search(partition.path_name(path)) is not None

    def init(params):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if pattern is not None and not any(map(excluded, paths)):
            raise UserError(f"decay_exclude {exclude!r} matches no parameter that is trained")
        return optax.EmptyState()

    def update(updates, state, params, *, weight_decay, **_):
        def add(path, u, p):
            return u if excluded(path) else u + weight_decay * p

        return jax.tree_util.tree_map_with_path(add, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_path(text):
    """Multiply the update of each parameter by its path's factor."""
    pairs = partition.multipliers(text)

    def init(params):
        partition.factors(params, pairs)
        return optax.EmptyState()

    def update(updates, state, params=None, **_):
        del params
        scales = partition.factors(updates, pairs)
        return jax.tree.map(lambda u, scale: u * scale, updates, scales), state

    return optax.GradientTransformationExtraArgs(init, update)


def _of_trained(inner, trainable):
    """Show `inner` the trained parameters only, of those that it is given."""

    def init(params):
        return inner.init(partition.split(params, trainable)[0])

    def update(updates, state, params=None, **extra_args):
        trained = None if params is None else partition.split(params, trainable)[0]
        return inner.update(updates, state, trained, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _clip_by_torch_norm(max_norm):
    """Scale by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.

    optax.clip_by_global_norm has no 1e-6. A NaN or infinite norm spreads, as in torch.
    """

    def update(updates, state, params=None, **_):
        del params
        norm = jnp.sqrt(sum(jnp.sum(u * u) for u in jax.tree.leaves(updates)))
        scale = jnp.minimum(max_norm / (norm + 1e-6), 1.0)
        return jax.tree.map(lambda u: u * scale, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class DampenState(NamedTuple):
    """Whether the momentum buffer has taken its first gradient: bool []."""

    started: jax.Array


def _dampen(dampening):
    """Scale by 1 - dampening, except the first gradient, which torch copies into the buffer."""

    def init(params):
        del params
        return DampenState(started=jnp.zeros([], bool))

    def update(updates, state, params=None, **_):
        del params
        scale = jnp.where(state.started, 1.0 - dampening, 1.0)
        return jax.tree.map(lambda u: u * scale, updates), DampenState(jnp.ones([], bool))

    return optax.GradientTransformationExtraArgs(init, update)


def _momentum(default, nesterov):
    """optax.trace (equal to torch's momentum) whose decay one update may replace."""

    def update(updates, state, params=None, *, momentum=None, **_):
        del params
        decay = default if momentum is None else momentum
        return optax.trace(decay, nesterov).update(updates, state)

    return optax.GradientTransformationExtraArgs(optax.trace(default, nesterov).init, update)


def _bias_correction(beta, count):
    """Return 1 - beta**count (torch computes it in double) to a few float32 roundings.

    In float32, 1 - 0.999**1, as optax.scale_by_adam computes it, is wrong by 1e-5 of itself.
    """
    log_beta = math.log(beta) if isinstance(beta, float) and beta > 0 else jnp.log(beta)
    return -jnp.expm1(count.astype(jnp.float32) * log_beta)


def _scale_by_adam(beta1, beta2, eps):
    """Adam's direction, m_hat / (sqrt(v) / sqrt(1 - beta2**t) + eps), as torch.optim.Adam.

    optax.scale_by_adam with an exact bias correction and a beta1 that one update may replace.
    """

    def update(updates, state, params=None, *, momentum=None, **_):
        del params
        b1 = float(beta1) if momentum is None else momentum
        b2 = float(beta2)
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * (g * g), updates, state.nu)
        scale_mu = 1 / _bias_correction(b1, count)
        scale_nu = 1 / jnp.sqrt(_bias_correction(b2, count))
        directions = jax.tree.map(
            lambda m, v: (m * scale_mu) / (jnp.sqrt(v) * scale_nu + eps), mu, nu
        )
        return directions, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


class AccumulateState(NamedTuple):
    """What is carried between updates.

    count: int32 [], gradients taken since the last update. gradients: their sum, each divided by k;
    stale, and not read, where count is 0. inner: the optimiser's state.
    """

    count: jax.Array
    gradients: Any
    inner: Any


def _accumulate(inner, k):
    """Run `inner` on the mean of every k gradients; return zeros in between.

    The inner update is computed at every call and selected at every k-th; the sum starts over at
    the next call. lax.cond makes XLA copy more (26 ms against 15 for 4.7 million parameters on 2
    CPU cores). Selected, not multiplied by 0 or 1 as in optax.MultiSteps, where one infinite
    gradient turns all parameters to NaN at once.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AccumulateState(jnp.zeros([], jnp.int32), zeros, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        first, emit = state.count == 0, state.count == k - 1
        gradients = jax.tree.map(
            lambda a, g: jnp.where(first, 0.0, a) + g / k, state.gradients, updates
        )
        directions, new = inner.update(gradients, state.inner, params, **extra_args)
        inner_state = jax.tree.map(lambda x, y: jnp.where(emit, x, y), new, state.inner)
        directions = jax.tree.map(lambda u: jnp.where(emit, u, 0.0), directions)
        return directions, AccumulateState((state.count + 1) % k, gradients, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
