"""An Optuna study that several processes and machines share: trials taken, ended, tried once more.

A trial and its retries are a chain, and a study of n trials has n chains. Every process at work
holds a lock on WORKDIR/workers/ID; the operating system drops it when the process ends, however it
ends, and what a process left running is then seen to be lost.
"""

import contextlib
import math
import pathlib
import re
import urllib.parse
import uuid
import warnings

import numpy as np

from jaxcifar import run_folder
from jaxcifar.errors import UserError, first_line, unknown

# How a trial ends: its kind, and Optuna's state. Optuna's TPE learns from COMPLETE and PRUNED, so
# what the parameters are to blame for is PRUNED, and FAIL is what may go better the next time.
_STATES = {"complete": "COMPLETE", "pruned": "PRUNED", "refused": "PRUNED", "diverged": "FAIL",
           "out_of_memory": "FAIL", "error": "FAIL", "stopped": "FAIL"}
_MOST_FAILURES = 1  # after so many, a chain is not tried again (divergence counts apart)
_ADDED = ("training set",)  # entries of a declaration that older studies lack
_LOCK_SECONDS = 60  # SQLite waits so long for another process's write


def load_optuna():
    """Return the module optuna, silenced below warnings; UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search needs Optuna, which is not installed: "
                        "pip install -e '.[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Study:
    """A study, and this process's part in it.

    A context manager: leaving it ends that part. A trial that it leaves running is ended, to be
    tried again, and a storage that failed is a UserError.
    """

    def __init__(self, workdir, name, search, declaration, *, storage="", seed=0):
        """Open a study, or create it.

        Args:
          workdir: Path of this machine's folder. name: of the study in its storage. search:
            search_space.Search. declaration: {entry: text}, what must be alike for all who take
            part. storage: Optuna's RDB URL, "journal:FILE", or "" for WORKDIR/study.db.
          seed: of the sampler.

        Raises:
          UserError: no Optuna, no such storage, or the study was declared otherwise.
        """
        self._optuna, self._workdir, self._seed = load_optuna(), pathlib.Path(workdir), seed
        self._url = storage or f"sqlite:///{self._workdir / 'study.db'}"
        self._errors = _storage_errors(self._optuna)
        self._worker = uuid.uuid4().hex[:12]
        self._running = {}  # {number: Trial}, what this process took and has not ended
        self._locks = contextlib.ExitStack()
        with run_folder.writing(self._workdir):
            (self._workdir / "workers").mkdir(parents=True, exist_ok=True)
        with self._alone():  # two processes must not both create the tables
            backend = _storage(self._optuna, self._url)
            try:
                self._open(backend, name, search, declaration)
            except self._errors as error:
                raise _failed(self._url, error) from error
        self._locks.enter_context(_locked(self._worker_file(self._worker)))

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        ended = False
        try:
            with contextlib.suppress(*self._errors):
                self._end_running(error)
                ended = True
        finally:
            self._locks.close()
        if ended:  # else the file tells the next process here that the trial is lost
            self._worker_file(self._worker).unlink(missing_ok=True)
        if isinstance(error, self._errors):
            raise _failed(self._url, error) from error

    def take(self, limit, *, retry_running=False):
        """Return the next Trial of a study of `limit` trials, or None where none is left to take.

        A lost trial is failed, and taken anew if that is its first failure. retry_running: so is
        every trial that a process of another WORKDIR left running.
        """
        with self._alone():
            self._fail_lost(retry_running)
            trials = self._trials()
            waiting = any(t.state.name == "WAITING" for t in trials)
            if not waiting and len(_originals(trials)) >= limit:
                return None
            trial = self._study.ask()
            self._running[trial.number] = trial
            trial.set_user_attr("worker", self._worker)
        first = trial.user_attrs.get("first", trial.number)
        before = sum(t.number < first for t in _originals(self._trials()))
        if first == trial.number and before >= limit:  # another machine took the last one just now
            trial.set_user_attr("kind", "surplus")
            del self._running[trial.number]  # it counts for nothing, whatever becomes of it
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return None
        # From (seed, place among first trials): as if the study had never been interrupted.
        entropy = np.random.SeedSequence((self._seed, before)).generate_state(1)[0]
        self._study.sampler = self._optuna.samplers.TPESampler(seed=int(entropy))
        return trial

    def end(self, trial, kind, *, value=None, reason=""):
        """End a Trial; try it once more if it failed for the first time, or was only stopped.

        kind: "complete", with its value; "pruned"; "refused", by its configuration's check;
        "diverged", "out_of_memory", "error", "stopped". reason: for the reader, str.
        Returns whether it is tried again.
        """
        failures = trial.user_attrs.get("failures", 0)
        seed_shift = trial.user_attrs.get("seed_shift", 0)
        state = _STATES[kind]
        again = state == "FAIL" and (kind == "stopped" or failures < _MOST_FAILURES)
        if kind == "diverged":
            again = not seed_shift
            state = "FAIL" if again else "PRUNED"  # from two seeds: the parameters are to blame
        trial.set_user_attr("kind", kind)
        trial.set_user_attr("reason", reason)
        # Before its end is told: who is killed in between leaves no chain without its end.
        if again and not self._has_successor(trial):
            self._enqueue(trial, failures + (kind not in ("stopped", "diverged")),
                          seed_shift + (kind == "diverged"))
        self._study.tell(trial, value, state=self._optuna.trial.TrialState[state])
        self._running.pop(trial.number, None)
        return again

    def records(self):
        """Return the trials as dicts fit for JSON, in the order of their numbers."""
        return [_record(t) for t in self._trials() if t.user_attrs.get("kind") != "surplus"]

    def importances(self):
        """Return {parameter: share of the importance} by PED-ANOVA, {} where trials are too few."""
        values = {t.value for t in self._trials() if t.state.name == "COMPLETE"}
        if len(values) < 4:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says of every small study that it is small
            try:
                return self._optuna.importance.get_param_importances(
                    self._study, evaluator=self._optuna.importance.PedAnovaImportanceEvaluator())
            except (ValueError, RuntimeError, ImportError):
                return {}

    def _trials(self):
        return self._study.get_trials(deepcopy=False)

    def _open(self, backend, name, search, declaration):
        """Load the study from Optuna's storage, or create it; UserError: it is another one."""
        self._study = self._optuna.create_study(
            storage=backend, study_name=name, direction=search.direction,
            pruner=_pruner(self._optuna, search), load_if_exists=True)
        there = self._study.user_attrs.get("declaration")
        if there is None or there == {k: v for k, v in declaration.items() if k not in _ADDED}:
            self._study.set_user_attr("declaration", declaration)
        elif there != declaration:
            raise UserError(_otherwise(name, declaration, there))

    def _enqueue(self, trial, failures, seed_shift):
        first = trial.user_attrs.get("first", trial.number)
        there = next(t for t in self._trials() if t.number == trial.number)
        self._study.enqueue_trial(_params(there), user_attrs={
            "first": first, "failures": failures, "seed_shift": seed_shift})

    def _end_running(self, error):
        """End what this process has not ended: as failed by an error, else as stopped."""
        if not self._running:
            return
        states = {t.number: t.state.name for t in self._trials()}
        kind = "error" if isinstance(error, Exception) else "stopped"
        reason = first_line(error) if error else "left before its end"
        for number, trial in list(self._running.items()):
            if states[number] == "RUNNING":  # another machine may have failed it: retry_running
                self.end(trial, kind, reason=reason)

    def _fail_lost(self, retry_running):
        ended = set()
        for trial in self._trials():
            worker = trial.user_attrs.get("worker")
            if trial.state.name != "RUNNING" or worker == self._worker:
                continue
            path = self._worker_file(worker) if worker else None
            here = path is not None and path.exists()
            lost = not run_folder.is_locked(path, unknown=True) if here else retry_running
            if lost:
                failures = trial.user_attrs.get("failures", 0)
                if failures < _MOST_FAILURES and not self._has_successor(trial):
                    self._enqueue(trial, failures + 1, trial.user_attrs.get("seed_shift", 0))
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
                if here:
                    ended.add(path)
        for path in ended:  # last, since a process may have left several trials
            path.unlink(missing_ok=True)

    def _has_successor(self, trial):
        """Return whether the next trial of a trial's chain is there."""
        first = trial.user_attrs.get("first", trial.number)
        return any(t.user_attrs.get("first") == first and t.number > trial.number
                   for t in self._trials())

    def _alone(self):
        """Keep the other processes of this WORKDIR from opening or taking meanwhile."""
        return _locked(self._workdir / "workers" / "turn")

    def _worker_file(self, worker):
        return self._workdir / "workers" / worker


