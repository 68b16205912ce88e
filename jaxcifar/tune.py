"""Search the hyperparameters that a configuration file declares (search_space()), with Optuna:

    python -m jaxcifar.tune --config=configs/se_resnet_search.py --workdir=studies/se --trials=20
    python -m jaxcifar.tune --config=configs/se_resnet_search.py --space        # prints the search

The same command goes on with the study until it has that many trials in all. The same command in
another shell takes part; other machines do with --storage (a database's URL, or journal:FILE on a
shared disk). WORKDIR then has study.json, study.csv, history.png, slices.png, importance.png,
trials/NNNN and best.py, the full recipe with the best trial's values, which jaxcifar.main trains
(best.py has the command; the run's folder is WORKDIR/best_trialN).
Default WORKDIR: studies/CONFIG[_VARIANT]. Exit codes are those of jaxcifar.main.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import pathlib
import runpy
import shlex
import shutil
import sys

import jax
from absl import app, flags

from jaxcifar import config as config_lib
from jaxcifar import host, init_from, overrides, parallel, programs, run_folder, saved, search_space
from jaxcifar import splits, study, train
from jaxcifar import main as main_lib
from jaxcifar.errors import UserError, first_line
from jaxcifar.report import study as report
from jaxcifar.run import refuse_other_config
from jaxcifar.task import create_task

_TRIALS = flags.DEFINE_integer(
    "trials", 0, "Trials of the study in all; 0: as many as the configuration file declares.",
    lower_bound=0)
_STORAGE = flags.DEFINE_string(
    "storage", "", "Where the study is kept: a database's URL (Optuna's RDB storage), or "
    "journal:FILE on a disk that all machines see. Default: sqlite:///WORKDIR/study.db.")
_STUDY = flags.DEFINE_string(
    "study", "", "Name of the study in its storage. Default: CONFIG[_VARIANT].")
_TRIAL = flags.DEFINE_multi_string(
    "trial", [], "FIELD=VALUE for every trial, in place of what the configuration file declares: "
    "--trial=epochs=2 --trial=dtype=float32. (--config.FIELD=VALUE is for the full recipe.)")
_SPACE = flags.DEFINE_bool("space", False, "Print what is searched, and exit.")
_RETRY_RUNNING = flags.DEFINE_bool(
    "retry_running", False, "Try anew what other machines left running; only when none is at work.")
for _name in ("config", "workdir", "list", "traceback"):
    flags.declare_key_flag(_name)

_SHAPES = 4  # whose compiled programs a process keeps
_REFUSED = 3  # if the first trials are all refused, so many, the space itself is wrong


def run(config, search, workdir, *, trials=0, storage="", name="study", retry_running=False,
        stop=lambda: 0, stream=None):
    """Search until the study has its trials, or take part in that; write what was found.

    Args:
      config: the full recipe. search: search_space.Search. workdir: folder of the study.
      trials: in all; 0 is search.trials. storage, name: see study.Study. retry_running: see
        study.Study.take. stop, stream: as `train.fit`.

    Returns:
      The content of study.json, a dict.

    Raises:
      UserError: a mistake in the configuration, the space, the storage, the data or the folder; or
        all trials were refused, or the first ones of this process all ran out of memory.
      Interrupted: the trial under way goes on the next time.
    """
    study.load_optuna()
    host.share_device_memory()  # with the other processes of the study
    config_lib.validate(config)
    search.check(config)
    train.configure_jax(config)
    parallel.create(config)
    digest = splits.load(config).digest  # what is wrong with devices or data is no trial's fault
    _check_trial_fields(config, search)
    workdir, limit = pathlib.Path(workdir), trials or search.trials
    run_folder.refuse_other_kind(workdir, "a search")

    def say(text):
        print(text, file=sys.stdout if stream is None else stream, flush=True)

    cache, declaration, ends = programs.Cache(_SHAPES), declared(config, search, digest), []
    with study.Study(workdir, name, search, declaration, storage=storage,
                     seed=config.seed) as shared:
        while not (signum := stop()) and (
                trial := shared.take(limit, retry_running=retry_running)):
            retry_running = False
            kind = _one(config, search, workdir, shared, trial, cache, stop, say)
            ends.append((kind, trial.user_attrs.get("first", trial.number)))
            content = _content(config, search, name, limit, shared)
            report.write(workdir, content)
            _refuse_space(content["trials"], _REFUSED)
            _refuse_full_device(ends)
        if signum:
            raise train.Interrupted(signum)
        return _conclude(config, search, name, limit, shared, workdir, say)


def declared(config, search, digest):
    """Return what all who take part in a study must have alike, {entry: text}.

    digest: of the training set in its order, which decides the split, see splits.Arrays.
    """
    fields = config_lib.effective(config_lib.flatten(config_lib.to_dict(config)))
    return {**search.to_dict(), "training set": digest,
            **{f"config.{path}": repr(value) for path, value in fields.items()}}


def load_search(specification):
    """Return the Search that a configuration file, "FILE.py[:VARIANT]", declares.

    Raises:
      UserError: it declares none, or is wrong: the message has the line.
    """
    path, _, variant = specification.partition(":")
    with overrides.explaining(path):
        declare = runpy.run_path(path).get("search_space")
        if not callable(declare):
            raise UserError(f"{path} declares no search: add a function search_space() that returns "
                            "a Search, as configs/se_resnet_search.py does "
                            "(jaxcifar/search_space.py)")
        search = declare(variant) if variant and inspect.signature(declare).parameters else declare()
    if not isinstance(search, search_space.Search):
        raise UserError(f"search_space() of {path} returns {type(search).__name__}, and must "
                        "return a jaxcifar.search_space.Search")
    return search


def _one(config, search, workdir, shared, trial, cache, stop, say):
    """Run a trial to its end, record and return its kind; whatever happens, it does not stay running."""
    value = folder = None
    first = trial.user_attrs.get("first")
    retry = "" if first is None else f" (once more trial {first})"
    try:
        params = search.suggest(trial)
        say(f"trial {trial.number}{retry}: {_params_text(params)}")
        trial_config = on_these_devices(search.trial_config(config, params))
        trial_config.seed += trial.user_attrs.get("seed_shift", 0)
        folder = _folder(trial, workdir, trial_config)
        kind, reason = "complete", _refusal(trial_config)
        if reason:
            kind = "refused"
        else:
            value = _fit(trial_config, search, folder, trial, cache, stop, say)
    except _Pruned as pruned:
        kind, reason = "pruned", str(pruned)
    except train.NonFiniteLoss as error:
        kind, reason = "diverged", str(error)
    except train.Interrupted as error:
        shared.end(trial, "stopped", reason=str(error))
        raise
    except Exception as error:
        reason = first_line(error)
        if not _is_out_of_memory(error):
            shared.end(trial, "error", reason=reason)
            raise
        kind = "out_of_memory"
        cache.clear()
    again = shared.end(trial, kind, value=value, reason=reason)
    if folder and not (again and kind == "out_of_memory"):  # whose next try may be in the folder
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    measured = f"{search.objective} {value:.6g}" if kind == "complete" else f"{kind}, {reason}"
    say(f"trial {trial.number}: {measured}{'; to be tried once more' if again else ''}")
    return kind


def on_these_devices(config):
    """Return a trial's configuration for as many devices of this machine as its batches allow.

    The number of devices changes no result, so a study is the same on all machines that share it.
    """
    if config.bn_sync != "global":
        return config
    config = config.copy_and_resolve_references()
    most = config.num_devices or jax.device_count()
    config.num_devices = next(count for count in range(most, 0, -1) if not (
        config.batch_size % count or config.eval_batch_size % count))
    return config


class _Pruned(Exception):
    """The pruner ends the trial."""


def _folder(trial, workdir, config):
    """Return the folder of a trial; a retry with the same seed goes on in its predecessor's.

    What another study left in `workdir` keeps its folders.
    """
    first = f"{trial.user_attrs.get('first', trial.number):04d}"
    if trial.user_attrs.get("seed_shift", 0):
        first += f"_seed{config.seed}"
    names = itertools.chain([first], (f"{first}_{count}" for count in itertools.count(2)))
    name = next(n for n in names if not _is_of_another(workdir / "trials" / n, config))
    for key, value in (("folder", f"trials/{name}"), ("seed", config.seed),
                       ("config_hash", config_lib.config_hash(config))):
        trial.set_user_attr(key, value)
    return workdir / "trials" / name


def _is_of_another(folder, config):
    """Return whether a folder holds a run that a trial of this configuration cannot go on with."""
    try:
        refuse_other_config(config, folder)
    except UserError:
        return True
    return run_folder.is_held(folder) or run_folder.has_lost_checkpoints(folder)


def with_trial_fields(search, words):
    """Return a Search whose trials have other fields: words such as "epochs=2".

    Raises:
      UserError: a word is no such thing.
    """
    fields = {}
    for word in words:
        path, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--trial={word}: write --trial=FIELD=VALUE, such as --trial=epochs=2")
        try:
            fields[path] = json.loads(value)
        except ValueError:
            fields[path] = value  # a string needs no quotes
    return dataclasses.replace(search, trial=search.trial | fields)


def _refusal(config):
    """Return why a configuration cannot be trained, whenever it is tried, or ""."""
    try:
        train.check(config)
        parallel.create(config)
        arrays = splits.load(config)
        task = create_task(config, len(arrays.train["labels"]), arrays.num_classes)
        if config.init_from:  # whose weights may fit some models of the space only
            init_from.start(task, saved.template(task))
    except UserError as error:
        return str(error)
    return ""


def _check_trial_fields(config, search):
    """Raise UserError where the recipe can be trained, but not with the fields of every trial.

    Found out before the study is there, whose declaration holds them. A recipe that cannot be
    trained itself may be mended by the space.
    """
    reason = _refusal(on_these_devices(search.trial_config(config)))
    if reason and not _refusal(config):
        fields = search.to_dict()["every trial"]
        raise UserError(f"with the fields of every trial ({fields}) nothing can be trained: {reason}; "
                        "mend --trial, or `trial` of search_space()")


def _fit(config, search, folder, trial, cache, stop, say):
    """Train a trial, report every epoch to the pruner, and return the objective.

    Raises:
      _Pruned, and what `train.fit` raises.
    """
    def after_epoch(row, said=say):
        value, epoch = row[search.objective], row["epoch"]
        if value is None or not math.isfinite(value):
            raise train.NonFiniteLoss(f"{search.objective} is not finite after epoch {epoch}")
        if epoch not in values:
            trial.report(value, epoch)
        values[epoch] = value
        said(f"  epoch {epoch}/{config.epochs}  {search.objective} {value:.6g}")
        if epoch < config.epochs and trial.should_prune():
            raise _Pruned(f"worse than others after epoch {epoch}")

    values, rows = {}, []
    with contextlib.suppress(UserError):  # `fit` says what is wrong with the folder
        rows = run_folder.read_rows(folder)
    for row in rows:  # of an interrupted trial that goes on here
        after_epoch(row, lambda text: None)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        train.fit(config, folder, stop=stop, stream=log, cache=cache, after_epoch=after_epoch)
    return search.value([values[epoch] for epoch in sorted(values)])


def _refuse_space(records, count):
    """Raise UserError where there are `count` trials, all refused: then every one would be."""
    if count and len(records) == count and all(r["kind"] == "refused" for r in records):
        trials = "the one trial was" if count == 1 else f"all {count} trials were"
        raise UserError(f"{trials} refused, the last one since {records[-1]['reason']}; mend the "
                        "recipe, search_space() or --trial, and take another --workdir")


def _refuse_full_device(ends):
    """Raise UserError where all that this process tried ran out of memory, of two chains or more.

    ends: (kind, first trial of its chain) of each trial.
    """
    kinds, chains = map(set, zip(*ends, strict=True))
    if kinds == {"out_of_memory"} and len(chains) > 1:
        raise UserError("all trials of this process ran out of memory, and more would be lost to the "
                        "study: see whether another process holds the device; then the same command "
                        "goes on")


def _content(config, search, name, limit, shared):
    records = shared.records()
    return {"name": name, "dataset": config.dataset, "trials_wanted": limit,
            "objective": search.objective, "direction": search.direction,
            "search": search.to_dict(), "config_hash": config_lib.config_hash(config),
            "best": report.best(records, search.direction),
            "importances": shared.importances(), "trials": records}


def _conclude(config, search, name, limit, shared, workdir, say):
    """Write tables, plots and best.py; say what was found. Returns the content of study.json."""
    content = _content(config, search, name, limit, shared)
    report.write(workdir, content)
    report.write_plots(workdir, content["trials"], search, content["importances"], name)
    best, kinds = content["best"], [record["kind"] for record in content["trials"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind.replace('_', ' ')}"
                       for kind in dict.fromkeys(kinds))
    say(f"study {name}: {counts}")
    _refuse_space(content["trials"], len(kinds))
    if best is None:
        say(f"no trial is complete; see {workdir / 'study.csv'}")
        return content
    path = workdir / "best.py"
    # Not main's default, runs/best, which would be that of every study.
    command = shlex.join(["python", "-m", "jaxcifar.main", f"--config={path}",
                          f"--workdir={workdir / 'best_trial'}{best['number']}"])
    doc = (f"The best of {kinds.count('complete')} complete trials of the study {name}: trial "
           f"{best['number']}.\n\n    {command}\n\n"
           f"Its {search.objective} was {best['value']:.6g} after {len(best['epochs'])} epoch(s). "
           "This is the full recipe with its values.")
    run_folder.write_atomic(
        path, report.config_source(search.full_config(config, best["params"]), doc))
    say(f"best: trial {best['number']}, {search.objective} {best['value']:.6g}: "
        f"{_params_text(best['params'])}\ntrain it: {command}")
    return content


def _is_out_of_memory(error):
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def _params_text(params):
    return ", ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                     for name, value in params.items())


def main(argv):
    """Run a search as the flags say, and return the exit code."""
    del argv
    given = flags.FLAGS
    try:
        main_lib.refuse_flags_of_a_run(
            "in a search, which processes and machines share by --storage", but=("workdir",))
        search = with_trial_fields(load_search(main_lib.config_argument(sys.argv)), _TRIAL.value)
        if _SPACE.value:
            search.check(given.config)
            width = max(map(len, search.to_dict()))
            print("\n".join(f"{k:<{width}}  {v}" for k, v in search.to_dict().items()))
            print(f"{'trials':<{width}}  {_TRIALS.value or search.trials}")
            return 0
        name = pathlib.Path(main_lib.default_workdir(sys.argv)).name
        run(given.config, search, given.workdir or pathlib.Path("studies", name),
            trials=_TRIALS.value, storage=_STORAGE.value, name=_STUDY.value or name,
            retry_running=_RETRY_RUNNING.value, stop=main_lib.StopOnSignal())
    except UserError as error:
        if given.traceback:
            raise
        main_lib.exit_with(error, error.exit_code)
    except train.Interrupted as error:
        main_lib.exit_with(f"{error}; the same command goes on from here", 128 + error.signum, "")
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=main_lib.parse)
