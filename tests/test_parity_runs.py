"""Choosing, ordering, running, resuming, merging and collecting the rows of the parity report."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import threading
import types

import parity_fakes
import pytest
from parity_fakes import ROOT

from jaxcifar import config as config_lib
from jaxcifar import run_folder
from jaxcifar.errors import UserError
from jaxcifar.report import parity, parity_results, parity_rows, parity_runs

KNOWN = parity_rows.recipes(ROOT)
COUNTED = parity_rows.read_counts(ROOT)
NN, SMALL = KNOWN["cifar100/nn"], KNOWN["cifar100/cnn/32"]


def names(patterns):
    return [recipe.name for recipe in parity_rows.select(KNOWN, patterns)]


def jobs(tmp_path, seeds=(0, 1), recipe=NN, device_bytes=0):
    return [parity_runs.Job(recipe, seed, tmp_path / "work" / recipe.name / f"seed{seed}",
                            device_bytes) for seed in seeds]


def sources(tmp_path, made):
    """Write the run folder that each job's process is to leave."""
    return {str(job): parity_fakes.write_run(tmp_path / "made" / job.recipe.name / str(job.seed),
                                             job.recipe, job.seed) for job in made}


def events(tmp_path):
    return [line.split()[0] for line in (tmp_path / "work" / "events").read_text().splitlines()]


def run_rows(tmp_path, root, mode="ok", **options):
    """Run two seeds of cifar100/nn with processes of the fakes; return (exit code, lines said)."""
    said = []
    options = {"rows": "cifar100/nn", "seeds": "0,1", "budget_minutes": 0, "jobs": "2"} | options
    code = parity.run_rows(root, workdir=tmp_path / "work", say=said.append, **options,
                           command=parity_fakes.command(sources(tmp_path, jobs(tmp_path)), mode))
    return code, said


def test_rows_are_chosen_by_glob_alias_and_specification():
    assert names("architectures/mlp_?") == ["architectures/mlp_s", "architectures/mlp_l"]
    assert names("googlenet/table3/*") == [f"googlenet/table3/{model}/{setting}"
                                           for model in ("k5_0_5", "0_5_v5") for setting in (
        "lr0.2_wd5e-4", "lr0.05_wd5e-4", "lr0.1_wd5e-3", "lr0.2_wd5e-5", "lr0.05_wd5e-5")]
    best = "architectures/cnn/b128_lr0.001_l0_d0.5_basic"
    assert names("architectures/cnn") == names("configs/architectures.py:cnn") == [best]
    assert names("cifar100/nn,*/nn") == ["cifar100/nn"]
    assert len(names("architectures/cnn/*")) == 72
    assert len(names("*")) == len(KNOWN) == len({recipe.hash for recipe in KNOWN.values()})


def test_published_rows_are_those_with_a_number_to_measure():
    chosen = set(names("published"))
    assert "resnet5m/channels/32-64-128-256" not in chosen  # its number is a count
    assert "architectures/vit/depth6" not in chosen
    assert {"cifar100/nn", "se_resnet/best", "resnet5m/blocks/4332"} <= chosen


def test_a_glob_without_a_row_names_the_nearest():
    with pytest.raises(UserError, match="no row matches 'cifar100/cn/bn'.*'cifar100/cnn/bn'"):
        names("cifar100/nn,cifar100/cn/bn")


def test_cheap_rows_come_first():
    chosen = parity_rows.select(KNOWN, "resnet5m/model1,cifar100/*,se_resnet/*")
    order = [recipe.name for recipe in parity_rows.by_cost(
        chosen, COUNTED, dict.fromkeys(KNOWN))]
    assert order[0] == "cifar100/cnn/32" and order[-1] == "resnet5m/model1"
    assert order.index("cifar100/cnn/128") < order.index("cifar100/cnn/256")
    nn = parity_rows.work(NN.config, COUNTED["cifar100/nn"]["multiply_adds"])
    assert nn == 20 * (3 * 50_000 + 10_000) * 29_769_728
    vit = KNOWN["architectures/vit"].config  # validation, and no test in between
    assert parity_rows.work(vit, 1) == 100 * (3 * 40_000 + 10_000)


