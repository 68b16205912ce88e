"""How a convolution is computed: the same values and gradients whichever form is chosen.

The forms differ in speed only, and every choice between them is made here, when a model is traced,
by the backend. XLA's own forms serve accelerators. On CPU:

- The gradient of the filters is a few matrix products of shifted images; XLA's own form of it, a
  convolution whose window is the whole image, takes 1.2 to 5 times as long (and up to 20 times for
  1x1 filters with a stride).
- A convolution with 1x1 filters is a matrix product, and so is one of a map smaller than the filters,
  of its patches: XLA would exchange the two, and take 50 times as long.
- A depthwise convolution is a sum of shifted images, each times its row of the kernel, and so is
  the gradient of its input; that of its filters sums all shifts in one pass over the images. XLA's
  own form takes 40 to 60 times as long.
- Other groups are merged until a few dense convolutions remain, whose kernels are zero between the
  groups: more multiplications, in a form that XLA:CPU runs fast.

Of several seeds at once (vmap over kernels and images) each has convolutions of its own, see
`seeds_apart`: batched they would be grouped ones, and the gradient of the filters, on a GPU, a
convolution whose window is the whole image, for which cuDNN has no fast kernel, if any.
"""

import contextlib
import contextvars
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcifar.models.products import contract

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
MERGED_WIDTH = 32  # channels, where a group has fewer
_CACHED_BYTES = 2 << 20  # of the copies from which a gradient of filters is computed
_PLAIN = contextvars.ContextVar("jaxcifar_plain_convolutions", default=False)
_APART = contextvars.ContextVar("jaxcifar_seeds_apart", default=False)


@contextlib.contextmanager
def _set(variable):
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def plain_convolutions():
    """Take XLA's own form of every convolution that is traced in a `with` block: to count its work."""
    return _set(_PLAIN)


def seeds_apart():
    """Compute what is traced in a `with` block and under jax.vmap with one convolution per example."""
    return _set(_APART)


def conv2d(x, kernel, *, stride=(1, 1), padding=((0, 0), (0, 0)), groups=1):
    """Convolve images with a kernel (cross-correlation, as torch.nn.functional.conv2d).

    x: [N, H, W, C]; kernel: [kh, kw, C / groups, features], of x's dtype; stride: (rows, columns);
    padding: ((top, bottom), (left, right)) zeros. Returns [N, H', W', features] of x's dtype.
    """
    form = _apart if _APART.get() else _form
    return form(x, kernel, stride, padding, groups)


