"""How a convolution is computed; the same values and gradients whichever form is chosen."""

import jax
from jax import lax

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def conv2d(x, kernel, *, stride=(1, 1), padding=((0, 0), (0, 0)), groups=1):
    """Convolve images with a kernel (cross-correlation, as torch.nn.functional.conv2d).

    x: [N, H, W, C]; kernel: [kh, kw, C / groups, features], of x's dtype; stride: (rows, columns);
    padding: ((top, bottom), (left, right)) zeros. Returns [N, H', W', features] of x's dtype.
    """
    return lax.conv_general_dilated(
        x, kernel, stride, padding,
        dimension_numbers=DIMENSION_NUMBERS, feature_group_count=groups)