def test_measured_seconds_refine_the_order(tmp_path):
    results = {"cifar100/cnn/32": parity_fakes.result_of(tmp_path, SMALL, seeds=(0, 1))}
    for record, seconds in zip(results["cifar100/cnn/32"]["seeds"].values(), (9000, 11000),
                               strict=True):
        record["seconds"] = seconds
    expected = parity_rows.seconds(KNOWN, COUNTED, results, "cpu")
    assert expected["cifar100/cnn/32"] == 10_000
    ratio = (parity_rows.work(NN.config, COUNTED["cifar100/nn"]["multiply_adds"])
             / parity_rows.work(SMALL.config, COUNTED["cifar100/cnn/32"]["multiply_adds"]))
    assert expected["cifar100/nn"] == pytest.approx(10_000 * ratio)
    assert set(parity_rows.seconds(KNOWN, COUNTED, results, "gpu").values()) == {None}
    results["cifar100/nn"] = parity_fakes.result_of(tmp_path, NN)
    results["cifar100/nn"]["seeds"]["0"]["seconds"] = 60.0  # faster than its multiply-adds say
    expected = parity_rows.seconds(KNOWN, COUNTED, results, "cpu")
    assert [r.name for r in parity_rows.by_cost([SMALL, NN], COUNTED, expected)] == [
        "cifar100/nn", "cifar100/cnn/32"]


def test_seeds_trained_at_once_share_their_time(tmp_path):
    folder = parity_fakes.write_run(tmp_path, NN, 1, epochs=4)
    alone = parity_results.record(folder)[1]
    assert (alone["seconds_per_epoch"], alone["seconds"]) == (2.0, 9.0)
    rows = run_folder.read_rows(folder)
    run_folder.write_rows(folder, [row | {"seeds_at_once": 2} for row in rows])
    shared = parity_results.record(folder)[1]
    assert (shared["seconds_per_epoch"], shared["seconds"]) == (1.0, 4.5)


def test_merging_again_changes_nothing(tmp_path):
    new = parity_results.record(parity_fakes.write_run(tmp_path / "run", NN, 1))[1]
    path = parity_results.path_of(tmp_path, "cifar100/nn")
    assert parity_results.merge(tmp_path, NN, 1, new) == "merged"
    before = path.read_bytes()
    assert parity_results.merge(tmp_path, NN, 1, new) == "already there"
    assert path.read_bytes() == before
    other = parity_results.record(parity_fakes.write_run(tmp_path / "run", NN, 0))[1]
    parity_results.merge(tmp_path, NN, 0, other)
    content = parity_results.read(tmp_path)["cifar100/nn"]
    assert list(content["seeds"]) == ["0", "1"] and content["seeds"]["1"] == new
    assert len(path.read_text().splitlines()) < 120  # curves take a line each


def test_a_result_of_an_older_configuration_is_replaced(tmp_path):
    new = parity_results.record(parity_fakes.write_run(tmp_path / "run", NN, 1))[1]
    parity_results.merge(tmp_path, NN, 0, new)
    path = parity_results.path_of(tmp_path, "cifar100/nn")
    path.write_text(path.read_text().replace(NN.hash, "0123456789ab"))
    assert not parity_results.has_seed(parity_results.read(tmp_path), NN, 0)
    assert "in place of an older" in parity_results.merge(tmp_path, NN, 1, new)
    content = parity_results.read(tmp_path)["cifar100/nn"]
    assert content["config_hash"] == NN.hash and list(content["seeds"]) == ["1"]


def test_collecting_takes_finished_runs_and_leaves_the_rest(tmp_path):
    runs = tmp_path / "runs"
    parity_fakes.write_run(runs / "a" / "b", NN, 0, test_accuracy=27.5)
    parity_fakes.write_run(runs / "alias", KNOWN["architectures/cnn/b128_lr0.001_l0_d0.5_basic"], 2)
    (parity_fakes.write_run(runs / "unfinished", NN, 1) / "result.json").unlink()
    broken = parity_fakes.write_run(runs / "broken", NN, 2) / "metrics.jsonl"
    broken.write_text("".join(broken.read_text().splitlines(keepends=True)[:-1]))
    changed = parity_fakes.write_run(runs / "other", NN, 2) / "config.json"
    changed.write_text(changed.read_text().replace('"epochs": 20', '"epochs": 21'))
    said = []
    assert parity_results.collect(tmp_path, KNOWN, runs, say=said.append) == 2
    assert len(said) == 4 and "does not have the 20 epochs" in said[2]
    assert "config.json is not that of result.json" in said[3]
    results = parity_results.read(tmp_path)
    assert {name: list(content["seeds"]) for name, content in results.items()} == {
        "cifar100/nn": ["0"], "architectures/cnn/b128_lr0.001_l0_d0.5_basic": ["2"]}
    assert results["cifar100/nn"]["seeds"]["0"]["values"]["test_accuracy"] == 27.5
    assert parity_results.collect(tmp_path, KNOWN, runs, say=said.append) == 0
    with pytest.raises(UserError, match="there is no folder"):
        parity_results.collect(tmp_path, KNOWN, tmp_path / "nowhere")


def test_a_run_of_no_row_is_left_out(tmp_path):
    parity_fakes.write_run(tmp_path / "runs", NN, 0)
    said = []
    others = {name: recipe for name, recipe in KNOWN.items() if name != "cifar100/nn"}
    assert parity_results.collect(tmp_path, others, tmp_path / "runs", say=said.append) == 0
    assert "has no row's configuration" in said[0]


