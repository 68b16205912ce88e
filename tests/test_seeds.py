"""Several seeds: together equals one by one, in ordinary run folders; mean, deviation; messages."""

import io
import json
import re

import jax
import numpy as np
import pytest
import tiny
from test_invariants import StopAfter

from jaxcifar import config as config_lib
from jaxcifar import parallel, programs, run_folder, seeds, together, train
from jaxcifar.checkpoint import Checkpoints
from jaxcifar.errors import UserError
from jaxcifar.report import seeds as report
from jaxcifar.state import create_state
from jaxcifar.task import create_task

# BatchNorm, dropout and augmentation; a plateau that moves; seeds that stop at their own
# epochs. Validation has 20 images, so that accuracies tie and fall often.
EVERYTHING = {
    "model": config_lib.model("cifar100_cnn", filters=(4, 4, 4, 8), fc_width=16, batch_norm=True,
                              fc_batch_norm=True, dropout=0.3),
    "augment": "crop(2)|flip", "epochs": 6, "drop_last": True,
    "schedule__name": "plateau", "schedule__patience": 0, "schedule__threshold": 0.1,
    "schedule__factor": 0.5, "selection": "best_val_accuracy", "early_stopping__window": 3,
    "test_every_epoch": True,
}
SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True)
def dataset(monkeypatch):
    """The tiny dataset for every run."""
    chosen = tiny.tiny_dataset()
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: chosen)


def run(workdir, *, way, chosen=SEEDS, stop=lambda: 0, **fields):
    """Run seeds of a tiny configuration; return (content of seeds.json, what was printed)."""
    stream = io.StringIO()
    result = seeds.run(tiny.tiny_config(**fields), list(chosen), workdir, way=way, stop=stop,
                       stream=stream)
    return result, stream.getvalue()


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """Three seeds, one after the other: (folder, seeds.json)."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        chosen = tiny.tiny_dataset()
        patch.setattr("jaxcifar.data.load", lambda name, data_dir: chosen)
        return folder, run(folder, way="no", **EVERYTHING)[0]


def assert_same_runs(ours, theirs, chosen=SEEDS):
    """Check that two folders hold the same runs to float32 rounding, and every file of a run."""
    for seed in chosen:
        a, b = ours / f"seed{seed}", theirs / f"seed{seed}"
        rows, others = tiny.rows(a), tiny.rows(b)
        assert [row["epoch"] for row in rows] == [row["epoch"] for row in others]
        for row, other in zip(rows, others, strict=True):
            row.pop("seeds_at_once", None), other.pop("seeds_at_once", None)
            assert row.keys() == other.keys()
            for key, value in row.items():
                np.testing.assert_allclose(value, other[key], rtol=5e-4, atol=5e-5, err_msg=key)
        result, expected = (json.loads((folder / "result.json").read_text()) for folder in (a, b))
        for key in ("selection", "epochs", "steps", "seed", "config_hash", "test_accuracy"):
            assert result[key] == expected[key], key
        assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-3, atol=5e-4),
                     last_state(a).params, last_state(b).params)


def last_state(folder):
    """Return the newest checkpoint's state."""
    task = create_task(tiny.tiny_config(**EVERYTHING), 100, 10)
    template = jax.tree.map(np.asarray, create_state(task, 0))
    return Checkpoints(folder, read_only=True).restore_latest(template)


def test_together_equals_one_by_one(one_by_one, tmp_path):
    folder, alone = one_by_one
    both, printed = run(tmp_path, way="yes", **EVERYTHING)
    assert_same_runs(tmp_path, folder)
    ends = alone["metrics"]["epochs"]["values"]
    assert len(set(ends)) > 1, f"the seeds stop at different epochs, not {ends}"
    rates = [row["learning_rate"] for row in tiny.rows(folder / "seed0")]
    assert rates[-1] < rates[0], "the plateau lowered the rate"
    assert both["metrics"].keys() == alone["metrics"].keys()
    rows = run_folder.read_rows(tmp_path / "seed2")
    sizes = [row["seeds_at_once"] for row in rows]
    assert sizes[0] == 3 and both["runs"][2]["seeds_at_once"] == sizes[-1]
    assert both["metrics"]["epoch_seconds"]["values"][2] == pytest.approx(
        sum(row["seconds"] / size for row, size in zip(rows, sizes, strict=True)))
    for seed in SEEDS:
        assert re.search(rf"^seed {seed}  epoch 1/6", printed, re.MULTILINE), printed


