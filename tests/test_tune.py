"""The search: trials are ordinary runs, compile once, go on, are retried; messages; best.py."""

import csv
import io
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import jax
import pytest
import tiny
from test_invariants import StopAfter

from jaxcifar import config as config_lib
from jaxcifar import parallel, programs, run_folder, splits, study, train, tune
from jaxcifar.errors import UserError
from jaxcifar.search_space import Choice, Float, Search
from jaxcifar.state import create_state
from jaxcifar.task import create_task

ROOT = pathlib.Path(__file__).resolve().parent.parent
RATES = {"optimizer.learning_rate": Float(1e-3, 1e-1, log=True),
         "optimizer.weight_decay": Float(0.0, 0.01)}
WITH_CHOICE = RATES | {"optimizer": Choice(sgd={"optimizer.name": "sgd"}, adam={
    "optimizer.name": "adam", "optimizer.momentum": 0.0})}


@pytest.fixture(autouse=True)
def dataset(monkeypatch):
    """The tiny dataset for every run."""
    chosen = tiny.tiny_dataset()
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: chosen)


def recipe(**fields):
    """Return a tiny configuration of four epochs; its trials take fewer (see `search`)."""
    return tiny.tiny_config(model=config_lib.model("mlp_s", hidden=(8,), dropout_last=0.1),
                            augment="flip", epochs=4, **fields)


def search(space=None, **entries):
    """Return a Search over learning rate and weight decay, two epochs of half of the batches."""
    return Search(space or RATES, **({"trial": {"epochs": 2, "epoch_fraction": 0.5},
                                      "pruner": "none"} | entries))


def declared():
    """Return what a study of these tests declares."""
    return tune.declared(recipe(), search(), splits.load(recipe()).digest)


def run(workdir, chosen=None, *, config=None, **options):
    """Run a search; return (content of study.json, what was printed)."""
    stream = io.StringIO()
    content = tune.run(config or recipe(), chosen or search(), workdir, stream=stream, **options)
    return content, stream.getvalue()


def pretend(monkeypatch, outcomes=lambda config: None):
    """Let a trial be its learning rate, or raise what `outcomes` of its configuration returns."""
    tried = []

    def fit(config, search, folder, trial, cache, stop, say):
        tried.append(config)
        if error := outcomes(config):
            raise error
        return config.optimizer.learning_rate

    monkeypatch.setattr(tune, "_fit", fit)
    monkeypatch.setattr(tune.report, "write_plots", lambda *args: None)
    return tried


def kinds(content):
    """Return the kind of every trial."""
    return [record["kind"] for record in content["trials"]]


