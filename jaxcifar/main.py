"""Train one configuration:  python -m jaxcifar.main --config=configs/resnet5m.py --workdir=runs/NAME

Exit codes: 0 done, 1 the training failed, 2 a mistake in the command, the configuration, the data or
the folder, 130 or 143 stopped by SIGINT or SIGTERM with what it trained saved.
"""

import os
import pathlib
import runpy
import signal
import sys

from absl import app, flags, logging

from jaxcifar import errors, overrides

_CONFIG = overrides.define(
    "Configuration file, with a variant after a colon: configs/resnet5m.py:model2. "
    "--config.FIELD=VALUE changes a field of it; jaxcifar/config.py lists them all.")
flags.declare_key_flag("config")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; an interrupted one goes on. Default: runs/CONFIG[_VARIANT], of "
    "a search studies/CONFIG[_VARIANT].")
_SEEDS = flags.DEFINE_string(
    "seeds", "", "Run several seeds, such as 0,1,2 or 0-4, in WORKDIR/seedN; WORKDIR/seeds.json "
    "has mean and standard deviation of all that are finished there. Default WORKDIR: "
    "runs/CONFIG[_VARIANT]_seeds.")
_SEEDS_TOGETHER = flags.DEFINE_enum(
    "seeds_together", "auto", ("auto", "yes", "no"),
    "All seeds at once in one compiled program, one after the other, or what is faster.")
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Train no run: trace a few steps into WORKDIR/profile, and print the ten most "
    "expensive operations of a training step and of an evaluation batch.")
_PROFILE_STEPS = flags.DEFINE_integer("profile_steps", 10, "Number of training steps to trace.")
_LIST = flags.DEFINE_bool("list", False, "Print the variants of the configuration file, and exit.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of process 0, when several processes make up the run.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Number of this process, from 0.")

_OF_A_RUN = ("workdir", "seeds", "seeds_together", "profile", "profile_steps", "coordinator",
             "num_processes", "process_id")


class StopOnSignal:
    """Remember SIGTERM or SIGINT, so that the run can save its state; a second one ends it at once.

    Python hears of either when a compiled call is over: on a GPU, an epoch's (config.steps_per_call).
    """

    def __init__(self):
        self.signum = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._handle)

    def __call__(self):
        return self.signum

    def _handle(self, signum, _):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
        print("\nstopping: saving the state, after the steps or the compilation under way (once more to "
              "stop without)", file=sys.stderr)


def parse(argv):
    """Parse the flags; a mistake in them ends the program with one line and exit code 2."""
    _expand_home_of_config(argv)
    try:
        written = _read_config_file(argv)
        overrides.check(argv)
        rest = _parsed(argv)
        if len(rest) > 1:
            raise errors.UserError(f"unexpected argument {rest[1]!r}: a flag starts with --")
        _check_flags_together(argv)
        _expand_home()
        if _LIST.value:
            _list_variants(config_argument(argv).partition(":")[0])
        if dropped := overrides.settle(_CONFIG.value, written, argv):
            print(f"model {_CONFIG.value.model.name} in place of {written.model.name}: without the "
                  f"file's {', '.join(dropped)}", file=sys.stderr)
        _CONFIG.value.lock()
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        exit_with(f"unknown flag --{name}{overrides.hint(name) or errors.nearest(name, _names())}", 2)
    except (errors.UserError, flags.Error) as error:
        if "--traceback" in argv:
            raise
        exit_with(error, 2)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


def _parsed(argv):
    """Return what is left of argv; --help, which ends the program, with 0 (absl's is 1)."""
    try:
        return flags.FLAGS(argv)
    except SystemExit:
        sys.exit(0 if _asks_for_help(argv) else 1)


def refuse_flags_of_a_run(why, but=()):
    """Raise UserError for a given flag that says where and how a run trains; `why` it has no meaning.

    but: names of the flags that have one.
    """
    for name in _OF_A_RUN:
        if name not in but and flags.FLAGS[name].present:
            raise errors.UserError(f"--{name} has no meaning {why}")


def main(argv):
    """Run `train.fit`, `seeds.run` of several seeds or `profiling.run`; return the exit code."""
    try:
        _run()
    except errors.UserError as error:
        if _TRACEBACK.value:
            raise
        exit_with(error, error.exit_code)
    except KeyboardInterrupt:  # before StopOnSignal is there, and in a profile, which has none
        exit_with("\nstopped; nothing was trained", 130, "")
    return 0