def test_stopped_seeds_go_on_in_either_way(one_by_one, tmp_path):
    with pytest.raises(train.Interrupted) as caught:
        run(tmp_path, way="yes", stop=StopAfter(4), **EVERYTHING)
    assert caught.value.signum == 15
    assert steps_saved(tmp_path) == [4, 4, 4], "in the second epoch of three steps"
    with pytest.raises(train.Interrupted):
        run(tmp_path, way="no", stop=StopAfter(2), **EVERYTHING)
    assert steps_saved(tmp_path) == [6, 4, 4]
    with pytest.raises(train.Interrupted):  # seeds 1 and 2 finish their epoch, then come all
        run(tmp_path, way="yes", stop=StopAfter(3), **EVERYTHING)
    assert steps_saved(tmp_path) == [7, 7, 7]
    run(tmp_path, way="yes", **EVERYTHING)
    assert_same_runs(tmp_path, one_by_one[0])


def test_seeds_that_are_stopped_before_their_first_step_leave_their_folders_free(tmp_path):
    with pytest.raises(train.Interrupted):
        run(tmp_path, way="yes", stop=lambda: 15, **EVERYTHING)
    assert not any(run_folder.holds_run(tmp_path / f"seed{seed}") for seed in SEEDS)


def steps_saved(folder):
    """Return the newest checkpoint's step of each seed."""
    return [Checkpoints(folder / f"seed{seed}", read_only=True).steps()[-1] for seed in SEEDS]


def test_the_accelerators_programs_give_the_same_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "runs_on_cpu", lambda devices: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # XLA's own forms of all layers
    monkeypatch.setattr(together, "step_seconds",
                        lambda shared, state, over_seeds: 2.0 if over_seeds else 1.0)
    _, printed = run(tmp_path / "together", way="auto", **EVERYTHING)
    assert ("together: a step of one seed takes 1e+03 ms, a step of 3 at once 2e+03 ms, 0.67 of one"
            in printed)
    run(tmp_path / "alone", way="no", **EVERYTHING)
    assert_same_runs(tmp_path / "together", tmp_path / "alone")


def test_no_timing_decides_how_deterministic_seeds_are_trained(monkeypatch):
    monkeypatch.setattr(together, "pays", lambda *args: pytest.fail("timed"))
    lines = []
    config = tiny.tiny_config(deterministic=True)
    assert seeds._shared(config, [0, 1], "auto", lines.append) is None
    assert lines == ["one by one: config.deterministic"]


def test_auto_takes_the_faster_way(tmp_path, monkeypatch):
    config = tiny.tiny_config(**EVERYTHING)
    shared = together.prepare(config)
    lines = []
    assert not together.pays(shared, [0, 1], lines.append)
    assert "one by one: on CPU together takes 0.92 to 1.25 times as long" in lines[0]
    monkeypatch.setattr(programs, "runs_on_cpu", lambda devices: False)
    real = together.step_seconds
    task = create_task(config, 100, 10)
    seconds = real(shared, create_state(task, 0).on_device(), over_seeds=False)
    assert 1e-5 < seconds < 10
    for ratio, expected in ((0.9, True), (1.1, False)):
        monkeypatch.setattr(together, "step_seconds", lambda shared, state, over_seeds, r=ratio:
                            2 * r if over_seeds else 1.0)
        assert together.pays(shared, [0, 1], lines.append) is expected
        assert f"{ratio:.2f} of one by one" in lines[-1]

    def full(shared, state, over_seeds):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(together, "step_seconds", full)
    assert not together.pays(shared, [0, 1], lines.append)
    assert "do not fit" in lines[-1]

    def refused(shared, state, over_seeds):
        raise jax.errors.JaxRuntimeError("INTERNAL: no algorithm worked!\nmore")

    monkeypatch.setattr(together, "step_seconds", refused)
    assert not together.pays(shared, [0, 1], lines.append)
    assert lines[-1] == "one by one: 2 seeds at once failed: INTERNAL: no algorithm worked!"


