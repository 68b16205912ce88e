"""Every schedule at every step against the torch scheduler that it names; the plateau likewise."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcifar import plateau, schedules
from jaxcifar.errors import UserError

STEPS = 7  # per epoch
BASE = 0.037  # not a round number, in binary or decimal


def rates(name, total_epochs, base_lr=BASE, steps_per_epoch=STEPS, **options):
    """The learning rate of every step, float32 [total_epochs * steps], of traced ints."""
    schedule = schedules.create(name, **options)

    def rate(step):
        return schedule(
            base_lr, step, steps_per_epoch=steps_per_epoch, total_epochs=total_epochs
        )

    out = jax.jit(jax.vmap(rate))(jnp.arange(total_epochs * steps_per_epoch))
    assert out.dtype == jnp.float32
    return np.asarray(out, np.float64)


def torch_rates(make, count):
    """The rates that the torch scheduler made by make(torch, optimizer) gives to `count` steps."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    result = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own deprecation notice
        for _ in range(count):
            result.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return np.array(result)


PER_EPOCH = [
    ("cosine", {"t_max": 10}, lambda s, o: s.CosineAnnealingLR(o, 10)),
    ("cosine", {"t_max": 200}, lambda s, o: s.CosineAnnealingLR(o, 200)),
    ("cosine", {"t_max": 1}, lambda s, o: s.CosineAnnealingLR(o, 1)),
    ("cosine", {"t_max": 7, "eta_min": 1e-3}, lambda s, o: s.CosineAnnealingLR(o, 7, 1e-3)),
    ("step", {"step_size": 6}, lambda s, o: s.StepLR(o, 6)),
    ("step", {"step_size": 1, "gamma": 0.7}, lambda s, o: s.StepLR(o, 1, 0.7)),
    (
        "multistep",
        {"milestones": [20, 5, 11, 11], "gamma": 0.3},
        lambda s, o: s.MultiStepLR(o, [5, 11, 11, 20], 0.3),
    ),
    ("exponential", {"gamma": 0.93}, lambda s, o: s.ExponentialLR(o, 0.93)),
    ("polynomial", {"total_iters": 20}, lambda s, o: s.PolynomialLR(o, 20)),
    ("polynomial", {"total_iters": 13, "power": 2.5}, lambda s, o: s.PolynomialLR(o, 13, 2.5)),
]


@pytest.mark.parametrize("name, options, make", PER_EPOCH)
def test_per_epoch_schedules_equal_torch(name, options, make):
    epochs = 41  # two periods and more of all but the long cosine
    ours = rates(name, epochs, **options).reshape(epochs, STEPS)
    assert (ours == ours[:, :1]).all(), "the rate must not change within an epoch"
    np.testing.assert_allclose(ours[:, 0], torch_rates(make, epochs), rtol=3e-7, atol=1e-17)


def test_cosine_keeps_its_digits_over_two_periods_of_200():
    epochs = 801
    ours = rates("cosine", epochs, steps_per_epoch=1, t_max=200)
    theirs = torch_rates(lambda s, o: s.CosineAnnealingLR(o, 200), epochs)
    np.testing.assert_allclose(ours, theirs, rtol=3e-7, atol=1e-15)


TOTAL = 6 * STEPS
PER_STEP = [
    ("constant", {}, lambda s, o: s.ConstantLR(o, 1.0)),
    ("cosine_step", {}, lambda s, o: s.CosineAnnealingLR(o, TOTAL)),
    ("cosine_step", {"eta_min": 2e-4}, lambda s, o: s.CosineAnnealingLR(o, TOTAL, 2e-4)),
    ("linear", {}, lambda s, o: s.LinearLR(o, 1.0, 0.0, TOTAL)),
    ("linear", {"end_factor": 0.02}, lambda s, o: s.LinearLR(o, 1.0, 0.02, TOTAL)),
    (
        "triangular",
        {"peak": 0.23, "start_factor": 0.2, "end_factor": 0.07},
        lambda s, o: s.LambdaLR(
            o, lambda t: np.interp(t, [0, int(0.23 * TOTAL), TOTAL], [0.2, 1, 0.07])
        ),
    ),
    ("one_cycle", {}, lambda s, o: s.OneCycleLR(o, BASE, TOTAL)),
    (
        "one_cycle",
        {"pct_start": 0.21, "anneal_strategy": "linear", "div_factor": 7.0},
        lambda s, o: s.OneCycleLR(
            o, BASE, TOTAL, pct_start=0.21, anneal_strategy="linear", div_factor=7.0
        ),
    ),
    (
        "one_cycle",
        {"three_phase": True, "final_div_factor": 50.0},
        lambda s, o: s.OneCycleLR(o, BASE, TOTAL, three_phase=True, final_div_factor=50.0),
    ),
    ("one_cycle", {"pct_start": 0.0}, lambda s, o: s.OneCycleLR(o, BASE, TOTAL, pct_start=0.0)),
    ("one_cycle", {"pct_start": 0.98}, lambda s, o: s.OneCycleLR(o, BASE, TOTAL, pct_start=0.98)),
]


