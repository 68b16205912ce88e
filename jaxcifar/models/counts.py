"""What a model costs: its parameters, and the multiply-adds of its products; nothing is computed."""

import math

import jax
import jax.numpy as jnp

from jaxcifar import models
from jaxcifar.models.conv import plain_convolutions


def count(model, image_shape=(32, 32, 3)):
    """Return {"params", "multiply_adds"}, ints: of a linen module, and of its logits of one image."""
    variables = models.shapes(model, image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return {"params": models.count_params(variables["params"]),
            "multiply_adds": multiply_adds(
                lambda v, x: model.apply(v, x, train=False), variables, image)}


def multiply_adds(function, *args):
    """Return the multiply-adds of a function's convolutions and matrix products, an int.

    function, args: as for jax.make_jaxpr; nothing is computed. Elementwise work is not counted.
    """
    with plain_convolutions():
        return sum(map(_count, equations(jax.make_jaxpr(function)(*args).jaxpr)))


def equations(jaxpr):
    """Yield the equations of a jaxpr in their order, after each those of the functions in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def _count(equation):
    name = equation.primitive.name
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape  # rows, columns, channels per group, features
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[:-1])
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    return 0


def _is_jaxpr(value):
    return hasattr(value, "eqns")
