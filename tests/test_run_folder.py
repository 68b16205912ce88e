"""A run's folder keeps what a run may go wrong by: other processes, other data, a badly timed stop."""

import dataclasses
import errno
import io
import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from test_invariants import StopAfter

from jaxcifar import run_folder, saved, splits, train
from jaxcifar.checkpoint import Checkpoints
from jaxcifar.errors import UserError
from jaxcifar.report import parity_results
from jaxcifar.run import Run
from jaxcifar.state import create_state
from jaxcifar.task import create_task

HOLDER = """
import sys
from jaxcifar import run_folder
run_folder.hold(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


FULL_DISK = """
import resource, signal, sys
import jax, numpy as np, tiny
from jaxcifar.checkpoint import Checkpoints
from jaxcifar.errors import UserError
from jaxcifar.state import create_state
from jaxcifar.task import create_task
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = jax.tree.map(np.asarray, create_state(create_task(tiny.tiny_config(), 100, 10), 0))
checkpoints = Checkpoints(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(state, None)
    checkpoints.wait()
except UserError as error:
    print(error)
"""


def test_a_disk_that_takes_no_checkpoint_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"})
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"cannot write {tmp_path}/checkpoints: ") and "File too large" in line
    assert line.endswith("; choose a place that is writable and has space left")


def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process trains in .*choose another --workdir"):
            tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"], "nothing was touched"
    finally:
        holder.communicate()  # it ends with its input, and the lock with it
    summary, _ = tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
    assert summary.result["epochs"] == 1
    with (tmp_path / ".lock").open("ab") as file:
        assert run_folder.lock(file), "a run that has ended holds nothing"


def test_a_single_run_does_not_go_into_the_folder_of_several_seeds_or_a_search(
        tmp_path, monkeypatch):
    for file, what in (("s/seed0/config.json", r"several seeds \(seed0\)"),
                       ("t/workers/turn", "a search")):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
        folder = tmp_path / file[0]
        with pytest.raises(UserError, match=f"holds {what}: choose another --workdir for a single"):
            tiny.fit(tiny.tiny_config(), folder, monkeypatch)
        assert len(list(folder.iterdir())) == 1, "nothing was written"
    (tmp_path / "s" / "checkpoints").mkdir()  # a run of its own, which may have others beneath it
    run_folder.refuse_other_kind(tmp_path / "s", "a single run")


def test_reading_checkpoints_says_nothing_of_read_only(tmp_path):
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("absl").addHandler(handler)
    try:
        Checkpoints(tmp_path).close()
        Checkpoints(tmp_path, read_only=True).close()
    finally:
        logging.getLogger("absl").removeHandler(handler)
    assert not [record for record in said if record.levelno >= logging.WARNING]


def test_a_signal_with_the_last_step_of_an_epoch_comes_after_the_epoch_is_counted(
        tmp_path, monkeypatch):
    """Else the checkpoint at that step would know nothing of its own epoch."""
    with pytest.raises(train.Interrupted):
        tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch, stop=StopAfter(4))  # steps: 4
    assert [row["epoch"] for row in tiny.rows(tmp_path)] == [1]
    config = tiny.tiny_config()
    run = Run(create_task(config, 100, 10), tmp_path, io.StringIO())
    assert (int(run.state.epoch), int(run.state.step)) == (1, 4)
    assert run.best_epoch(run.state.history) == 1
    run.close()
    summary, _ = tiny.fit(config, tmp_path, monkeypatch, stop=StopAfter(4))
    assert summary.result["epochs"] == 2, "nothing was left to do when the signal came"


def test_a_signal_before_the_first_step_leaves_the_folder_free(tmp_path, monkeypatch):
    """Of a run that is stopped to mend a field: what is not trained is not kept from the next one."""
    with pytest.raises(train.Interrupted):
        tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch, stop=lambda: 2)
    assert not run_folder.has_checkpoints(tmp_path)
    mended = tiny.tiny_config(batch_size=20)
    with pytest.raises(train.Interrupted):
        tiny.fit(mended, tmp_path, monkeypatch, stop=StopAfter(1))
    with pytest.raises(train.Interrupted):  # of a run that goes on nothing is lost
        tiny.fit(mended, tmp_path, monkeypatch, stop=lambda: 2)
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]


def test_the_result_names_the_commits_that_were_there_when_the_run_started(tmp_path, monkeypatch):
    commit = iter("abc")

    def environment():
        return {"git_commit": next(commit)}

    monkeypatch.setattr("jaxcifar.environment.environment", environment)
    with pytest.raises(train.Interrupted):
        tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch, stop=StopAfter(2))
    for _ in range(2):  # to its end, and once more, which trains nothing
        result = tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch)[0].result
        assert result["environment"] == {"git_commit": "b"}
        assert result["earlier_environments"] == [{"git_commit": "a"}]


def test_a_checkpoint_that_was_taken_before_its_epoch_was_counted_is_replaced(tmp_path):
    state = create_state(create_task(tiny.tiny_config(), 100, 10), 0)
    state = state.replace(step=np.int32(4), epoch=np.int32(0))
    first = Checkpoints(tmp_path)
    first.save(state, None)
    first.close()
    again = Checkpoints(tmp_path)
    restored = again.restore_latest(state)
    again.save(restored.replace(epoch=np.int32(1)), None)
    again.close()
    last = Checkpoints(tmp_path)
    assert last.steps() == [4] and int(last.restore(4, state).epoch) == 1
    last.close()


def test_data_in_another_order_are_refused(tmp_path, monkeypatch):
    """A split is one of positions: of other images in another order."""
    data = tiny.tiny_dataset()
    order = np.argsort(data.train_labels, kind="stable")  # as class-named folders give it
    other = dataclasses.replace(data, train_images=data.train_images[order],
                                train_labels=data.train_labels[order])
    tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch, dataset=data)
    digest = splits.load(tiny.tiny_config()).digest
    assert json.loads((tmp_path / "data.json").read_text()) == {"train_crc32": digest}
    splits.refuse_other_data(digest, tmp_path)
    with pytest.raises(UserError, match="trained on this data set in another order"):
        tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch, dataset=other)
    assert splits.load(tiny.tiny_config()).digest != digest
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data.json cannot be read"):
        splits.refuse_other_data(digest, tmp_path)
    (tmp_path / "data.json").unlink()  # as in the folders of older versions
    splits.refuse_other_data(digest, tmp_path)


def test_the_time_of_an_interrupted_epoch_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    with pytest.raises(train.Interrupted):
        tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch, stop=StopAfter(2))
    tiny.fit(tiny.tiny_config(), tmp_path, monkeypatch)
    rows = run_folder.read_rows(tmp_path)
    assert [row.get("resumed_at") for row in rows] == [2, None]
    result = json.loads((tmp_path / "result.json").read_text())
    seconds = parity_results.record(tmp_path)[1]["seconds"]
    assert seconds == round(result["seconds"]["compile"] + 2 * rows[1]["seconds"], 1)


def test_a_run_that_fails_lets_others_train_in_its_folder(tmp_path, monkeypatch):
    def full(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        patch.setattr("jaxcifar.train.train_epoch", full)
        tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
    assert not run_folder.is_held(tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        tiny.fit(tiny.tiny_config(epochs=1, init_from="nowhere"), tmp_path / "b", monkeypatch)
    assert not run_folder.is_held(tmp_path / "b"), "nor does one that could not begin"
    (tmp_path / "metrics.jsonl").write_text("no row\n")
    with pytest.raises(UserError, match="line 1 is not a row"), monkeypatch.context() as patch:
        patch.setattr("jaxcifar.checkpoint.Checkpoints.restore_latest", lambda self, form: form)
        tiny.fit(tiny.tiny_config(epochs=1), tmp_path, monkeypatch)
    assert not run_folder.is_held(tmp_path)
    run_folder.hold(tmp_path)
    assert run_folder.is_held(tmp_path)
    run_folder.release(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_where_files_cannot_be_locked_a_run_is_trained_and_nobody_is_taken_for_dead(
        tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    run_folder.hold(tmp_path)
    run_folder.release(tmp_path)
    assert not run_folder.is_held(tmp_path)
    assert run_folder.is_locked(tmp_path / ".lock", unknown=True)
    assert not run_folder.is_locked(tmp_path / ".lock", unknown=False)


def test_what_goes_wrong_in_the_end_does_not_hide_what_went_wrong_before(tmp_path, monkeypatch):
    def fail(*args):
        raise UserError("the disk is full")

    config = tiny.tiny_config(epochs=1)
    with pytest.raises(KeyError, match="first") as caught, monkeypatch.context() as patch:
        patch.setattr("jaxcifar.checkpoint.Checkpoints.wait", fail)
        patch.setattr("jaxcifar.train.train_epoch", lambda *args: {}["first"])
        tiny.fit(config, tmp_path / "a", monkeypatch)
    assert caught.value.__notes__ == ["and, as the run was closed: the disk is full"]
    with pytest.raises(UserError, match="the disk is full"), monkeypatch.context() as patch:
        patch.setattr("jaxcifar.checkpoint.Checkpoints.wait", fail)
        tiny.fit(config, tmp_path / "b", monkeypatch, stop=StopAfter(2))


@pytest.mark.parametrize(("fields", "difference"), [
    ({"channels": (4, 6)}, r"params/layer2.0/bn1/bias was \(8,\), is \(6,\); .*; \d+ more"),
    ({"channels": (4, 8, 8), "blocks": (1, 1, 1)}, "params/layer3.0/bn1/bias is new"),
    ({"channels": (4,), "blocks": (1,)}, "params/layer2.0/bn1/bias is gone")])
def test_checkpoints_of_a_model_whose_code_was_changed_are_not_damaged(
        fields, difference, tmp_path):
    def state(**changed):
        config = tiny.tiny_config()
        config.model.update(changed)
        return saved.template(create_task(config, 100, 10))

    for read_only in (False, True):
        written = Checkpoints(tmp_path)
        written.save(state(), None)
        written.close()
        opened = Checkpoints(tmp_path, read_only=read_only)
        with pytest.raises(UserError, match=f"are of another model .*{difference}.*another folder"):
            opened.restore_latest(state(**fields))
        opened.close()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"], "nothing is set aside"


def test_early_stopping_compares_at_least_two_epochs():
    with pytest.raises(UserError, match=r"window = 1: must be 0 \(off\) or at least 2"):
        train.check(tiny.tiny_config(early_stopping__window=1))


def test_what_is_no_checkpoint_does_not_hide_that_they_are_gone(tmp_path, monkeypatch):
    config = tiny.tiny_config(epochs=1)
    tiny.fit(config, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".DS_Store").write_text("")
    with pytest.raises(UserError, match="finished run, whose checkpoints are gone"):
        tiny.fit(config, tmp_path, monkeypatch)


def test_a_file_is_written_where_its_link_points_and_no_device_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.csv", tmp_path / "there" / "real.csv"
    target.write_text("old")
    link.symlink_to(target)
    run_folder.write_atomic(run_folder.check_target(link), "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["real.csv"]
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "no regular file"), ("/dev/null", "no regular file"),
                          (tmp_path / "there", "it is a folder"), (tmp_path / "a/b", "no folder")):
        with pytest.raises(UserError, match=message):
            run_folder.check_target(path)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_run_without_its_configuration_is_not_gone_on_with(content, tmp_path, monkeypatch):
    config = tiny.tiny_config(epochs=1)
    tiny.fit(config, tmp_path, monkeypatch)
    path = tmp_path / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="config.json cannot be read .*put it back or choose another"):
        tiny.fit(config, tmp_path, monkeypatch)