@pytest.mark.parametrize("name, options, make", PER_STEP)
def test_per_step_schedules_equal_torch(name, options, make):
    ours = rates(name, 6, **options)
    np.testing.assert_allclose(ours, torch_rates(make, TOTAL), rtol=6e-7, atol=0)


def test_long_per_step_schedules_keep_small_rates():
    """70,000 steps: the last rates are a millionth of the first and still equal torch's."""
    total = 704 * 100
    ours = rates("one_cycle", 100, steps_per_epoch=704)
    theirs = torch_rates(lambda s, o: s.OneCycleLR(o, BASE, total), total)
    np.testing.assert_allclose(ours, theirs, rtol=6e-7)
    ours = rates("cosine_step", 100, steps_per_epoch=704)
    exact = BASE * np.cos(np.pi * np.arange(total) / (2 * total)) ** 2
    np.testing.assert_allclose(ours, exact, rtol=6e-7)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_momentum_equals_torch(strategy, three_phase):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, TOTAL, anneal_strategy=strategy, three_phase=three_phase
    )
    theirs = []
    for _ in range(TOTAL):
        theirs.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    schedule = schedules.create(
        "one_cycle", anneal_strategy=strategy, three_phase=three_phase, cycle_momentum=True
    )
    steps = jnp.arange(TOTAL)
    ours = schedule.momentum(steps, steps_per_epoch=STEPS, total_epochs=6)
    np.testing.assert_allclose(ours, theirs, rtol=2e-7)
    fixed = schedules.create("one_cycle")
    assert fixed.momentum(steps, steps_per_epoch=STEPS, total_epochs=6) is None


def test_warmup_then_cosine_equals_torch_sequential():
    warm = 2 * STEPS

    def make(s, o):
        ramp = s.LinearLR(o, 1 / warm, 1.0, warm - 1)
        return s.SequentialLR(o, [ramp, s.CosineAnnealingLR(o, TOTAL - warm)], [warm])

    ours = rates("cosine_step", 6, warmup_epochs=2)
    np.testing.assert_allclose(ours, torch_rates(make, TOTAL), rtol=6e-7)


@pytest.mark.parametrize("name", ["cosine_step", "linear", "multistep"])
def test_a_run_shorter_than_its_warmup_is_the_beginning_of_the_ramp(name):
    options = {"milestones": [9]} if name == "multistep" else {}
    np.testing.assert_array_equal(rates(name, 2, warmup_epochs=5, **options),
                                  rates("constant", 6, warmup_epochs=5)[:2 * STEPS])


def test_warmup_multiplies_any_schedule():
    plain = rates("multistep", 6, milestones=[1, 3])
    warmed = rates("multistep", 6, milestones=[1, 3], warmup_epochs=1.5)
    ramp = np.minimum((np.arange(TOTAL) + 1) / round(1.5 * STEPS), 1)
    np.testing.assert_allclose(warmed, plain * ramp, rtol=3e-7)
    assert rates("linear", 6, warmup_epochs=2)[2 * STEPS] == np.float32(BASE)


def test_one_program_serves_many_base_rates():
    schedule = schedules.create("cosine", t_max=5, eta_min=1e-4)
    rate = jax.jit(lambda lr, step: schedule(lr, step, steps_per_epoch=STEPS, total_epochs=9))
    step = jnp.int32(3 * STEPS)
    both = jax.vmap(rate, in_axes=(0, None))(jnp.array([0.1, 0.5]), step)
    expected = [schedule(lr, 3 * STEPS, steps_per_epoch=STEPS, total_epochs=9) for lr in (0.1, 0.5)]
    np.testing.assert_allclose(both, expected, rtol=2e-7)  # eager and fused code: one rounding
    assert hash(schedule) == hash(schedules.create("cosine", t_max=5, eta_min=1e-4))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("plateua", {}, "did you mean 'plateau'"),
        ("zzz", {}, "there are"),
        ("plateau", {}, "Plateau.create"),
        ("cosine", {"tmax": 3}, "did you mean 't_max'"),
        ("cosine", {}, "needs the option 't_max'"),
        ("cosine", {"t_max": 0}, "t_max is 0"),
        ("step", {"step_size": 0}, "step_size is 0"),
        ("polynomial", {"total_iters": 0}, "total_iters is 0"),
        ("one_cycle", {"pct_start": 1.5}, "pct_start is 1.5"),
        ("one_cycle", {"anneal_strategy": "cosine"}, "choose 'cos' or 'linear'"),
        ("triangular", {"peak": 0}, "peak is 0"),
        ("triangular", {"peak": 0.5, "start_factor": -1.0}, "start_factor is -1.0: expected 0 or more"),
        ("step", {"step_size": 1, "gamma": -1.0}, "gamma is -1.0"),
        ("multistep", {"milestones": (1,), "gamma": -0.1}, "gamma is -0.1"),
        ("exponential", {"gamma": float("nan")}, "gamma is nan"),
        ("cosine", {"t_max": 5, "eta_min": -0.1}, "eta_min is -0.1"),
        ("cosine_step", {"eta_min": -0.1}, "eta_min is -0.1"),
        ("linear", {"end_factor": -1.0}, "end_factor is -1.0"),
        ("one_cycle", {"div_factor": 0.0}, "divide the rate: expected numbers above 0"),
        ("one_cycle", {"final_div_factor": -1.0}, "final_div_factor is -1.0"),
    ],
)
def test_bad_schedules_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        schedules.create(name, **options)


