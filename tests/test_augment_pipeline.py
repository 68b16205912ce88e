"""Augmentation: distributions, and independence of batch and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy import stats

from jaxcifar import augment
from jaxcifar.augment import mixing, policies
from jaxcifar.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
DRAWS = 20_000
# Draws are seeded: the tests give one answer. Over seeds, a right distribution fails this often.
LEVEL = 1e-4


def build(spec, num_classes=10, dtype=jnp.float32):
    return augment.build(spec, MEAN, STD, num_classes, dtype)


def draw(spec, count=DRAWS, shape=(32, 32, 3)):
    """Return the parameters of the only random operation of `spec`, drawn `count` times."""
    function = build(spec)
    keys = jax.random.split(jax.random.key(11), count)
    return jax.device_get(jax.jit(lambda k: function.sample(k, shape)[0])(keys))


def expect_shares(counts, shares):
    """Assert by a chi-square test that `counts` have these expected shares."""
    counts, shares = np.ravel(counts), np.ravel(shares) / np.sum(shares)
    assert stats.chisquare(counts, shares * counts.sum()).pvalue > LEVEL, (counts, shares)


def expect_rate(hits, rate):
    """Assert by a binomial test that booleans `hits` are true at this rate."""
    hits = np.ravel(hits)
    assert stats.binomtest(int(hits.sum()), hits.size, rate).pvalue > LEVEL, (hits.mean(), rate)


def test_untyped_and_rbg_keys_are_refused(sample_images):
    for keys in (jax.random.split(jax.random.PRNGKey(0), 2),
                 jax.random.split(jax.random.key(0, impl="rbg"), 2)):
        with pytest.raises(UserError, match="expected typed threefry keys"):
            build("flip")(sample_images[:2], jnp.zeros(2, jnp.int32), keys, jax.random.key(0))


def test_crop_flip_and_rotation_distributions():
    places = draw("crop(2)")
    expect_shares(np.histogram2d(places[:, 0], places[:, 1], bins=5, range=[[-0.5, 4.5]] * 2)[0],
                  np.ones(25))
    expect_rate(draw("flip"), 0.5)
    expect_rate(draw("flip(0.1)"), 0.1)
    assert stats.kstest(draw("rotation(5)"), stats.uniform(-5, 10).cdf).pvalue > LEVEL
    assert stats.kstest(draw("rotation((10, 30))"), stats.uniform(10, 20).cdf).pvalue > LEVEL


def sub_policies(numbers):
    """Return (name, magnitude) of the drawn rows, a list of pairs."""
    operations = policies.autoaugment((32, 32)).operations
    return [tuple(operations[n] for n in pair) for pair in numbers]


def test_autoaugment_draws_sub_policies_probabilities_and_signs_as_torchvision():
    """Compare the joint frequencies of both slots with those that the table implies."""
    expected = {}
    for pair in policies.CIFAR10_POLICY:
        slots = []
        for name, probability, level in pair:
            magnitude = float(policies.magnitudes(name, 10, (32, 32))[level or 0])
            signs = (1, -1) if name in policies.SIGNED and magnitude else (1,)
            applied = probability if (name, magnitude) != ("Color", 0.0) else 0.0
            slots.append([(("Identity", 0.0), 1 - applied)] + [
                ((name, s * magnitude), applied / len(signs)) for s in signs])
            if applied != probability:  # magnitude 0 draws a row of its own, with no effect
                slots[-1] = [(("Identity", 0.0), 1 - probability), ((name, 0.0), probability)]
        for first, p in slots[0]:
            for second, q in slots[1]:
                key = (first, second)
                expected[key] = expected.get(key, 0) + p * q / 25
    drawn = sub_policies(draw("autoaugment"))
    counts = {}
    for pair in drawn:
        counts[pair] = counts.get(pair, 0) + 1
    assert set(counts) <= {key for key, share in expected.items() if share > 0}
    likely = [key for key, share in expected.items() if share * DRAWS >= 5]
    rest = DRAWS - sum(counts.get(key, 0) for key in likely)
    expect_shares([counts.get(key, 0) for key in likely] + [rest + 1e-9],
                  [expected[key] for key in likely]
                  + [1 - sum(expected[key] for key in likely) + 1e-9])
    assert len(likely) > 100


# The operations of torchvision's AutoAugmentPolicy.CIFAR10, in its order.
CIFAR10_NAMES = """
    Invert Contrast  Rotate TranslateX  Sharpness Sharpness  ShearY TranslateY  AutoContrast Equalize
    ShearY Posterize  Color Brightness  Sharpness Brightness  Equalize Equalize  Contrast Sharpness
    Color TranslateX  Equalize AutoContrast  TranslateY Sharpness  Brightness Color  Solarize Invert
    Equalize AutoContrast  Equalize Equalize  Color Equalize  AutoContrast Solarize  Brightness Color
    Solarize AutoContrast  TranslateY TranslateY  AutoContrast Solarize  Equalize Invert
    TranslateY AutoContrast""".split()
# Those of its RandAugment and TrivialAugmentWide.
FOURTEEN = """Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness
    Posterize Solarize AutoContrast Equalize""".split()


def test_the_policy_table_is_complete():
    assert len(policies.CIFAR10_POLICY) == 25
    assert [name for pair in policies.CIFAR10_POLICY for name, *_ in pair] == CIFAR10_NAMES
    flat = [operation for pair in policies.CIFAR10_POLICY for operation in pair]
    assert len(flat) == 50
    # Sums over the published table: of probabilities, of magnitude bins, and one that knows places.
    assert round(sum(10 * p for _, p, _ in flat)) == 265
    assert sum(level or 0 for _, _, level in flat) == 187
    placed = [i * round(10 * p) * (1 + (level or 0)) for i, (_, p, level) in enumerate(flat)]
    assert sum(placed) == 30539
    assert all((level is None) == (name in ("Invert", *policies.PLAIN)) for name, _, level in flat)


def test_randaugment_and_trivialaugment_draw_uniformly():
    assert sorted(["Identity", *policies.SIGNED, *policies.UNSIGNED, *policies.PLAIN]) == sorted(FOURTEEN)
    for spec, table, slots in [
            ("randaugment(2,9)", policies.randaugment(9, 31, (32, 32)), 2),
            ("trivialaugment", policies.trivialaugment(31, (32, 32)), 1)]:
        numbers = draw(spec)
        assert numbers.shape == (DRAWS, slots)
        operations = [table.operations[n] for n in numbers.reshape(-1)]
        expect_shares([sum(o.name == name for o in operations) for name in FOURTEEN], np.ones(14))
        signed = [o.magnitude for o in operations if o.name in policies.SIGNED and o.magnitude]
        expect_rate(np.array(signed) < 0, 0.5)
        if slots == 2:  # one magnitude, and slots independent of each other
            assert {o.magnitude for o in operations if o.name == "Color"} == {
                s * float(policies.magnitudes("Color", 31, (32, 32))[9]) for s in (-1, 1)}
            index = np.array([FOURTEEN.index(o.name) for o in operations]).reshape(-1, 2)
            expect_shares(np.histogram2d(*index.T, bins=14, range=[[-0.5, 13.5]] * 2)[0],
                          np.ones(196))
        else:
            shears = [abs(o.magnitude) for o in operations if o.name == "ShearX"]
            expect_shares(np.histogram(shears, bins=31, range=(-0.0165, 1.0065))[0], np.ones(31))


def test_color_jitter_draws_factors_and_orders():
    drawn = draw("color_jitter(0.4, (0.5, 2), 1.5, 0.1)")
    for factor, (low, high) in zip(drawn.factor.T, [(0.6, 1.4), (0.5, 2), (0, 2.5)], strict=True):
        assert stats.kstest(factor, stats.uniform(low, high - low).cdf).pvalue > LEVEL
    assert drawn.shift.min() == -25 and drawn.shift.max() == 25
    expect_shares(np.unique(np.abs(drawn.shift) // 5, return_counts=True)[1][1:5], np.ones(4))
    orders = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(orders[0]) == 24
    expect_shares(orders[1], np.ones(24))
    assert set(np.unique(draw("color_jitter(0.4, saturation=0.2)", 64).order)) == {0, 1}


def test_random_erasing_and_cutout_distributions():
    drawn = draw("random_erasing(p=0.7)")
    erased = drawn.height > 0
    expect_rate(erased, 0.7)  # all ten attempts fail with a chance under 1e-6
    rng = np.random.default_rng(5)  # torchvision's loop, vectorised: the first attempt that fits
    area = 1024 * rng.uniform(0.02, 0.33, 10 * DRAWS)
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3), 10 * DRAWS))
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (height < 32) & (width < 32)
    for got, expected in [(drawn.height, height), (drawn.width, width),
                          (drawn.height * drawn.width, height * width)]:
        edges = np.unique(np.quantile(expected[fits], np.linspace(0, 1, 15)))
        expect_shares(np.histogram(got[erased], edges)[0], np.histogram(expected[fits], edges)[0])
    for start, side in [(drawn.top, drawn.height), (drawn.left, drawn.width)]:
        place = (start + rng.uniform(size=start.size)) / (32 - side + 1)
        assert stats.kstest(place[erased], stats.uniform.cdf).pvalue > LEVEL
    square = draw("cutout(16)")
    assert set(square.height) == set(square.width) == {16}
    for start in (square.top, square.left):
        expect_shares(np.bincount(start + 8, minlength=32), np.ones(32))


def test_draws_are_independent_of_each_other():
    """No two numbers that an image draws, in one operation or two, are correlated."""
    function = build("flip|flip|crop(2)|rotation(5)|color_jitter(0.4,0.4,0.4,0.1)|cutout(8)|"
                     "autoaugment|random_erasing(1.0)")
    keys = jax.random.split(jax.random.key(13), DRAWS)
    flip, again, place, angle, jitter, square, numbers, erased, _ = jax.device_get(
        jax.jit(lambda k: function.sample(k, (32, 32, 3)))(keys))
    columns = np.column_stack([
        flip, again, place, angle, jitter.factor, jitter.shift, jitter.order[:, :3], square.top,
        square.left, numbers, (erased.top + 0.5) / (33 - erased.height),
        (erased.left + 0.5) / (33 - erased.width), erased.height * erased.width,
        erased.height / erased.width])
    correlation = np.corrcoef(columns.astype(float), rowvar=False)
    # Known exceptions: places in a permutation exclude each other; a sub-policy names both slots.
    order, slots = range(9, 12), range(14, 16)
    for group in (order, slots):
        correlation[np.ix_(group, group)] = 0
    np.fill_diagonal(correlation, 0)
    correlation[-2:, -2:] = 0  # a large rectangle fits only if its sides are alike
    assert np.abs(correlation).max() < 5 / np.sqrt(DRAWS), np.round(correlation, 3)


def test_cutout_before_and_after_normalize(sample_images):
    images, labels = sample_images[:32], jnp.zeros(32, jnp.int32)
    keys = jax.random.split(jax.random.key(3), 32)
    after, _ = build("normalize|cutout(8)")(images, labels, keys, keys[0])
    before, _ = build("cutout(8)")(images, labels, keys, keys[0])
    plain = augment.normalize(images, MEAN, STD)
    black = -np.array(MEAN, np.float32) / np.array(STD, np.float32)
    for got, fill in [(after, 0.0), (before, black)]:
        changed = ~np.isclose(got, plain, atol=1e-6).all(-1)
        assert changed.sum() > 32 * 16 * 0.5 and (changed.sum((1, 2)) <= 64).all()
        np.testing.assert_allclose(np.asarray(got)[changed], np.broadcast_to(
            fill, (changed.sum(), 3)), atol=1e-6)


def test_erasing_with_noise_after_normalize(sample_images):
    images, labels = np.zeros_like(sample_images), jnp.zeros(256, jnp.int32)
    keys = jax.random.split(jax.random.key(3), 256)
    function = build("normalize|random_erasing(1.0, value='random')")
    got = np.asarray(jax.jit(lambda k: function(images, labels, k, k[0])[0])(keys))
    noise = got[got != np.asarray(augment.normalize(images, MEAN, STD))]
    assert stats.kstest(noise, stats.norm.cdf).pvalue > LEVEL


def test_an_example_depends_on_its_key_alone(sample_images):
    """The same image and key give the same result anywhere in a batch of any size, twice."""
    function = build("rotation(5)|flip|crop(2)|autoaugment|random_erasing")
    keys = jax.random.split(jax.random.key(0), 24)
    labels = jnp.arange(24, dtype=jnp.int32) % 10
    run = jax.jit(lambda x, y, k: function(x, y, k, jax.random.key(1)))
    images = sample_images[:24]
    whole, targets = run(images, labels, keys)
    np.testing.assert_array_equal(targets, labels)
    assert whole.dtype == jnp.float32 and targets.dtype == jnp.int32
    np.testing.assert_array_equal(whole, run(images, labels, keys)[0])
    some = np.array([17, 3, 3, 8, 20])
    np.testing.assert_array_equal(run(images[some], labels[some], keys[some])[0], whole[some])
    assert (np.asarray(whole[0]) != np.asarray(run(images, labels, keys[::-1])[0][0])).any()


def test_every_operation_runs_under_jit_and_scan_in_bfloat16(sample_images):
    spec = ("rotation(15)|flip|crop(2,'edge')|trivialaugment|normalize|crop(4,'symmetric')|flip|"
            "cutout(4)|mixup(1.0)|cutmix(1.0)")
    function = build(spec, dtype=jnp.bfloat16)
    assert hash(function) == hash(build(spec, dtype=jnp.bfloat16)) and function == build(
        spec, dtype="bfloat16")

    @jax.jit
    def epoch(images, labels, keys):
        def step(carry, key):
            return carry, function(images, labels, jax.random.split(key, len(images)), key)
        return jax.lax.scan(step, 0, keys)[1]

    images, targets = epoch(sample_images[:8], jnp.zeros(8, jnp.int32),
                            jax.random.split(jax.random.key(0), 2))
    assert images.shape == (2, 8, 32, 32, 3) and images.dtype == jnp.bfloat16
    assert targets.shape == (2, 8, 10) and targets.dtype == jnp.float32
    assert np.isfinite(np.asarray(images, np.float32)).all()


def test_mixup_mixes_images_and_labels_with_the_previous_example(sample_images):
    images, labels = sample_images[:6], jnp.array([3, 1, 4, 1, 5, 9], jnp.int32)
    keys, batch_key = jax.random.split(jax.random.key(0), 6), jax.random.key(9)
    mixed, targets = build("mixup(1.0)")(images, labels, keys, batch_key)
    own = float(targets[0, 3])  # labels 3 and 9 differ: the weight can be read off
    assert 0.1 < own < 0.9
    one_hot = np.eye(10)[labels]
    plain = np.asarray(augment.normalize(images, MEAN, STD))
    np.testing.assert_allclose(
        targets, own * one_hot + (1 - own) * np.roll(one_hot, 1, 0), atol=1e-6)
    np.testing.assert_allclose(mixed, own * plain + (1 - own) * np.roll(plain, 1, 0), atol=1e-5)


def test_cutmix_pastes_a_box_and_mixes_labels_by_its_area(sample_images):
    images, labels = sample_images[:5], jnp.arange(5, dtype=jnp.int32)
    keys = jax.random.split(jax.random.key(0), 5)
    run = jax.jit(lambda key: build("cutmix(1.0)")(images, labels, keys, key))
    plain = np.asarray(augment.normalize(images, MEAN, STD))
    areas = []
    for seed in range(8):
        mixed, targets = jax.device_get(run(jax.random.key(seed)))
        box = mixing.Cutmix(1.0).sample(jax.random.fold_in(jax.random.key(seed), 1), (32, 32, 3))
        top, bottom, left, right = map(int, box)
        expected = plain.copy()
        expected[:, top:bottom, left:right] = np.roll(plain, 1, 0)[:, top:bottom, left:right]
        np.testing.assert_allclose(mixed, expected, atol=1e-6)
        areas.append((bottom - top) * (right - left) / 1024)
        np.testing.assert_allclose(targets[2, :3], [0, areas[-1], 1 - areas[-1]], atol=1e-6)
    assert len(set(areas)) > 4


def test_mixing_distributions():
    keys = jax.random.split(jax.random.key(4), 4000)
    for alpha in (0.2, 1.0, 2.0, 30.0):
        sample = functools.partial(mixing.Mixup(alpha).sample, shape=None)
        weights = jax.jit(jax.vmap(sample))(keys)
        assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > LEVEL
    top, bottom, left, right = jax.device_get(
        jax.jit(jax.vmap(lambda k: mixing.Cutmix(1.0).sample(k, (32, 32, 3))))(keys))
    rng = np.random.default_rng(6)  # torchvision's CutMix.make_params
    half = (0.5 * np.sqrt(1 - rng.uniform(size=40_000)) * 32).astype(int)
    centre = rng.integers(0, 32, 40_000)
    length = np.minimum(centre + half, 32) - np.maximum(centre - half, 0)
    expected = np.bincount(length, minlength=33)
    for got in (bottom - top, right - left):
        counts = np.bincount(got, minlength=33)
        assert counts[32] == expected[32] == 0
        table = np.stack([counts, expected])[:, expected > 0]
        assert stats.chi2_contingency(table).pvalue > LEVEL


@pytest.mark.parametrize("real, devices, wrapper", [
    (16, 2, "pmap"), (11, 4, "pmap"), (4, 4, "pmap"),
    (16, 4, "shard_map"), (11, 2, "shard_map"), (1, 4, "shard_map")])
def test_the_number_of_devices_never_changes_the_result(real, devices, wrapper, sample_images):
    """Mixing pairs run over the global batch; padding at its end is no real example's partner."""
    function, n = build("flip|crop(2)|mixup(1.0)|cutmix(1.0)"), 16
    order = jnp.arange(n) % real
    keys = jax.random.split(jax.random.key(1), n)[order]
    batch = (sample_images[order], (order % 10).astype(jnp.int32), keys)
    mask = (jnp.arange(n) < real).astype(jnp.float32)
    expected = jax.jit(lambda *b: function(*b, jax.random.key(2)))(*(x[:real] for x in batch))

    def step(images, labels, keys, mask, axis_name=None):
        return function(images, labels, keys, jax.random.key(2), axis_name=axis_name,
                        mask=mask if real < n else None)

    results = [jax.jit(step)(*batch, mask)]
    on_axis = functools.partial(step, axis_name="data")
    if wrapper == "pmap":
        split = [x.reshape(devices, n // devices, *x.shape[1:]) for x in (*batch, mask)]
        got = jax.pmap(on_axis, axis_name="data", devices=jax.devices()[:devices])(*split)
        results.append([np.asarray(x).reshape(n, *x.shape[2:]) for x in got])
    else:
        mesh, spread = Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data")
        results.append(jax.jit(jax.shard_map(
            on_axis, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False))(*batch, mask))
    for images, targets in results:
        np.testing.assert_allclose(np.asarray(images)[:real], expected[0], atol=1e-6)
        np.testing.assert_allclose(np.asarray(targets)[:real], expected[1], atol=1e-6)