def test_a_seed_that_diverges_is_named_and_the_others_are_saved(one_by_one, tmp_path, monkeypatch):
    poison_seed_one(monkeypatch)
    with pytest.raises(train.NonFiniteLoss, match="^seed 1: the loss is not finite at step 0"):
        run(tmp_path, way="yes", **EVERYTHING)
    for seed, steps in ((0, [1]), (1, []), (2, [1])):
        folder = tmp_path / f"seed{seed}"
        assert Checkpoints(folder, read_only=True).steps() == steps
        assert not (folder / "result.json").exists()
    result, _ = run(tmp_path, way="no", chosen=(0, 2), **EVERYTHING)
    assert result["seeds"] == [0, 2] and result["metrics"]["test_accuracy"]["n"] == 2
    assert_same_runs(tmp_path, one_by_one[0], chosen=(0, 2))
    with pytest.raises(train.NonFiniteLoss, match="^seed 1: the loss is not finite at step 0"):
        run(tmp_path, way="no", **EVERYTHING)


def poison_seed_one(monkeypatch):
    """Let the initial parameters of seed 1 be infinite."""
    def poisoned(task, seed):
        state = create_state(task, seed)
        return state if seed != 1 else state.replace(
            params=jax.tree.map(lambda x: x + np.inf, state.params))

    monkeypatch.setattr("jaxcifar.saved.create_state", poisoned)


def test_the_summary_holds_mean_deviation_and_every_run(one_by_one, tmp_path):
    folder, result = one_by_one
    assert json.loads((folder / "seeds.json").read_text()) == result
    runs = [json.loads((folder / f"seed{seed}" / "result.json").read_text()) for seed in SEEDS]
    values = [one["test_accuracy"] for one in runs]
    entry = result["metrics"]["test_accuracy"]
    assert entry["values"] == values and entry["n"] == 3
    assert entry["mean"] == pytest.approx(sum(values) / 3)
    assert entry["std"] == pytest.approx(np.sqrt(sum((v - entry["mean"]) ** 2 for v in values) / 2))
    rows = tiny.rows(folder / "seed1")
    assert result["metrics"]["best_val_accuracy"]["values"][1] == max(
        row["val_accuracy"] for row in rows)
    assert result["metrics"]["last_train_loss"]["values"][1] == rows[-1]["train_loss"]
    assert [one["config_hash"] for one in result["runs"]] == [one["config_hash"] for one in runs]
    assert result["config_hash"] == runs[0]["config_hash"] != runs[1]["config_hash"]
    assert result["environment"]["jax"] == jax.__version__ and not result["runs"][0]["environment"]
    lines = report.table(result).splitlines()
    assert f"{entry['mean']:.2f}" in lines[1] and f"{values[2]:.2f}" in lines[1]
    assert (folder / "curves.png").stat().st_size > 10_000


def test_one_seed_has_no_deviation_and_finished_seeds_are_not_trained_again(tmp_path):
    short = EVERYTHING | {"epochs": 1}
    once, _ = run(tmp_path, way="no", chosen=[3], **short)
    entry = once["metrics"]["test_accuracy"]
    assert entry["std"] is None and entry["n"] == 1 and entry["mean"] == entry["values"][0]
    before = (tmp_path / "seed3" / "result.json").stat().st_mtime_ns
    _, printed = run(tmp_path, way="auto", chosen=[3], **short)
    assert "finished before: 3" in printed and "epoch 1/1" not in printed
    assert (tmp_path / "seed3" / "result.json").stat().st_mtime_ns == before
    more, printed = run(tmp_path, way="no", chosen=[2], **short)
    assert more["seeds"] == [2, 3], "the summary takes in what was finished before"
    assert more["metrics"]["test_accuracy"]["values"][1] == entry["mean"]
    assert "2 run(s) of" in printed and json.loads((tmp_path / "seeds.json").read_text()) == more
    with pytest.raises(UserError, match="config.optimizer.momentum: 0.9 there, 0.5 here"):
        run(tmp_path, way="no", chosen=[4], **short, optimizer__momentum=0.5)


def test_a_lower_rate_is_accepted_after_a_first_epoch_that_diverged(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison_seed_one(patch)
        with pytest.raises(train.NonFiniteLoss, match="lower config.optimizer.learning_rate"):
            run(tmp_path, way="no", chosen=[1], **EVERYTHING | {"epochs": 1})
    result, _ = run(tmp_path, way="no", chosen=[1], **EVERYTHING | {"epochs": 1},
                    optimizer__learning_rate=0.01)
    assert result["seeds"] == [1]


def test_the_other_processes_do_not_wait_when_the_first_refuses_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "is_primary", lambda: False)
    monkeypatch.setattr(parallel, "agree_on", lambda number: 1)  # process 0 said so
    with pytest.raises(UserError, match="process 0 could not use this --workdir"):
        run(tmp_path, way="no")


