"""How a convolution is computed: the same values and gradients whichever form is chosen.

The forms differ in speed only, and every choice between them is made here, when a model is traced,
by the backend. On CPU the gradient of the filters is a few matrix products of shifted images;
XLA's own form of it, a convolution whose window is the whole image, takes 1.2 to 3 times as long
(and up to 20 times for 1x1 filters with a stride).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv2d(x, kernel, *, stride=(1, 1), padding=((0, 0), (0, 0)), groups=1):
    """Convolve images with a kernel (cross-correlation, as torch.nn.functional.conv2d).

    x: [N, H, W, C]; kernel: [kh, kw, C / groups, features], of x's dtype; stride: (rows, columns);
    padding: ((top, bottom), (left, right)) zeros. Returns [N, H', W', features] of x's dtype.
    """
    if groups == 1 and jax.default_backend() == "cpu":
        return _with_shifted_gradient(x, kernel, stride, padding)
    return _plain(x, kernel, stride, padding, groups)


def _plain(x, kernel, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x, kernel, stride, padding,
        dimension_numbers=DIMENSION_NUMBERS, feature_group_count=groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _with_shifted_gradient(x, kernel, stride, padding):
    return _plain(x, kernel, stride, padding)


def _forward(x, kernel, stride, padding):
    return _plain(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, dy):
    x, kernel = residuals
    dx, = jax.linear_transpose(lambda x: _plain(x, kernel, stride, padding), x)(dy)
    return dx, filter_gradient(x, dy, kernel.shape[:2], stride, padding).astype(kernel.dtype)


_with_shifted_gradient.defvjp(_forward, _backward)


def filter_gradient(x, dy, kernel_size, stride, padding):
    """Return a convolution's kernel gradient, float32 [kh, kw, C, features], from matrix products.

    x: [N, H, W, C]; dy: [N, H', W', features]; stride and padding as in `conv2d`.
    """
    if stride == (1, 1) and x.shape[-1] >= 16:
        return _split_shifts(x, dy, kernel_size, padding)
    return _shifts_of_x(x, dy, kernel_size, stride, padding)


def _split_shifts(x, dy, kernel_size, padding):
    """Shift x by rows and dy, the other way, by columns: kh products, kh + kw copies of images.

    dw[i, j] = sum over h, w of x[h + i - top, w] dy[h, w + left - j].
    """
    (kh, kw), (channels, features) = kernel_size, (x.shape[-1], dy.shape[-1])
    (top, _), (left, _) = padding
    rows, width = dy.shape[1], x.shape[2]
    columns = [_window(dy, (0, left - j), (rows, width)) for j in range(kw)]
    columns = jnp.concatenate(columns, axis=-1)
    products = [_product(columns, _window(x, (i - top, 0), (rows, width))) for i in range(kh)]
    grouped = jnp.stack(products).reshape(kh, kw, features, channels)
    return jnp.swapaxes(grouped, 2, 3)


def _shifts_of_x(x, dy, kernel_size, stride, padding):
    """Take the kw columns that each row of filters meets side by side: kh products."""
    (kh, kw), (channels, features) = kernel_size, (x.shape[-1], dy.shape[-1])
    (top, _), (left, _) = padding
    size = dy.shape[1:3]
    products = []
    for i in range(kh):
        columns = [_window(x, (i - top, j - left), size, stride) for j in range(kw)]
        products.append(_product(jnp.concatenate(columns, axis=-1), dy))
    return jnp.stack(products).reshape(kh, kw, channels, features)


def _window(x, start, size, stride=(1, 1)):
    """Return `size` rows and columns of x, `stride` apart from `start` on; zeros outside the map."""
    edges = [(0, 0, 0)]
    for axis in (0, 1):
        reach = (size[axis] - 1) * stride[axis] + 1
        edges.append((-start[axis], start[axis] + reach - x.shape[axis + 1], 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)])  # negative edges crop
    return x[:, ::stride[0], ::stride[1]]


def _product(a, b):
    """Return a^T b, float32 [A, B], of [..., A] and [..., B]."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
