"""A shared study: what processes leave, a storage that fails, passwords that no message shows."""

import pathlib

import pytest

from jaxcifar import study
from jaxcifar.errors import UserError
from jaxcifar.report import study as report
from jaxcifar.search_space import Float, Search

SEARCH = Search({"x": Float(0.0, 1.0)})


def opened(workdir, storage=""):
    """Open the study of these tests."""
    return study.Study(workdir, "study", SEARCH, {}, storage=storage)


def finish(workdir, limit, storage=""):
    """Let a process of its own end all that is left of a study; return [(number, kind, first)]."""
    with opened(workdir, storage) as shared:
        while trial := shared.take(limit):
            SEARCH.suggest(trial)
            shared.end(trial, "complete", value=1.0)
        return [(r["number"], r["kind"], r["retry_of"]) for r in shared.records()]


def test_two_machines_never_take_more_trials_than_asked_for(tmp_path, monkeypatch):
    storage = f"sqlite:///{tmp_path / 'both.db'}"
    with opened(tmp_path / "a", storage) as one, (
            opened(tmp_path / "b", storage)) as two:
        assert one.take(1) is not None
        assert two.take(1) is None
        real, answers = two._trials, [[]]
        # As if both had looked before either took one.
        monkeypatch.setattr(two, "_trials", lambda: answers.pop() if answers else real())
        monkeypatch.setattr(two, "_fail_lost", lambda retry_running: None)
        assert two.take(1) is None and not answers
        assert [r["number"] for r in two.records()] == [0], "the surplus one does not count"


@pytest.mark.parametrize(("error", "kind"), [(KeyboardInterrupt, "stopped"), (KeyError, "error")])
def test_a_process_that_leaves_early_leaves_no_trial_running(tmp_path, error, kind):
    with pytest.raises(error), opened(tmp_path) as left:
        left.take(2)
        raise error
    assert not list((tmp_path / "workers").glob("[!t]*"))
    assert finish(tmp_path, 2) == [(0, kind, None), (1, "complete", 0), (2, "complete", None)]


def test_a_retry_keeps_its_parameters_until_it_suggests_them(tmp_path):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as left:
        left.take(1).suggest_float("x", 0.0, 1.0)
        raise KeyboardInterrupt
    with opened(tmp_path) as left:
        assert left.take(1).number == 1
    finish(tmp_path, 1)
    with opened(tmp_path) as shared:
        records = shared.records()
    assert [r["kind"] for r in records] == ["stopped", "stopped", "complete"]
    assert len({r["params"]["x"] for r in records}) == 1


def break_storage(monkeypatch, storage, path):
    """Let a storage fail from now on."""
    if storage.startswith("journal:"):
        path.unlink()
        path.mkdir()
    else:
        from sqlalchemy.exc import OperationalError
        from sqlalchemy.orm import Session

        def commit(self):
            raise OperationalError("INSERT", {}, OSError("disk I/O error"))

        monkeypatch.setattr(Session, "commit", commit)


@pytest.mark.parametrize(("kind", "reason"), [
    ("journal", "Is a directory"), ("sqlite", "disk I/O error")])
def test_a_storage_that_fails_is_named_and_the_trial_is_tried_again(
        tmp_path, monkeypatch, kind, reason):
    path = tmp_path / "storage"
    storage = f"{kind}:{path}" if kind == "journal" else f"{kind}:///{path}"
    with monkeypatch.context() as patch:
        with pytest.raises(UserError, match=f"storage {storage} failed .*{reason}.*goes on"), (
                opened(tmp_path / "here", storage)) as shared:
            trial, before = shared.take(1), path.read_bytes()
            break_storage(patch, storage, path)
            shared.end(trial, "complete", value=1.0)
        if path.is_dir():
            path.rmdir()
            path.write_bytes(before)
    assert finish(tmp_path / "here", 1, storage) == [(0, "lost", None), (1, "complete", 0)]


def test_two_trials_that_a_killed_process_left_are_both_tried_again(tmp_path):
    killed = opened(tmp_path)
    killed.take(2), killed.take(2)
    killed._locks.close()  # as the operating system does
    assert [kind for _, kind, _ in finish(tmp_path, 2)] == ["lost"] * 2 + ["complete"] * 2