def test_option_names():
    assert schedules.option_names("step") == ("warmup_epochs", "step_size", "gamma")
    assert schedules.option_names("plateau")[:3] == ("mode", "factor", "patience")
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        schedules.option_names("cosin")


def random_metrics(rng):
    """A sequence of metrics: improving, noisy, flat, rounded or wild, with NaN and infinities."""
    length = rng.integers(20, 80)
    kind = rng.integers(5)
    if kind == 0:
        values = 3 * 0.97 ** np.arange(length) + rng.normal(0, 0.02, length)
    elif kind == 1:
        values = rng.normal(0, 1, length)  # negative values turn rel thresholds around
    elif kind == 2:
        values = np.full(length, rng.choice([0.0, 1.0, 71.25, -3.0]))
    elif kind == 3:
        values = np.round(rng.uniform(0, 1, length), 1)
    else:  # within an ulp or two of the threshold: what float32 could not decide
        best, values = 1.0, []
        for _ in range(length):
            best = best * rng.choice([1 - 1e-4, 1 + 1e-4, 1.0])
            values.append(best * (1 + rng.integers(-2, 3) * 2**-53))
        values = np.array(values)
    if rng.random() < 0.5:
        holes = rng.random(length) < 0.15
        values[holes] = rng.choice([np.nan, np.inf, -np.inf], holes.sum())
    return [float(v) for v in values]


def random_options(rng):
    return {
        "mode": str(rng.choice(["min", "max"])),
        "factor": float(rng.choice([0.1, 0.5, 0.3, 0.99, 0.0])),
        "patience": int(rng.integers(0, 5)),
        "threshold": float(rng.choice([0.0, 1e-4, 0.05, 1.0])),
        "threshold_mode": str(rng.choice(["rel", "abs"])),
        "cooldown": int(rng.integers(0, 4)),
        "min_lr": float(rng.choice([0.0, 1e-3, 5e-2, 0.2])),  # 0.2 lies above the first rate
        "eps": float(rng.choice([1e-8, 0.0, 1e-3, 0.05])),  # 0.05 = 0.1 - 0.1 * 0.5 exactly
    }


def test_plateau_equals_torch_on_random_sequences():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    reductions = 0
    for case in range(600):
        options = random_options(rng) if case else {}  # the first: torch's defaults
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
        ours = plateau.Plateau.create(0.1, **options)
        for metric in random_metrics(rng):
            before = ours.learning_rate
            theirs.step(metric)
            ours = ours.update(metric)
            rate = optimizer.param_groups[0]["lr"]
            assert ours.learning_rate_bits.view(np.float64)[0] == rate, (case, options)
            assert ours.learning_rate == np.float32(rate)
            assert ours.best == theirs.best
            assert ours.num_bad_epochs == theirs.num_bad_epochs
            assert ours.cooldown_counter == theirs.cooldown_counter
            reductions += ours.learning_rate < before
    assert reductions > 500  # the sequences do exercise the rule


def test_plateau_survives_compiled_steps_and_keeps_its_types():
    """Through jit after every epoch, as in TrainState: nothing of the doubles is lost."""
    through = jax.jit(lambda state: state)
    alone = plateau.Plateau.create(0.1, patience=1, factor=0.7, threshold=0.0)
    carried = through(alone)
    metrics = [1.0, 1.0 - 2**-53, 1.0, math.nan, 1.0 - 2**-52, 0.9, 0.9, 0.9, math.inf, 0.95, 0.95]
    for metric in metrics:
        alone, carried = alone.update(metric), through(carried.update(metric))
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(carried), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a, b)
    assert alone.best == 0.9 and alone.learning_rate < 0.05
    assert jax.tree.structure(alone) == jax.tree.structure(carried)


def test_plateau_updates_several_runs_at_once():
    rng = np.random.default_rng(1)
    metrics = rng.normal(1, 0.3, (30, 3))
    rates_ = np.array([0.1, 0.01, 0.5])
    together = plateau.Plateau.create(rates_, patience=1, cooldown=1, factor=0.5)
    apart = [plateau.Plateau.create(r, patience=1, cooldown=1, factor=0.5) for r in rates_]
    for row in metrics:
        together = together.update(row)
        apart = [state.update(m) for state, m in zip(apart, row)]
    np.testing.assert_array_equal(together.learning_rate, [s.learning_rate for s in apart])
    assert (together.learning_rate < rates_).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patince": 3}, "did you mean 'patience'"),
        ({"mode": "lower"}, "expected 'min' or 'max'"),
        ({"threshold_mode": "relative"}, "expected 'rel' or 'abs'"),
        ({"factor": 1.0}, "expected 0 or more and less than 1"),
        ({"factor": -0.5}, "expected 0 or more and less than 1"),
    ],
)
def test_bad_plateau_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        plateau.Plateau.create(0.1, **options)