def _form(x, kernel, stride, padding, groups):
    if _PLAIN.get() or jax.default_backend() != "cpu":
        return _plain(x, kernel, stride, padding, groups)
    if groups == 1:
        return _with_shifted_gradient(x, kernel, stride, padding)
    if groups == x.shape[-1]:
        x = jnp.repeat(x, kernel.shape[-1] // groups, axis=-1)  # each channel has so many filters
        return _depthwise(x, kernel, stride, padding)
    return _merged_groups(x, kernel, stride, padding, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _apart(x, kernel, stride, padding, groups):
    """Compute `_form` and its gradients one after the other where jax.vmap has several."""
    return _one_by_one(
        lambda x, kernel: _form(x, kernel, stride, padding, groups), x, kernel)


def _apart_forward(x, kernel, stride, padding, groups):
    return _apart(x, kernel, stride, padding, groups), (x, kernel)


def _apart_backward(stride, padding, groups, residuals, dy):
    def gradients(x, kernel, dy):
        return jax.vjp(lambda x, kernel: _form(x, kernel, stride, padding, groups), x, kernel)[1](dy)

    return _one_by_one(gradients, *residuals, dy)


_apart.defvjp(_apart_forward, _apart_backward)


def _one_by_one(function, *arrays):
    """Return function(*arrays); under jax.vmap call it for each example, and stack what it returns."""
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def _(count, batched, *arrays):
        outputs = [call(*(a[i] if many else a for a, many in zip(arrays, batched, strict=True)))
                   for i in range(count)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        return stacked, jax.tree.map(lambda _: True, stacked)

    return call(*arrays)


def _plain(x, kernel, stride, padding, groups=1):
    return lax.conv_general_dilated(
        x, kernel, stride, padding,
        dimension_numbers=DIMENSION_NUMBERS, feature_group_count=groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _with_shifted_gradient(x, kernel, stride, padding):
    return _dense(x, kernel, stride, padding)


def _dense(x, kernel, stride, padding):
    size = _output_size(x.shape, kernel.shape, stride, padding)
    if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):
        return jnp.dot(x[:, ::stride[0], ::stride[1]], kernel[0, 0])
    if math.prod(kernel.shape[:2]) > min(math.prod(x.shape[1:3]), math.prod(size)):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        patches = [_window(x, shift, size, stride) for shift in np.ndindex(kernel.shape[:2])]
        return jnp.dot(jnp.concatenate(patches, -1), kernel.reshape(-1, kernel.shape[-1]))
    return _plain(x, kernel, stride, padding)


def _output_size(shape, kernel_shape, stride, padding):
    return [(length + sum(sides) - k) // step + 1 for length, sides, k, step in
            zip(shape[1:3], padding, kernel_shape, stride)]


def _forward(x, kernel, stride, padding):
    return _dense(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, dy):
    x, kernel = residuals
    dx, = jax.linear_transpose(lambda x: _dense(x, kernel, stride, padding), x)(dy)
    return dx, filter_gradient(x, dy, kernel.shape[:2], stride, padding).astype(kernel.dtype)


_with_shifted_gradient.defvjp(_forward, _backward)


def filter_gradient(x, dy, kernel_size, stride, padding):
    """Return a convolution's kernel gradient, float32 [kh, kw, C, features], from matrix products.

    x: [N, H, W, C]; dy: [N, H', W', features]; stride and padding as in `conv2d`. A few images at a
    time, so that their copies stay in the cache, where there are so many that they would not.
    """
    split = stride == (1, 1) and x.shape[-1] >= 16

    def gradient(x, dy):
        if split:
            return _split_shifts(x, dy, kernel_size, padding)
        return _shifts_of_x(x, dy, kernel_size, stride, padding)

    if kernel_size == stride == (1, 1) or x.shape[-1] < 16:
        return gradient(x, dy)  # there are no copies, or thin ones
    copied, other = (dy, x) if split else (x, dy)
    image = (kernel_size[1] * copied.shape[-1] + other.shape[-1]) * math.prod(dy.shape[1:3])
    zeros = jnp.zeros((*kernel_size, x.shape[-1], dy.shape[-1]), jnp.float32)
    return _sum_over_chunks(gradient, zeros, x, dy, _CACHED_BYTES // (4 * image))


def _sum_over_chunks(function, zeros, x, dy, size):
    """Return function(x, dy), a sum over images, from chunks of `size` images or somewhat fewer.

    At least two chunks, all of them in a loop: XLA:CPU would compute dy, a sum over all later layers
    in a DenseNet, anew for every copy, but materialises what a loop works on.
    """
    size = next(n for n in range(max(1, min(size, len(x) // 2)), 0, -1) if len(x) % n == 0)
    x, dy = (a.reshape(-1, size, *a.shape[1:]) for a in (x, dy))
    return lax.scan(lambda total, chunk: (total + function(*chunk), None), zeros, (x, dy))[0]


def _split_shifts(x, dy, kernel_size, padding):
    """Shift x by rows and dy, the other way, by columns: kh products, kh + kw copies of images.

    dw[i, j] = sum over h, w of x[h + i - top, w] dy[h, w + left - j].
    """
    (kh, kw), (channels, features) = kernel_size, (x.shape[-1], dy.shape[-1])
    (top, _), (left, _) = padding
    rows, width = dy.shape[1], x.shape[2]
    columns = [_window(dy, (0, left - j), (rows, width)) for j in range(kw)]
    columns = jnp.concatenate(columns, axis=-1)
    products = [contract(columns, _window(x, (i - top, 0), (rows, width))) for i in range(kh)]
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
        products.append(contract(jnp.concatenate(columns, axis=-1), dy))
    return jnp.stack(products).reshape(kh, kw, channels, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, stride, padding):
    """Convolve each channel with a filter of its own: x [N, H, W, C], kernel [kh, kw, 1, C]."""
    size = _output_size(x.shape, kernel.shape, stride, padding)
    dtype, kernel = x.dtype, kernel.astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0))).astype(jnp.float32)
    return sum(_window(x, shift, size, stride) * kernel[(*shift, 0)]
               for shift in np.ndindex(kernel.shape[:2])).astype(dtype)


def _depthwise_forward(x, kernel, stride, padding):
    return _depthwise(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, residuals, dy):
    x, kernel = residuals
    edges = []  # spread dy by the stride, and pad it so that the flipped kernel gives x's size
    for length, out, k, step, (first, _) in zip(x.shape[1:3], dy.shape[1:3], kernel.shape, stride,
                                                padding):
        edges.append((k - 1 - first, length + first - (out - 1) * step - 1, step - 1))
    spread = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    dx = _depthwise(spread, kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)))
    return dx, depthwise_filter_gradient(x, dy, kernel.shape[:2], stride, padding).astype(x.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_filter_gradient(x, dy, kernel_size, stride, padding):
    """Return a depthwise convolution's kernel gradient, float32 [kh, kw, 1, C].

    x: [N, H, W, C]; dy: [N, H', W', C]; stride and padding as in `conv2d`. One reduction carries all
    kh * kw sums of an image, so that it is read once, and is in the cache for every shift.
    """
    x, dy = jnp.pad(x, ((0, 0), *padding, (0, 0))).astype(jnp.float32), dy.astype(jnp.float32)
    products = [_window(x, shift, dy.shape[1:3], stride) * dy
                for shift in np.ndindex(*kernel_size)]
    zeros = [jnp.zeros((), jnp.float32)] * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: [u + v for u, v in zip(a, b)], (1, 2))
    # XLA would make one reduction of the two, which runs on one core.
    sums = lax.optimization_barrier(jnp.stack(sums))
    return sums.sum(1).reshape(*kernel_size, 1, -1)


def _merged_groups(x, kernel, stride, padding, groups):
    """Convolve MERGED_WIDTH or more channels at a time, as many groups as that takes, densely."""
    channels, features = kernel.shape[2], kernel.shape[3] // groups  # of one group
    merged = -(-MERGED_WIDTH // channels)
    outputs = []
    for first in range(0, groups, merged):
        count = min(merged, groups - first)
        part = x[..., first * channels:(first + count) * channels]
        filters = kernel[..., first * features:(first + count) * features]
        outputs.append(_with_shifted_gradient(part, _block_diagonal(filters, count), stride, padding))
    return jnp.concatenate(outputs, axis=-1)


def _block_diagonal(kernel, groups):
    """Return the dense kernel [kh, kw, groups * c, features] of a grouped one [kh, kw, c, features]."""
    kh, kw, channels, features = kernel.shape
    filters = kernel.reshape(kh, kw, channels, groups, features // groups)
    blocks = jnp.einsum("ijcgf,hg->ijhcgf", filters, jnp.eye(groups, dtype=kernel.dtype))
    return blocks.reshape(kh, kw, groups * channels, features)


def _window(x, start, size, stride=(1, 1)):
    """Return `size` rows and columns of x, `stride` apart from `start` on; zeros outside the map."""
    edges = [(0, 0, 0)]
    for axis in (0, 1):
        reach = (size[axis] - 1) * stride[axis] + 1
        edges.append((-start[axis], start[axis] + reach - x.shape[axis + 1], 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)])  # negative edges crop
    return x[:, ::stride[0], ::stride[1]]