@pytest.mark.parametrize(("url", "shown"), [
    ("unknown://me:secret@host/db", "unknown://me:***@host/db"),
    ("unknown://me@server:secret@host", "unknown://me@server:***@host"),
    ("unknown://me:secret:p@rt@host/db", "unknown://me:***@host/db"),
    ("unknown://host/db?password=secret", "unknown://host/db?***"),
    ("unknown://host:1/db?password=secret@1", "unknown://***"),
    ("mysql://me:secret", "mysql://me:***"),
    ("me:secret@host/db", "me:***@host/db"),
    ("mysql://me@host:secret/db", "mysql://me@host:***"),
    ("unknown://me@host:33/db", "unknown://me@host:33/db")])
def test_no_message_shows_a_password(tmp_path, url, shown):
    with pytest.raises(UserError) as caught:
        opened(tmp_path, url)
    assert f"--storage={shown} cannot be opened" in str(caught.value)
    assert "secret" not in str(caught.value)
    told = str(study._failed(url, OSError(f"no access to {url.partition('://')[2] or url}")))
    assert f"storage {shown} failed" in told and "secret" not in told


def killed_before_it_tells(tmp_path, monkeypatch, kind, **options):
    """Return a Study whose process was killed between what it notes of a trial and its end."""
    class Killed(BaseException):
        pass

    killed = opened(tmp_path)
    trial = killed.take(1)
    SEARCH.suggest(trial)
    monkeypatch.setattr(killed._study, "tell", lambda *args, **options: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        killed.end(trial, kind, **options)
    return killed


def test_who_is_killed_while_a_trial_ends_leaves_it_one_successor(tmp_path, monkeypatch):
    killed = killed_before_it_tells(tmp_path, monkeypatch, "stopped")
    killed._locks.close()  # as the operating system does
    assert finish(tmp_path, 1) == [(0, "stopped", None), (1, "complete", 0)]


def test_a_trial_is_complete_when_its_value_is_there(tmp_path, monkeypatch):
    killed = killed_before_it_tells(tmp_path, monkeypatch, "complete", value=1.0)
    with opened(tmp_path) as other:  # while the first one is at work
        (record,) = other.records()
        assert record["kind"] == "running" and report.best([record], "minimize") is None
    killed._locks.close()
    assert finish(tmp_path, 1) == [(0, "lost", None), (1, "complete", 0)]


def test_a_lost_trial_does_not_count_as_one_that_diverged(tmp_path):
    lost = opened(tmp_path)
    SEARCH.suggest(lost.take(1))
    lost._locks.close()
    with opened(tmp_path) as shared:
        trial = shared.take(1)
        SEARCH.suggest(trial)
        assert shared.end(trial, "diverged")  # for the first time: another seed is tried
        trial = shared.take(1)
        assert trial.user_attrs["seed_shift"] == 1
        SEARCH.suggest(trial)
        assert not shared.end(trial, "diverged")
        assert [r["kind"] for r in shared.records()] == ["lost", "diverged", "diverged"]


def test_a_journal_in_a_relative_path_has_a_lock_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    with opened(tmp_path / "work", storage="journal:shared/study.log") as shared:
        backend = shared._study._storage._backend
        assert pathlib.Path(backend._file_path) == tmp_path / "shared" / "study.log"


def test_a_trial_whose_end_could_not_be_told_has_one_successor(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as shared:
        trial, tell = shared.take(1), shared._study.tell
        SEARCH.suggest(trial)

        def interrupted_once(*args, **options):
            monkeypatch.setattr(shared._study, "tell", tell)
            raise KeyboardInterrupt

        monkeypatch.setattr(shared._study, "tell", interrupted_once)
        shared.end(trial, "out_of_memory")
    assert [(kind, first) for _, kind, first in finish(tmp_path, 1)] == [
        ("stopped", None), ("complete", 0)]


def test_a_study_that_declared_less_is_gone_on_with(tmp_path):
    def opened_with(**declaration):
        return study.Study(tmp_path, "study", SEARCH, declaration)

    with opened_with(space="x"), opened_with(**{"space": "x", "training set": "0123abcd"}):
        pass
    with pytest.raises(UserError, match="training set: '0123abcd' there, '4567abcd' here"):
        opened_with(**{"space": "x", "training set": "4567abcd"})