def _run():
    from jaxcifar import parallel, profiling, seeds, train
    try:
        if _COORDINATOR.value:
            parallel.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        workdir = _WORKDIR.value or default_workdir(sys.argv)
        if _PROFILE.value:
            profiling.run(_CONFIG.value, workdir, _PROFILE_STEPS.value)
        elif _SEEDS.present:
            workdir = _WORKDIR.value or f"{workdir}_seeds"
            seeds.run(_CONFIG.value, seeds.parse(_SEEDS.value), workdir,
                      way=_SEEDS_TOGETHER.value, stop=StopOnSignal())
        else:
            train.fit(_CONFIG.value, workdir, stop=StopOnSignal())
    except train.Interrupted as error:
        exit_with(f"{error}; the same command goes on from here", 128 + error.signum, "")


def default_workdir(argv):
    """Return runs/NAME for the --config flag in argv: the file's name and its variant."""
    path, _, variant = config_argument(argv).partition(":")
    name = "_".join([pathlib.Path(path).stem, *variant.split("/")]).rstrip("_")
    return str(pathlib.Path("runs", name))


def _read_config_file(argv):
    """Return the configuration that --config names, before any field is changed; None for --help."""
    if _asks_for_help(argv):
        return None
    if len(given := _config_arguments(argv)) > 1:
        raise errors.UserError(f"--config is given {len(given)} times ({', '.join(given)}): a run has "
                               "one configuration file")
    value = config_argument(argv)
    if not value:
        given = f" ({argv[1]} is given)" if len(argv) > 1 else ""
        known = overrides.files()
        raise errors.UserError(f"--config is missing{given}: it names a configuration file"
                               + (f", one of {', '.join(known)}" if known else "")
                               + overrides.where_to_run())
    return overrides.read(value)


def _asks_for_help(argv):
    return any(word.lstrip("-") in ("help", "h", "helpfull", "helpshort") for word in argv)


def _check_flags_together(argv):
    """Raise UserError for flags that mean nothing without, or beside, others."""
    if _SEEDS_TOGETHER.present and not _SEEDS.present:
        raise errors.UserError("--seeds_together needs --seeds, such as --seeds=0-2")
    if _SEEDS.present and "seed" in overrides.paths(argv):
        raise errors.UserError("--seeds sets config.seed of every run: leave --config.seed out")
    if not _COORDINATOR.value and (_NUM_PROCESSES.value > 1 or _PROCESS_ID.value):
        raise errors.UserError("--num_processes and --process_id need --coordinator=HOST:PORT, the "
                               "address of process 0")
    if _PROFILE_STEPS.present and not _PROFILE.value:
        raise errors.UserError("--profile_steps needs --profile")
    if _PROFILE.value and _SEEDS.present:
        raise errors.UserError("--profile traces one run, --seeds asks for several: leave one out")


def _names():
    """Return the names of this program's own flags."""
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]


def _expand_home():
    """Put the home folder for "~" at the start of flags: the shell does not, after a "="."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, str) and value.startswith("~"):
            flags.FLAGS[name].value = os.path.expanduser(value)


def _expand_home_of_config(argv):
    """Do that for --config in argv, whose file is read as the flags are parsed."""
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("-config", "--config"):
            argv[i] = flag + equals + os.path.expanduser(value)


def _list_variants(path):
    """Print the variants of a configuration file, one per line, and exit."""
    variants = runpy.run_path(path).get("VARIANTS", ())
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for --list | head
    print("\n".join(variants) if variants else f"{path} has no variants",
          file=sys.stdout if variants else sys.stderr)
    sys.exit(0)


def config_argument(argv):
    """Return the value of --config in argv, or ""."""
    return next(iter(_config_arguments(argv)), "")


def _config_arguments(argv):
    found = []
    for i, word in enumerate(argv):
        name, _, value = word.lstrip("-").partition("=")
        if name == "config" and word.startswith("-"):
            found.append(value or "".join(argv[i + 1:i + 2]))
    return found


def exit_with(message, code, prefix="error: "):
    """Print one line on stderr and end the program with an exit code."""
    print(f"{prefix}{message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