def _originals(trials):
    """Return the first trial of every chain."""
    return [t for t in trials
            if "first" not in t.user_attrs and t.user_attrs.get("kind") != "surplus"]


def _record(trial):
    attrs, state = trial.user_attrs, trial.state.name
    ends = {"RUNNING": "running", "WAITING": "waiting", "FAIL": "lost"}
    kind = attrs.get("kind")
    # `end` notes the kind before it tells the end: another process may look, or this one be killed.
    lost = state == "FAIL" and _STATES.get(kind) != "FAIL"
    if kind is None or state == "RUNNING" or lost:
        kind = ends.get(state, state.lower())
    values = {epoch: value for epoch, value in sorted(trial.intermediate_values.items())
              if math.isfinite(value)}
    return {
        "number": trial.number, "kind": kind, "value": trial.value if kind == "complete" else None,
        "reason": attrs.get("reason") or ("its process ended" if kind == "lost" else ""),
        "retry_of": attrs.get("first"), "folder": attrs.get("folder"),
        "config_hash": attrs.get("config_hash"), "seed": attrs.get("seed"),
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "params": _params(trial), "epochs": values}


def _params(trial):
    """Return a trial's parameters; those of a retry are known before it suggests them."""
    return trial.system_attrs.get("fixed_params", {}) | trial.params