def test_rows_are_run_merged_and_not_run_twice(tmp_path):
    root = parity_fakes.repository(tmp_path / "root")
    code, said = run_rows(tmp_path, root, "meet")
    assert code == 0 and said[0] == "1 row(s), 2 seed(s): 2 run(s) to do"
    assert list(parity_results.read(root)["cifar100/nn"]["seeds"]) == ["0", "1"]
    assert "| 26 | 25.00 | 40.00 +- 0.00 (2) |" in (root / "docs" / "parity.md").read_text()
    code, said = run_rows(tmp_path, root, "fail")
    assert code == 0 and "0 run(s) to do" in said[0] and "nothing to run" in said


def test_a_finished_run_that_was_not_merged_is_not_run_again(tmp_path):
    root = parity_fakes.repository(tmp_path / "root")
    parity_fakes.write_run(tmp_path / "work" / "cifar100" / "nn" / "seed0", NN, 0)
    code, said = run_rows(tmp_path, root)
    assert code == 0 and "1 run(s) to do" in said[0]
    assert events(tmp_path) == ["start", "end"]
    assert list(parity_results.read(root)["cifar100/nn"]["seeds"]) == ["0", "1"]


def test_at_the_budget_s_end_runs_save_and_later_go_on(tmp_path, monkeypatch):
    root, folder = parity_fakes.repository(tmp_path / "root"), tmp_path / "work" / "cifar100" / "nn"

    def minutes_pass_when(*paths):  # 60 seconds, once all of these are there
        watch = types.SimpleNamespace(seconds=lambda: 60.0 * all(p.exists() for p in paths))
        monkeypatch.setattr(parity_runs, "Stopwatch", lambda: watch)

    minutes_pass_when(folder / "seed0" / "ready")
    code, said = run_rows(tmp_path, root, "wait", budget_minutes=1.0, jobs="1")
    assert code == 0 and "the time is up: 1 run(s) save their state" in said
    assert said[-2] == "1 interrupted, 1 left" and parity_results.read(root) == {}
    assert (folder / "seed0" / "saved").exists()
    minutes_pass_when(tmp_path / "root" / "results" / "cifar100" / "nn.json",
                      folder / "seed1" / "ready")
    code, said = run_rows(tmp_path, root, "wait", budget_minutes=1.0, jobs="2")
    assert said[-2] == "1 finished, 1 interrupted"
    monkeypatch.undo()
    run_rows(tmp_path, root, "wait")
    assert list(parity_results.read(root)["cifar100/nn"]["seeds"]) == ["0", "1"]


def test_a_request_to_stop_saves_too(tmp_path):
    root, stop = parity_fakes.repository(tmp_path / "root"), threading.Event()
    ready = tmp_path / "work" / "cifar100" / "nn" / "seed0" / "ready"

    def ask():
        while not ready.exists() and not stop.wait(0.05):
            pass
        stop.set()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    code, said = run_rows(tmp_path, root, "wait", jobs="1", stop=stop)
    thread.join()
    assert code == 143 and "asked to stop: 1 run(s) save their state" in said
    assert said[-2] == "1 interrupted, 1 left"


def test_a_failure_is_told_and_the_others_go_on(tmp_path):
    root = parity_fakes.repository(tmp_path / "root")
    code, said = run_rows(tmp_path, root, "fail", jobs="1")
    assert code == 1 and said[-2] == "2 failed"
    assert any("failed with exit code 1: error: no such data" in line for line in said)


def test_two_refusals_for_one_reason_are_enough(tmp_path):
    root = parity_fakes.repository(tmp_path / "root")
    code, said = run_rows(tmp_path, root, "fail", jobs="1", seeds="0,1,2,3")
    assert code == 1 and said[-2] == "2 failed, 2 left"
    assert "two runs were refused for the same reason: 2 more not started" in said


def test_a_run_of_an_older_configuration_is_not_in_the_way(tmp_path):
    root, older = parity_fakes.repository(tmp_path / "root"), config_lib.ConfigDict(
        config_lib.to_dict(NN.config))
    older.epochs += 1
    parity_fakes.write_run(tmp_path / "work" / "cifar100" / "nn" / "seed0",
                           dataclasses.replace(NN, config=older), 0)
    code, _ = run_rows(tmp_path, root)
    assert code == 0 and list(parity_results.read(root)["cifar100/nn"]["seeds"]) == ["0", "1"]
    logs = (tmp_path / "work" / "cifar100" / "nn").glob("*/parity.log")
    assert {log.parent.name for log in logs} == {f"seed0_{NN.hash}", "seed1"}
    with pytest.raises(UserError, match="config.json is no configuration"):
        (tmp_path / "config.json").write_text("{")
        parity_results.hash_of_run(tmp_path)


