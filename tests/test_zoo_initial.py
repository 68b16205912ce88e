"""A new network's values are drawn as PyTorch draws those of its twin, in every family."""

import jax
import numpy as np
import pytest
import test_zoo_best
import test_zoo_classic
import test_zoo_mobile
import test_zoo_reports
import torch
from twins_best import ShakeShake

from jaxcifar import models, torch_weights

# Their originals draw by rules of their own, and have tests of their own (in the files above).
ELSEWHERE = {"wide_resnet", "vit", *test_zoo_reports.IMAGENET}
CASES = {
    **{key: case for key, case in test_zoo_classic.SMALL.items() if key not in ELSEWHERE},
    **{name: (name, test_zoo_mobile.ZOO[name][1] | options, lambda name=name, options=options:
              test_zoo_mobile.ZOO[name][0](**test_zoo_mobile.ZOO[name][1] | options))
       for name, options in test_zoo_mobile.SMALL.items()},
    **{name: (name, options, lambda name=name, options=options:
              test_zoo_reports.TWINS[name](num_classes=10, **options))
       for name, options in test_zoo_reports.SMALL.items() if name not in ELSEWHERE}}


def initial(name, options):
    """Return the state_dict of a new network's parameters, numpy arrays."""
    model = models.create(name, **options)
    images = np.zeros((1, 32, 32, 3), np.float32)
    init = jax.jit(lambda key: model.init(key, images, train=False)).lower(jax.random.key(0))
    variables = init.compile(compiler_options=test_zoo_classic.FAST_COMPILE)(jax.random.key(0))
    return torch_weights.to_torch(name, variables, **options)


@pytest.mark.parametrize("case", CASES)
def test_initial_values_are_spread_as_torchs(case):
    name, options, make_twin = CASES[case]
    ours = initial(name, options)
    torch.manual_seed(0)
    twins = [make_twin().state_dict() for _ in range(4)]  # small tensors show their spread together
    drawn = 0
    for key, value in ours.items():
        theirs = np.concatenate([np.ravel(twin[key].numpy()) for twin in twins])
        if np.ptp(theirs) == 0:
            assert (value == theirs[0]).all(), f"{key} is a constant in torch"
            continue
        drawn += 1
        # Uniform on both sides: none is beyond the bound, and many come near to it.
        bound = np.abs(theirs).max()
        assert np.abs(value).max() <= bound * (1 + 20 / theirs.size), key
        if value.size >= 100:  # by more than luck
            assert np.abs(value).max() > 0.8 * bound, key
            assert np.std(value) == pytest.approx(np.std(theirs), rel=4 / value.size**0.5), key
            assert abs(value.mean()) < 6 * np.std(theirs) / value.size**0.5, key
    assert drawn >= 4


def test_shake_shake_draws_as_its_published_code():
    # kaiming_normal_(mode="fan_out") of convolutions, 1 and 0 of BatchNorms, biases 0
    name, options = "shake_shake26_2x32d", test_zoo_best.SMALL_SHAKE
    assert set(ours := initial(name, options)) == set(ShakeShake(**options).state_dict())
    for key, value in ours.items():
        if value.ndim == 4:
            expected = np.sqrt(2 / (value.shape[0] * value[0, 0].size))
            assert np.std(value) == pytest.approx(expected, rel=4 / value.size**0.5), key
            assert value.size < 500 or np.abs(value).max() > 2 * expected, "normal, not uniform"
        elif key.endswith("bias"):
            assert not value.any(), key
