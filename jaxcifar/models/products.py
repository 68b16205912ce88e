"""How a matrix product is computed: the same values and gradients whichever form is chosen.

As in `conv`, the form is chosen when a model is traced, by the backend: `@` and its own gradients
on accelerators. On CPU (measured: a feed-forward layer of 30 to 2,048 and back, 8,320 rows, forward
and backward 137 -> 31 ms and 82 -> 32 ms of CPU time):

- XLA computes a product of something elementwise (an activation's gradient, say) by loops of its own
  in place of the fast library routine, unless a barrier keeps the two apart.
- The gradient of a wide layer into a narrow one takes 1.1 to 8 times as long with the wider operand
  on the left.
"""

import jax
import jax.numpy as jnp
from jax import lax


def linear(x, kernel):
    """Return x @ kernel, [..., out] of [..., in] and [in, out], of their common dtype."""
    return x @ kernel if jax.default_backend() != "cpu" else _linear(x, kernel)


def contract(a, b):
    """Return a^T b, float32 [A, B], of [..., A] and [..., B]."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    if a.shape[-1] <= b.shape[-1]:
        return _contract_rows(a, b)
    # The wider operand on the right; the barrier keeps it there.
    return lax.optimization_barrier(_contract_rows(b, a)).T


@jax.custom_vjp
def _linear(x, kernel):
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(residuals, dy):
    x, kernel = residuals
    dy = lax.optimization_barrier(dy)
    rows, columns = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    # The gradient of a large kernel from few rows takes twice as long turned round, as in `contract`.
    product = contract if len(rows) >= max(kernel.shape) else _contract_rows
    return dy @ kernel.T, product(rows, columns).astype(kernel.dtype)


_linear.defvjp(_forward, _backward)


def _contract_rows(a, b):
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
