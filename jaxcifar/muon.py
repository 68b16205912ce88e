"""Muon: momentum whose matrices are made orthogonal, for the filters and matrices of a network.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon); torch.optim.Muon for matrices.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcifar import partition
from jaxcifar.errors import UserError

# Of p(s) = a s + b s^3 + c s^5, which the iteration applies to every singular value: chosen in the
# write-up for the steepest slope at 0; five steps take values from 0.002 to 1 into 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TRANSPOSED = "in_proj_weight"  # [out, in], as torch has it
_EPS = 1e-7  # on the norm: a gradient of zeros stays zero


def orthogonalize(matrices, steps):
    """Return near U V^T of each matrix U S V^T, by `steps` of a quintic Newton-Schulz iteration.

    matrices: float [..., m, n]. Returns float32 [..., m, n]. Singular values end near 1, not at 1
    (see COEFFICIENTS); fewer steps leave small ones below.
    """
    x = jnp.asarray(matrices, jnp.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x  # the products are of the smaller side's size
    x = x / (jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)) + _EPS)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def matrices(params, exclude):
    """Return a regular expression of the paths of the parameters that Muon takes.

    They are the kernels (a kernel [..., in, out] is a matrix [... in, out]) and attention's
    in_proj_weight, whose path the regular expression `exclude` does not match; tokens and positions
    are none. Raises UserError where none is left, or `exclude` matches none.
    """
    pattern = partition.pattern(exclude, "config.optimizer.muon_exclude") if exclude else None
    there = [partition.path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
             if jnp.ndim(leaf) >= 2]
    names = [name for name in there if name.endswith(("kernel", _TRANSPOSED))]
    taken = [name for name in names if pattern is None or not pattern.search(name)]
    if not taken:
        raise UserError("optimizer 'muon' finds no matrix among the trained parameters: there are "
                        f"{', '.join(there) or 'only vectors'}, of which kernels are matrices, less "
                        f"muon_exclude {exclude!r}")
    if pattern is not None and len(taken) == len(names):
        raise UserError(f"muon_exclude {exclude!r} matches no matrix of this model; they are named "
                        f"like {', '.join(names[-2:])}")
    return f"^({'|'.join(map(re.escape, taken))})$"


def unit_filters(params, exclude):
    """Return params whose `matrices` have the norm sqrt(outputs): every filter about the norm 1.

    Before BatchNorm only a filter's direction counts; a fixed norm makes the rate an angle.
    Source: airbench94_muon's rule, for filters [outputs, ...].
    """
    filters, rest = partition.split(params, matrices(params, exclude))
    scaled = jax.tree.map(
        lambda p: p * (math.sqrt(p.shape[-1]) / jnp.sqrt(jnp.sum(p * p))), filters)
    return partition.merge(scaled, rest)


class MuonState(NamedTuple):
    """The momentum of every matrix."""

    momentum: Any


def scale_by_muon(momentum, steps):
    """Build the rule of the matrices: Nesterov momentum, orthogonalised.

    Updates are times sqrt(max(1, outputs / inputs)), as in the write-up. Matrices of one shape are
    orthogonalised together.
    """
    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None, **_):
        del params
        buffers = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: g + momentum * m, buffers, updates)
        found, structure = jax.tree_util.tree_flatten_with_path(ahead)
        turned = [partition.path_name(path).endswith(_TRANSPOSED) for path, _ in found]
        kernels = [leaf.T if turn else leaf for (_, leaf), turn in zip(found, turned)]
        updates = [update.T if turn else update
                   for update, turn in zip(_by_shape(kernels, steps), turned)]
        return jax.tree.unflatten(structure, updates), MuonState(buffers)

    return optax.GradientTransformationExtraArgs(init, update)


def for_matrices(exclude, rule, rest):
    """Build the transformation that gives `matrices` to `rule`, other parameters to `rest`."""
    def both(params):
        return partition.split(params, matrices(params, exclude))

    def init(params):
        return tuple(part.init(p) for part, p in zip((rule, rest), both(params)))

    def update(updates, state, params=None, **extra_args):
        given = (None, None) if params is None else both(params)
        results = [part.update(u, s, p, **extra_args) for part, u, s, p in zip(
            (rule, rest), both(updates), state, given)]
        return partition.merge(results[0][0], results[1][0]), tuple(new for _, new in results)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_shape(leaves, steps):
    """Orthogonalise kernels [..., in, out], those of one matrix shape as one batch."""
    flat = [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves]
    results = [None] * len(leaves)
    for rows, columns in dict.fromkeys(m.shape for m in flat):
        where = [i for i, m in enumerate(flat) if m.shape == (rows, columns)]
        done = orthogonalize(jnp.stack([flat[i] for i in where]), steps)
        done = done * math.sqrt(max(1.0, columns / rows))
        for i, matrix in zip(where, done):
            results[i] = matrix.reshape(leaves[i].shape).astype(leaves[i].dtype)
    return results
