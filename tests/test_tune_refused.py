"""The search: what is refused before there is a study, and trials that cannot be trained."""

import jax
import pytest
import tiny
from absl import flags
from test_tune import RATES, dataset, kinds, pretend, recipe, run, search  # noqa: F401

from jaxcifar.errors import UserError
from jaxcifar.search_space import Choice


def test_a_model_that_is_refused_is_not_tried_again(tmp_path, monkeypatch):
    tried = pretend(monkeypatch)
    space = RATES | {"model.hidden": Choice((4,), (400,), (5,))}
    content, _ = run(tmp_path, search(space), config=recipe(max_params=20_000), trials=8)
    for record in content["trials"]:
        assert (record["kind"] == "refused") == (record["params"]["model.hidden"] == "(400,)")
        assert (record["retry_of"], record["seed"]) == (None, 0)
    refused = [r for r in content["trials"] if r["kind"] == "refused"]
    assert len(refused) + len(tried) == 8 and refused
    assert "more than config.max_params = 20,000" in refused[0]["reason"]
    with pytest.raises(UserError, match="all 3 trials were refused.*max_params"):
        run(tmp_path / "all", config=recipe(max_params=20))


def test_a_pattern_that_fits_no_parameter_of_a_model_is_refused(tmp_path, monkeypatch):
    pretend(monkeypatch)
    space = RATES | {"optimizer.decay_exclude": Choice("bias$", "^bn1/")}
    content, _ = run(tmp_path, search(space), trials=6)
    for record in content["trials"]:
        wrong = record["params"]["optimizer.decay_exclude"] == "^bn1/"
        assert record["kind"] == ("refused" if wrong else "complete")
        assert not wrong or "matches no parameter" in record["reason"]
    assert len(set(kinds(content))) == 2


def test_a_model_that_the_weights_do_not_fit_is_refused(tmp_path, monkeypatch):
    tiny.fit(recipe(), tmp_path / "weights", monkeypatch)
    pretend(monkeypatch)
    space = RATES | {"model.hidden": Choice((8,), (9,))}  # the run's, and another
    content, _ = run(tmp_path / "study", search(space), trials=6,
                     config=recipe(init_from=str(tmp_path / "weights")))
    for record in content["trials"]:
        fits = record["params"]["model.hidden"] == "(8,)"
        assert record["kind"] == ("complete" if fits else "refused")
        assert fits or "config.init_from = " in record["reason"]
    assert len(set(kinds(content))) == 2


def test_early_stopping_that_always_stops_is_refused(tmp_path, monkeypatch):
    pretend(monkeypatch)
    space = RATES | {"early_stopping.window": Choice(0, 1)}
    content, _ = run(tmp_path, search(space), trials=6)
    for record in content["trials"]:
        always = record["params"]["early_stopping.window"] == 1
        assert record["kind"] == ("refused" if always else "complete")
        assert not always or "at least 2" in record["reason"]
    assert len(set(kinds(content))) == 2


def test_a_search_whose_trials_are_all_refused_is_an_error_however_short(tmp_path):
    for _ in range(2):  # and again where no trial is left to take
        with pytest.raises(UserError, match="^the one trial was refused.*max_params.*--workdir$"):
            run(tmp_path, config=recipe(max_params=20), trials=1)
    assert (tmp_path / "study.csv").exists()


@pytest.mark.parametrize(("trial", "message"), [
    ({"dtype": "fp32"}, r"every trial \(dtype=fp32\).*did you mean 'float32'.*mend --trial"),
    ({"max_params": 20}, "every trial .max_params=20.*more than config.max_params = 20"),
])
def test_wrong_fields_of_every_trial_leave_no_study(trial, message, tmp_path, monkeypatch):
    pretend(monkeypatch)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "study", search(trial=trial))
    assert not (tmp_path / "study").exists()
    content, _ = run(tmp_path / "study", trials=1)  # the corrected command
    assert kinds(content) == ["complete"]


def test_a_recipe_that_only_the_space_mends_is_searched(tmp_path, monkeypatch):
    pretend(monkeypatch)
    space = RATES | {"model.hidden": Choice((2,), (3,))}
    content, _ = run(tmp_path, search(space), config=recipe(max_params=11_000), trials=1)
    assert kinds(content) == ["complete"]


@pytest.mark.parametrize(("file", "message"), [
    ("config.json", "holds a single run: choose another --workdir for a search"),
    ("seed4/config.json", r"holds several seeds \(seed4\)")])
def test_the_folder_of_a_run_is_refused(file, message, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=message):
        run(tmp_path, trials=1)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_negative_number_of_trials_is_refused():
    with pytest.raises(ValueError, match="-3 is not a non-negative integer"):
        flags.FLAGS["trials"].parser.parse("-3")


def test_a_device_that_is_full_from_the_start_ends_the_search(tmp_path, monkeypatch):
    full = [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes")] * 3
    pretend(monkeypatch, lambda config: full.pop() if full else None)
    with pytest.raises(UserError, match="all trials of this process ran out of memory"):
        run(tmp_path, trials=3)
    content, _ = run(tmp_path, trials=3)
    assert kinds(content) == [*["out_of_memory"] * 3, "complete", "complete"]


def test_one_network_that_is_too_large_does_not_end_it(tmp_path, monkeypatch):
    full = [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes")] * 2
    pretend(monkeypatch, lambda config: full.pop() if full else None)
    content, _ = run(tmp_path, trials=2)
    assert kinds(content) == ["out_of_memory", "out_of_memory", "complete"]


def test_a_batch_that_the_devices_cannot_share_takes_fewer(tmp_path, monkeypatch):
    tried = pretend(monkeypatch)
    space = RATES | {"batch_size": Choice(6)}  # and 32 in evaluation
    content, _ = run(tmp_path, search(space), config=recipe(num_devices=4, batch_size=8), trials=1)
    assert kinds(content) == ["complete"]
    assert [(c.batch_size, c.num_devices) for c in tried] == [(6, 2)]
