"""Train to 94% in seconds, N times.

    python -m jaxcifar.speedrun --config=configs/speedrun.py:94 --runs=50

One line per run, then mean and standard deviation, the seconds and the versions. --rival then
trains as many networks by the same algorithm in PyTorch, and prints both, and the ratio.
--out=results writes results/speedrun_94_DEVICE.json. --config.FIELD=VALUE changes a field, as in
jaxcifar.main. --profile trains none: it traces some steps and evaluation batches into
WORKDIR/profile, and prints their most expensive operations.
"""

import pathlib
import signal
import sys

from absl import app, flags

from jaxcifar import command
from jaxcifar import main as main_lib
from jaxcifar import overrides
from jaxcifar.errors import UserError

_RUNS = flags.DEFINE_integer("runs", 1, "Number of runs, with the seeds 0 to RUNS - 1.",
                             lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "Folder for NAME_DEVICE.json; none is written without.")
_RIVAL = flags.DEFINE_bool("rival", False, "Then do the same in PyTorch, and print the ratio.")
_RIVAL_COMPILE = flags.DEFINE_enum(
    "rival_compile", "auto", ("auto", "max-autotune", "reduce-overhead", "default", "off"),
    "Mode of the rival's torch.compile; auto: max-autotune as published, on CPU off.")
_OF_A_PROFILE = ("profile", "profile_steps", "workdir")
for _name in ("config", "list", "traceback", *_OF_A_PROFILE):
    flags.declare_key_flag(_name)


def main(argv):
    """Run `driver.run` or `profile.run` as the flags say, and return the exit code."""
    del argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the rival ends too
    given = flags.FLAGS
    kept = (f"the finished runs are in {_OUT.value}" if _OUT.value else
            "nothing was written" + ("" if given.profile else " (--out keeps each finished run)"))
    return command.run(lambda: _run(given), kept, traceback=given.traceback)


def _run(given):
    from jaxcifar.speedrun import driver, profile, training
    main_lib.refuse_flags_of_a_run(
        "in a speedrun, which takes --runs, --out and --rival, or --profile",
        but=_OF_A_PROFILE if given.profile else ())
    if _RIVAL_COMPILE.present and not _RIVAL.value:
        raise UserError("--rival_compile needs --rival")
    if given.profile:
        _refuse_flags_of_runs()
    training.check(given.config)
    if "epochs" in overrides.paths(sys.argv):
        raise UserError("a speedrun does not read config.epochs: set config.speedrun.epochs")
    workdir = main_lib.default_workdir(sys.argv)
    if given.profile:
        profile.run(given.config, given.workdir or workdir, given.profile_steps)
    else:
        driver.run(given.config, _RUNS.value, name=pathlib.Path(workdir).name, out=_OUT.value,
                   rival=_RIVAL.value, rival_compile=_RIVAL_COMPILE.value)


def _refuse_flags_of_runs():
    for flag in (_RUNS, _OUT, _RIVAL):
        if flag.present:
            raise UserError(f"--{flag.name} has no meaning with --profile, which trains no network")


if __name__ == "__main__":
    sys.exit(command.run(lambda: app.run(main, flags_parser=main_lib.parse)))