def test_what_still_runs_since_an_earlier_start_is_left_alone(tmp_path):
    (job,) = jobs(tmp_path, seeds=(0,))
    job.folder.mkdir(parents=True)
    command = parity_fakes.command(sources(tmp_path, [job]))
    with (job.folder / "parity.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = parity_runs.run([job], tmp_path, command=command, say=lambda line: None)
        assert outcome.left == [job] and not (tmp_path / "work" / "events").exists()
    outcome = parity_runs.run([job], tmp_path, command=command, say=lambda line: None)
    assert outcome.finished == [job]


def test_a_run_holds_its_folder_s_lock(tmp_path):
    (job,) = jobs(tmp_path, seeds=(0,))
    lock = job.folder / "parity.lock"
    child = ("import fcntl, sys\nwith open(sys.argv[1], 'ab') as f:\n"
             "    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)")
    said = []
    outcome = parity_runs.run([job], tmp_path, say=said.append,
                              command=lambda job: [sys.executable, "-S", "-c", child, str(lock)])
    assert outcome.failed == [job] and "BlockingIOError" in said[-1]


@pytest.mark.parametrize(("slots", "device_bytes", "together"), [
    (1, None, 1), (2, None, 2), (3, 25, 2), (3, 30, 3), (3, 5, 1)])
def test_runs_go_side_by_side_where_there_is_room(tmp_path, slots, device_bytes, together):
    made = jobs(tmp_path, seeds=(0, 1, 2), device_bytes=10)
    parity_runs.run(made, tmp_path, slots=slots, device_bytes=device_bytes, say=lambda line: None,
                    command=parity_fakes.command(sources(tmp_path, made), "meet", together))
    running, most = 0, 0
    for event in events(tmp_path):
        running += 1 if event == "start" else -1
        most = max(most, running)
    assert events(tmp_path).count("end") == 3 and most == together


def test_slots_and_memory():
    assert parity_runs.slots("auto", "cpu") == 1
    assert 1 <= parity_runs.slots("auto", "gpu") <= 4
    assert parity_runs.slots("3", "cpu") == 3
    for wrong in ("0", "many", "-1"):
        with pytest.raises(UserError, match="must be auto or a number"):
            parity_runs.slots(wrong, "cpu")
    guess = parity_runs.expected_device_bytes(NN.config, 10**9, [])
    assert guess == 2 * 2**30 + 256 * 10**9 // 20
    measured = parity_runs.expected_device_bytes(NN.config, 10**9, [
        {"peak_device_bytes": 10**9}, {"peak_device_bytes": None}])
    assert measured == int(1.2e9) + 2**29


def test_on_a_gpu_no_run_takes_all_the_memory(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    (job,) = jobs(tmp_path, seeds=(0,))
    child = "import os; print(os.environ.get('XLA_PYTHON_CLIENT_PREALLOCATE'))"
    for platform, expected in (("gpu", "false"), ("cpu", "None")):
        parity_runs.run([job], tmp_path, platform=platform, say=lambda line: None,
                        command=lambda job: [sys.executable, "-S", "-c", child])
        assert (job.folder / "parity.log").read_text().split()[-1] == expected


def test_the_command_is_the_row_s():
    (job,) = jobs(ROOT, seeds=(7,))
    words = parity_runs.command(job)
    assert words[1:4] == ["-m", "jaxcifar.main", "--config=configs/cifar100.py:nn"]
    assert f"--workdir={job.folder}" in words and "--config.seed=7" in words


def test_a_damaged_result_file_is_named(tmp_path):
    path = parity_results.path_of(tmp_path, "cifar100/nn")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": 1}))
    with pytest.raises(UserError, match="nn.json is no result file"):
        parity_results.read(tmp_path)


def test_the_script_lists_rows_and_names_mistakes():
    def script(*arguments):
        return subprocess.run((sys.executable, "scripts/parity.py", *arguments), cwd=ROOT,
                              text=True, capture_output=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
    listed = script("--list", "--rows=cifar100/nn,cifar100/cnn/32")
    lines = listed.stdout.splitlines()
    assert listed.returncode == 0 and len(lines) == 3
    assert {line.split()[0] for line in lines[1:]} == {"cifar100/cnn/32", "cifar100/nn"}
    closed, pipe = os.pipe()
    os.close(closed)  # as head does once it has its lines
    cut = subprocess.run((sys.executable, "scripts/parity.py", "--list"), cwd=ROOT, stdout=pipe,
                         stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(pipe)
    assert (cut.returncode, cut.stderr) == (0, "")
    for flag in ("--budget-minutes", "--budget_minutes"):
        negative = script(f"{flag}=-1")
        assert negative.returncode == 2 and "'-1' is not a number from 0 up" in negative.stderr
    wrong = script("--rows=cifar100/nm")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: no row matches 'cifar100/nm'")