def test_a_study_trains_writes_tables_plots_and_the_best_recipe(tmp_path):
    chosen = search(WITH_CHOICE)
    run(tmp_path, chosen, trials=1)
    content, printed = run(tmp_path, chosen, trials=4)
    records = content["trials"]
    assert kinds(content) == ["complete"] * 4 and "trial 0:" not in printed
    for record in records:
        rows = run_folder.read_rows(tmp_path / record["folder"])
        assert [row["step"] for row in rows] == [2, 4], "half of four batches"
        assert record["value"] == rows[-1]["val_loss"]
        assert record["epochs"] == {row["epoch"]: row["val_loss"] for row in rows}
        there = json.loads((tmp_path / record["folder"] / "config.json").read_text())
        params = record["params"]
        assert there["optimizer"]["learning_rate"] == params["optimizer.learning_rate"]
        assert there["optimizer"]["name"] == params["optimizer"] in ("sgd", "adam")
        assert there["epochs"] == 2
        assert not (tmp_path / record["folder"] / "checkpoints").exists()
    best = content["best"]
    assert best["value"] == min(record["value"] for record in records)
    table = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert [float(line["value"]) for line in table] == [r["value"] for r in records]
    assert table[3]["optimizer"] == records[3]["params"]["optimizer"]
    assert json.loads((tmp_path / "study.json").read_text())["trials"][3]["value"] == (
        records[3]["value"])
    assert sum(content["importances"].values()) == pytest.approx(1)
    for name in ("history", "slices", "importance"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    config = runpy.run_path(str(tmp_path / "best.py"))["get_config"]()
    config_lib.validate(config)
    expected = chosen.full_config(recipe(), best["params"])
    assert config_lib.to_dict(config) == config_lib.to_dict(expected)
    assert config.epochs == 4 and config.epoch_fraction == 1.0
    command = f"--config={tmp_path}/best.py --workdir={tmp_path}/best_trial{best['number']}\n"
    assert command in printed and command in (tmp_path / "best.py").read_text()
    assert not list((tmp_path / "workers").glob("[!t]*")), "only the lock of turns is left"


def test_a_study_goes_on_as_if_never_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_refusal", lambda config: "")
    values = []
    for folder, totals, stops in (("whole", [13], ()), ("parts", [5, 11, 13], (3, 12))):
        tried = pretend(monkeypatch, lambda config: train.Interrupted(15) if (
            len(tried) in stops) else None)  # in the middle of a trial, which is taken up again
        for total in totals:
            while True:
                try:
                    content, _ = run(tmp_path / folder, search(WITH_CHOICE), trials=total)
                    break
                except train.Interrupted:
                    pass
        values.append([r["params"] for r in content["trials"] if r["kind"] != "stopped"])
        assert len(tried) == 13 + len(stops)
    assert values[0] == values[1] and len(values[0]) == 13  # TPE begins after 10 random ones
    assert len({r["optimizer.learning_rate"] for r in values[0]}) == 13, "seeds differ by trial"


def test_trials_of_one_shape_compile_once_and_equal_a_fresh_run(tmp_path, monkeypatch):
    compiled, real = [], parallel.Program.lower

    def counted(self, *args):
        if self._compiled is None:
            compiled.append(self)
        return real(self, *args)

    monkeypatch.setattr(parallel.Program, "lower", counted)
    chosen = search(trial={"epochs": 3})
    content, _ = run(tmp_path / "both", chosen, trials=2)
    assert len(compiled) == 4, "once: order, full batch, partial batch, evaluation"
    rates = {r["params"]["optimizer.learning_rate"] for r in content["trials"]}
    decays = {r["params"]["optimizer.weight_decay"] for r in content["trials"]}
    assert len(rates) == len(decays) == 2
    last = content["trials"][1]
    config = chosen.trial_config(recipe(), last["params"])
    _, rows = tiny.fit(config, tmp_path / "alone", monkeypatch)
    assert len(compiled) == 8
    assert rows == tiny.rows(tmp_path / "both" / last["folder"])
    results = [json.loads((folder / "result.json").read_text())["test_loss"]
               for folder in (tmp_path / "alone", tmp_path / "both" / last["folder"])]
    assert results[0] == results[1]


def test_the_cache_keeps_the_shapes_used_last():
    def task(**fields):
        return create_task(recipe(**fields), 100, 10)

    devices = parallel.create(recipe())
    cache = programs.Cache(2)
    first = cache.programs(task(), devices)
    other = cache.programs(task(seed=1, optimizer__learning_rate=0.5), devices)
    assert other._train is first._train and other.task.config.optimizer.learning_rate == 0.5
    wide = cache.programs(task(batch_size=16), devices)
    assert wide._train is not first._train
    assert cache.programs(task(), devices)._train is first._train
    cache.programs(task(eval_batch_size=16), devices)  # a field that no hash sees
    assert cache.programs(task(), devices)._train is first._train
    assert cache.programs(task(batch_size=16), devices)._train is not wide._train


@pytest.mark.parametrize(("fraction", "drop_last", "calls"), [
    (1.0, False, [32, 32, 32, 4]), (0.5, False, [32, 32]), (0.01, False, [32]),
    (0.7, False, [32, 32, 32]), (0.9, False, [32, 32, 32, 4]), (0.5, True, [32, 32])])
def test_an_epoch_ends_after_a_share_of_its_batches(fraction, drop_last, calls):
    config = recipe(epoch_fraction=fraction, drop_last=drop_last)
    task = create_task(config, 100, 10)
    assert task.steps_per_epoch == len(calls)
    for steps_per_call, together in (("1", False), ("epoch", True)):
        config.steps_per_call = steps_per_call
        made, step, sizes = programs.Programs(task, parallel.create(config)), 0, []
        while (call := made.steps_at(step))[0]:
            sizes += [call[1]] * call[0]
            step += call[0]
        assert sizes == calls
        assert not together or made.steps_at(0)[0] == calls.count(32)


def test_the_field_leaves_older_hashes_as_they_were():
    config = recipe()
    before = config_lib.config_hash(config)
    config.unlock()
    del config.epoch_fraction
    assert config_lib.config_hash(config) == before
    config.epoch_fraction = 0.5
    assert config_lib.config_hash(config) != before
    config.epoch_fraction = 0.0
    with pytest.raises(UserError, match="config.epoch_fraction = 0.0: must be above 0"):
        config_lib.validate(config)


def test_what_after_epoch_raises_ends_the_run_and_leaves_it_to_go_on(tmp_path, monkeypatch):
    seen = []

    def stop_once(row):
        seen.append(row["val_loss"])
        if len(seen) == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        tiny.fit(recipe(), tmp_path / "cut", monkeypatch, after_epoch=stop_once)
    _, rows = tiny.fit(recipe(), tmp_path / "cut", monkeypatch, after_epoch=stop_once)
    _, whole = tiny.fit(recipe(), tmp_path / "whole", monkeypatch)
    assert rows == whole and seen == [row["val_loss"] for row in whole]


def test_a_stopped_trial_goes_on_where_it_was(tmp_path):
    chosen = search(trial={"epochs": 3})
    for calls in (7, 5):  # the first question is before the trial
        with pytest.raises(train.Interrupted):
            run(tmp_path / "cut", chosen, trials=1, stop=StopAfter(calls))
    content, printed = run(tmp_path / "cut", chosen, trials=1)
    assert kinds(content) == ["stopped", "stopped", "complete"]
    assert [r["retry_of"] for r in content["trials"]] == [None, 0, 0]
    log = (tmp_path / "cut" / "trials" / "0000" / "train.log").read_text()
    assert log.count("resumed after epoch") == 2
    whole, _ = run(tmp_path / "whole", chosen, trials=1)
    assert tiny.rows(tmp_path / "cut/trials/0000") == tiny.rows(tmp_path / "whole/trials/0000")
    assert content["best"]["value"] == whole["best"]["value"]
    assert content["best"]["epochs"] == whole["best"]["epochs"], "epochs before the stop count too"


def test_an_objective_that_was_not_finite_before_the_stop_is_not_forgotten(tmp_path):
    chosen, folder = search(trial={"epochs": 3}), tmp_path / "trials" / "0000"
    with pytest.raises(train.Interrupted):
        run(tmp_path, chosen, trials=1, stop=StopAfter(7))
    rows = run_folder.read_rows(folder)
    rows[-1][chosen.objective] = None  # as NaN is written
    run_folder.write_rows(folder, rows)
    content, _ = run(tmp_path, chosen, trials=1)
    assert kinds(content)[:2] == ["stopped", "diverged"]


def test_what_a_killed_process_left_is_tried_once_more(tmp_path, monkeypatch):
    tried = pretend(monkeypatch)
    declaration = declared()
    script = (
        "import json, os, signal, sys\n"
        "from jaxcifar import study\nfrom jaxcifar.search_space import Float, Search\n"
        "s = Search({'x': Float(0, 1)})\n"
        "t = study.Study(sys.argv[1], 'study', s, json.loads(sys.argv[2])).take(3)\n"
        "t.suggest_float('optimizer.learning_rate', 1e-3, 1e-1, log=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n")
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", script, tmp_path, json.dumps(declaration)], cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)
        assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    with study.Study(tmp_path, "study", search(), declaration) as living:
        mine = living.take(3)
        assert mine.number == 2, "twice is enough: the chain of 0 and 1 is not tried again"
        content, _ = run(tmp_path, trials=3)
        assert kinds(content) == ["lost", "lost", "running", "complete"]
        assert content["trials"][1]["retry_of"] == 0
        rates = [r["params"].get("optimizer.learning_rate") for r in content["trials"]]
        assert rates[0] == rates[1] and tried[0].optimizer.learning_rate == rates[3]
        living.end(mine, "pruned", reason="by hand")
    content, _ = run(tmp_path, trials=3)
    assert kinds(content) == ["lost", "lost", "pruned", "complete"] and len(tried) == 1
    assert content["trials"][0]["reason"] == "its process ended"


def test_what_another_machine_left_running_is_tried_again_on_request(tmp_path, monkeypatch):
    pretend(monkeypatch)
    storage = f"journal:{tmp_path / 'journal.log'}"
    declaration = declared()
    with study.Study(tmp_path / "a", "study", search(), declaration, storage=storage) as there:
        there.take(2)
        content, _ = run(tmp_path / "b", trials=2, storage=storage)
        assert kinds(content) == ["running", "complete"]
        content, _ = run(tmp_path / "b", trials=2, storage=storage, retry_running=True)
    assert kinds(content) == ["lost", "complete", "complete"]
    assert content["trials"][2]["retry_of"] == 0


def test_failures_are_recorded_and_tried_once_more(tmp_path, monkeypatch):
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes\nmore")
    errors = {0: train.NonFiniteLoss("the loss is not finite at step 3"), 1: memory}
    seen, cleared = [], []

    def outcome(config):
        seen.append(config.seed)
        return {0: errors[0], 1: errors[0], 2: None, 3: errors[0], 4: None, 5: errors[1],
                6: errors[1], 7: None}[len(seen) - 1]

    monkeypatch.setattr(programs.Cache, "clear", lambda self: cleared.append(1))
    tried = pretend(monkeypatch, outcome)
    content, printed = run(tmp_path, trials=5)
    assert kinds(content) == ["diverged", "diverged", "complete", "diverged", "complete",
                              "out_of_memory", "out_of_memory", "complete"]
    records = content["trials"]
    assert [r["retry_of"] for r in records] == [None, 0, None, None, 3, None, 5, None]
    assert seen == [0, 1, 0, 0, 1, 0, 0, 0], "another seed where the loss was not finite"
    assert tried[1].optimizer.learning_rate == tried[0].optimizer.learning_rate
    assert records[1]["folder"] == "trials/0000_seed1" and records[6]["folder"] == "trials/0005"
    assert records[1]["reason"] == "the loss is not finite at step 3"
    assert records[5]["reason"] == "RESOURCE_EXHAUSTED: Out of memory: 9 bytes"
    assert len(cleared) == 2 and printed.count("to be tried once more") == 3
    with study.Study(tmp_path, "study", search(), declared()) as there:
        states = [t.state.name for t in there._trials()]
    assert states[:2] == ["FAIL", "PRUNED"], "the sampler learns from what diverges twice"
    assert states[5:7] == ["FAIL", "FAIL"]


def test_whatever_ends_the_search_ends_its_trial(tmp_path, monkeypatch):
    def ended(self, trial):
        trial.suggest_float("optimizer.learning_rate", 1e-3, 1e-1, log=True)
        raise error

    pretend(monkeypatch)
    for error in (KeyboardInterrupt, KeyError):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(Search, "suggest", ended)
            run(tmp_path, trials=2)
    content, _ = run(tmp_path, trials=2)
    assert kinds(content) == ["stopped", "error", "complete", "complete"]
    assert len({r["params"]["optimizer.learning_rate"] for r in content["trials"]}) == 2


def test_any_other_error_ends_the_search_and_is_tried_again(tmp_path, monkeypatch):
    pretend(monkeypatch, lambda config: UserError("cannot write: disk full"))
    with pytest.raises(UserError, match="disk full"):
        run(tmp_path, trials=1)
    pretend(monkeypatch)
    content, _ = run(tmp_path, trials=1)
    assert kinds(content) == ["error", "complete"]
    assert content["trials"][0]["reason"] == "cannot write: disk full"


def test_a_loss_that_is_really_not_finite(tmp_path, monkeypatch):
    def poisoned(task, seed):
        state = create_state(task, seed)
        return state if seed else state.replace(
            params=jax.tree.map(lambda x: x * float("inf"), state.params))

    monkeypatch.setattr("jaxcifar.saved.create_state", poisoned)
    content, _ = run(tmp_path, trials=1)
    assert kinds(content) == ["diverged", "complete"]
    assert "the loss is not finite at step 0" in content["trials"][0]["reason"]


def test_bad_trials_are_pruned(tmp_path, monkeypatch):
    values = iter([[0.5, 0.4, 0.3], [0.9, 0.8, 0.7], [0.6, 0.2, 0.5], [0.4, 0.5, 0.6]])
    ended = []

    def fit(config, folder, *, stop, stream, cache, after_epoch):
        for epoch, value in enumerate(next(values), start=1):
            after_epoch({"epoch": epoch, "step": epoch, "val_loss": value})
        ended.append(folder.name)

    monkeypatch.setattr(train, "fit", fit)
    chosen = search(trial={"epochs": 3}, pruner="median", pruner_options={"n_startup_trials": 1})
    content, printed = run(tmp_path, chosen, trials=4)
    assert kinds(content) == ["complete", "pruned", "pruned", "complete"]
    assert [len(r["epochs"]) for r in content["trials"]] == [3, 1, 1, 3]
    assert content["trials"][1]["reason"] == "worse than others after epoch 1"
    assert ended == ["0000", "0003"] and content["best"]["number"] == 0
    assert [r["value"] for r in content["trials"]] == [0.3, None, None, 0.6]
    best = Search(RATES, epoch="best"), Search(RATES, objective="val_accuracy", epoch="best")
    assert [s.value([0.4, 0.2, 0.5]) for s in best] == [0.2, 0.5]


def test_messages_of_a_study(tmp_path, monkeypatch):
    pretend(monkeypatch)
    run(tmp_path / "study", trials=1)
    with pytest.raises(UserError, match=r"otherwise \(config.batch_size: '32' there, '16' "):
        run(tmp_path / "study", config=recipe(batch_size=16))
    with pytest.raises(UserError, match="objective: 'lowest val_loss.*there, 'lowest train_loss"):
        run(tmp_path / "study", search(objective="train_loss"))
    run(tmp_path / "study", config=recipe(eval_batch_size=16), trials=1)
    for storage in ("nonsense", "unknown://host/x", f"sqlite:///{tmp_path / 'no' / 'where.db'}"):
        with pytest.raises(UserError, match=f"--storage={storage} cannot be opened"):
            run(tmp_path / "other", storage=storage)
    with pytest.raises(UserError, match="pruner 'median': .*n_startup"):
        run(tmp_path / "other", search(pruner="median", pruner_options={"n_startup": 1}))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"is not installed: pip install -e '.\[tune\]'"):
        run(tmp_path / "study")