def _storage(optuna, url):
    """Return Optuna's storage for a URL, see Study."""
    try:
        if url.startswith("journal:"):
            return optuna.storages.JournalStorage(_journal(optuna, url.removeprefix("journal:")))
        options = {"connect_args": {"timeout": _LOCK_SECONDS}} if url.startswith("sqlite:") else {}
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except (*_storage_errors(optuna), ImportError, OSError, RuntimeError, ValueError) as error:
        url, reason = _without_secrets(url, error)
        raise UserError(f"--storage={url} cannot be opened ({reason}): give journal:FILE, or a URL "
                        "such as sqlite:///FILE or mysql://USER@HOST/DATABASE whose driver is "
                        "installed") from error


def _journal(optuna, path):
    """Return Optuna's journal in a file, where what goes wrong with the file is a storage error."""
    class Journal(optuna.storages.journal.JournalFileBackend):
        def read_logs(self, log_number_from):
            with failing():
                yield from super().read_logs(log_number_from)

        def append_logs(self, logs):
            with failing():
                super().append_logs(logs)

    @contextlib.contextmanager
    def failing():
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise optuna.exceptions.StorageInternalError(str(error)) from error

    # In full: Optuna's lock beside it is a link to the path as it is given.
    return Journal(str(pathlib.Path(path).expanduser().absolute()))


def _storage_errors(optuna):
    """Return the exceptions of a storage that was opened."""
    from sqlalchemy.exc import SQLAlchemyError
    return optuna.exceptions.StorageInternalError, SQLAlchemyError


def _failed(url, error):
    """Return the UserError for a storage error; Optuna's own words say less than their cause."""
    url, reason = _without_secrets(url, error.__cause__ or error)
    return UserError(f"the study's storage {url} failed ({reason}): see that it can be reached and "
                     "written; then the same command goes on from here")


def _without_secrets(url, error):
    """Return (a storage's URL, an error's first line), with *** for the URL's password and options.

    A driver may name a part of a password that is not quoted: every word of it is masked.
    """
    shown, hidden = _masked(url)
    words = set(re.split(r"\W+", f"{hidden} {urllib.parse.unquote(hidden)}"))
    return shown, re.sub(r"\w+", lambda found: "***" if found[0] in words else found[0],
                         first_line(error))


def _masked(url):
    """Return (a URL that may be a wrong one with *** for its secrets, what is hidden so)."""
    if url.startswith(("journal:", "sqlite:")):  # a file has none
        return url, ""
    base, mark, options = url.partition("?")
    if "@" in options:  # then the "?" may be the password's
        scheme, mark, hidden = url.partition("://")
        return (f"{scheme}://***", hidden) if mark else ("***", url)
    user = re.match(r"(?:[\w+]+://)?+[^:]*", base)[0]
    password, at, host = base[len(user):].rpartition("@")
    if not at and not re.fullmatch(r":\d*(/.*)?", host):  # neither a host nor its port
        password, host = host, ""
    shown = f"{user}{':***' if password else ''}{at}{host}{mark}{'***' if options else ''}"
    return shown, f"{password} {options}"


def _pruner(optuna, search):
    makers = {"median": optuna.pruners.MedianPruner, "none": optuna.pruners.NopPruner,
              "halving": optuna.pruners.SuccessiveHalvingPruner}
    try:
        return makers[search.pruner](**search.pruner_options)
    except KeyError as error:
        raise UserError(unknown("pruner of search_space", search.pruner, makers)) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"search_space: pruner {search.pruner!r}: {error}") from error


def _otherwise(name, ours, theirs):
    lines = [f"{entry}: {theirs.get(entry, 'absent')!r} there, {ours.get(entry, 'absent')!r} here"
             for entry in sorted({*ours, *theirs}) if ours.get(entry) != theirs.get(entry)]
    return (f"the storage holds a study '{name}' that was declared otherwise ({'; '.join(lines)}): "
            "choose another --workdir or --study, or the same configuration to go on")


@contextlib.contextmanager
def _locked(path):
    """Hold an exclusive lock on a file, which is created; wait for it. See run_folder.lock."""
    with run_folder.writing(path):
        file = path.open("ab")
    with file:
        run_folder.lock(file, wait=True)
        yield