def test_statistics():
    assert seeds.statistics([1.0, 2.0, 4.0]) == {
        "mean": pytest.approx(7 / 3), "std": pytest.approx(np.sqrt(7 / 3)), "n": 3,
        "values": [1.0, 2.0, 4.0]}
    assert seeds.statistics([None, 2.0]) == {
        "mean": 2.0, "std": None, "n": 1, "values": [None, 2.0]}
    assert seeds.statistics([None])["mean"] is None


def test_seeds_are_read_from_lists_and_ranges():
    assert seeds.parse("0,1,2") == [0, 1, 2]
    assert seeds.parse("0-4") == [0, 1, 2, 3, 4]
    assert seeds.parse("7, 0-1") == [7, 0, 1]


@pytest.mark.parametrize(("text", "message"), [
    ("", "'' is neither a seed"), ("0,,1", "'' is neither"), ("a", "'a' is neither"),
    ("3-1", "'3-1' is neither"), ("-1", "'-1' is neither"), ("4294967296", "is neither"),
    ("0-3,2,1", "names 1, 2 more than once")])
def test_a_bad_list_of_seeds(text, message):
    with pytest.raises(UserError, match=message):
        seeds.parse(text)


def test_several_devices_share_each_run():
    config, lines = tiny.tiny_config(num_devices=2, parallel="pmap"), []
    assert seeds._shared(config, [0, 1], "auto", lines.append) is None
    assert lines == ["one by one: 2 device(s) (pmap) share each run"]
    with pytest.raises(UserError, match="needs one device, and this run has 2"):
        seeds._shared(config, [0, 1], "yes", lines.append)


def test_the_folder_of_a_single_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds a single run"):
        run(tmp_path, way="no")


def test_the_curves_show_seeds_that_stopped_early(tmp_path):
    runs = [[{"epoch": e, "step": e, "train_loss": 2 / e + i, "val_loss": None}
             for e in range(1, last + 1)] for i, last in enumerate((4, 6, 5))]
    values = report.by_epoch(runs, "train_loss")
    assert values.shape == (3, 6) and np.isnan(values[0, 4:]).all() and values[1, 5] == 2 / 6 + 1
    figure = report.curves(runs, tmp_path / "curves.png", title="three seeds")
    lines = figure.axes[0].get_lines()
    solid = next(line for line in lines if line.get_label().startswith("train"))
    assert solid.get_label() == "train 1.500 \u00b1 1.000"
    np.testing.assert_allclose(solid.get_ydata(), [2 / e + 1 for e in (1, 2, 3, 4)])
    np.testing.assert_allclose(lines[-1].get_ydata(), [1.5, 2 / 5 + 1.5, 2 / 6 + 1])


def test_lines_of_a_seed_carry_its_prefix():
    stream = io.StringIO()
    prefixed = together.Prefixed(stream, "seed 1  ")
    print("one\ntwo", file=prefixed)
    prefixed.write("\rbar")
    print("three", file=prefixed)
    assert stream.getvalue() == "seed 1  one\nseed 1  two\n\rbarseed 1  three\n"
    assert not prefixed.isatty()


def test_seeds_of_data_in_another_order_are_refused(tmp_path, monkeypatch):
    short = EVERYTHING | {"epochs": 1}
    run(tmp_path, way="no", chosen=[0], **short)
    other = tiny.tiny_dataset(seed=1)
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: other)
    with pytest.raises(UserError, match="seed0 was trained on this data set in another order"):
        run(tmp_path, way="no", chosen=[1], **short)
    assert not (tmp_path / "seed1").exists()
    monkeypatch.setattr("jaxcifar.data.load", None)  # finished seeds are summed up without data
    assert run(tmp_path, way="no", chosen=[0], **short)[0]["seeds"] == [0]


def test_the_time_of_a_run_is_not_known_where_an_epoch_was_interrupted(tmp_path):
    short = EVERYTHING | {"epochs": 1}
    with pytest.raises(train.Interrupted):
        run(tmp_path, way="no", chosen=[0], stop=StopAfter(2), **short)
    result, _ = run(tmp_path, way="no", chosen=[0, 1], **short)
    first, second = result["metrics"]["epoch_seconds"]["values"]
    assert first is None and second > 0 and "epoch_seconds" in report.table(result)
