"""Parameter trees by path: which parameters are trained, and with what share of the learning rate.

A path is "a/b/c", as in `config.optimizer.decay_exclude`: "layer4.1/conv2/kernel", "fc/bias".
"""

import re

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcifar.errors import UserError


def path_name(path):
    """Return "a/b/c" of a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def pattern(text, field):
    """Compile a regular expression over paths; UserError that names `field` where it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"{field} {text!r} is no regular expression: {error}") from None


def split(params, trainable):
    """Return (the parameters that are trained, the frozen ones): nested dicts without each other's.

    trainable: regular expression, searched in every path; "" trains all of them.
    """
    if not trainable:
        return params, {}
    search = pattern(trainable, "config.trainable").search
    trained, frozen = {}, {}
    for path, leaf in flatten_dict(params).items():
        (trained if search("/".join(path)) else frozen)[path] = leaf
    return unflatten_dict(trained), unflatten_dict(frozen)


def merge(one, other):
    """Return the nested dict that `split` took apart."""
    return unflatten_dict(flatten_dict(one) | flatten_dict(other)) if other else one


def check_trainable(params, trainable):
    """Raise UserError unless `trainable` finds a parameter; params: arrays, or their shapes."""
    if not jax.tree.leaves(split(params, trainable)[0]):
        raise UserError(f"config.trainable = {trainable!r} matches no parameter of this model, whose "
                        f"paths begin with {', '.join(params)}")


def multipliers(text):
    """Return ((regular expression, factor), ...) of "layer1=0.1; layer2=0.3"; "" is none.

    Raises UserError where the text is something else, or a factor is negative.
    """
    pairs = []
    for term in filter(None, map(str.strip, text.split(";"))):
        where, _, factor = term.rpartition("=")
        try:
            pairs.append((pattern(where, "config.lr_multipliers"), float(factor)))
        except ValueError:
            where = ""
        if not where or not 0 <= pairs[-1][1] < float("inf"):
            raise UserError(f"config.lr_multipliers: {term!r} is not PATTERN=FACTOR; write for "
                            "instance \"layer1=0.1; layer2=0.3\"")
    return tuple(pairs)


def factors(params, pairs):
    """Return a tree of floats: of each parameter the factor of the first pattern that it matches, or 1.

    Raises UserError where a pattern matches none of the parameters.
    """
    found = set()

    def factor(path, _):
        name = path_name(path)
        for search, value in pairs:
            if search.search(name):
                found.add(search)
                return value
        return 1.0

    tree = jax.tree_util.tree_map_with_path(factor, params)
    for search, _ in pairs:
        if search not in found:
            raise UserError(f"config.lr_multipliers: {search.pattern!r} matches no trained parameter "
                            "that an earlier pattern left over")
    return tree