def test_another_study_in_the_folder_leaves_the_trials_of_the_first_alone(tmp_path):
    first, _ = run(tmp_path, trials=1)
    other, _ = run(tmp_path, search(RATES | {"batch_size": Choice(16, 20)}), trials=1, name="other")
    assert [content["trials"][0]["folder"] for content in (first, other)] == [
        "trials/0000", "trials/0000_2"]
    assert kinds(other) == ["complete"]
    (tmp_path / "study.db").unlink()
    again, _ = run(tmp_path, trials=1)  # the same parameters, whose weights are gone
    assert again["trials"][0]["params"] == first["trials"][0]["params"]
    assert again["trials"][0]["folder"] == "trials/0000_3"
    assert again["trials"][0]["value"] == first["trials"][0]["value"]


def test_a_machine_whose_data_are_in_another_order_takes_no_part(tmp_path, monkeypatch):
    pretend(monkeypatch)
    storage = f"journal:{tmp_path / 'journal.log'}"
    run(tmp_path / "a", trials=1, storage=storage)
    other = tiny.tiny_dataset(seed=1)
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: other)
    with pytest.raises(UserError, match="declared otherwise .training set: '.{8}' there, '.{8}' her"):
        run(tmp_path / "b", trials=2, storage=storage)


@pytest.mark.parametrize(("body", "message"), [
    ("return Search({'x': Float(1e-5)})", r"mine.py:3: TypeError: .*missing 1 required"),
    ("return Serach({})", r"mine.py:3: NameError: name 'Serach' is not defined"),
    ("return Search({'x': Int(16, 256, log=True, step=16)})", "1 with log"),
    ("return Search({'x': Int(16, 256, step=0)})", "step must be at least 1")])
def test_a_mistake_in_a_search_space_is_one_line(body, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from jaxcifar.search_space import Float, Int, Search\n"
                    f"def search_space():\n    {body}\n")
    with pytest.raises(UserError, match=message) as caught:
        tune.load_search(str(path)).check(recipe())
    assert "\n" not in str(caught.value)
