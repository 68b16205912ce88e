"""Train one configuration:  python -m jaxcifar.main --config=configs/resnet5m.py --workdir=runs/NAME"""

import os
import pathlib
import signal
import sys

from absl import app, flags
from ml_collections import config_flags

from jaxcifar import errors

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with a variant after a colon: configs/resnet5m.py:model2.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; an interrupted one is resumed. Default: runs/CONFIG[_VARIANT].")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of process 0, when several processes make up the run.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Number of this process, from 0.")
flags.mark_flag_as_required("config")


class StopOnSignal:
    """Remember SIGTERM or SIGINT, so that the run can save its state; a second one ends it at once."""

    def __init__(self):
        self.signum = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._handle)

    def __call__(self):
        return self.signum

    def _handle(self, signum, _):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
        print("\nstopping: saving the state (once more to stop without)", file=sys.stderr)


def default_workdir(argv):
    """Return runs/NAME for the --config flag in argv: the file's name and its variant."""
    value = next(a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config="))
    path, _, variant = value.partition(":")
    return "runs/" + "_".join([pathlib.Path(path).stem, *variant.split("/")]).rstrip("_")


def main(argv):
    """Run `train.fit` and return the exit code: 0, 2 (usage), 1 (training failed), 128 + signal."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = _CONFIG.value
    if config.get("deterministic"):
        # Read once, when the backend starts.
        os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                                   + " --xla_gpu_deterministic_ops=true").strip()
    from jaxcifar import parallel, train
    try:
        if _COORDINATOR.value:
            parallel.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        train.fit(config, _WORKDIR.value or default_workdir(sys.argv), stop=StopOnSignal())
    except errors.UserError as error:
        if _TRACEBACK.value:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except train.Interrupted as error:
        print(f"{error}; start the same command again to go on", file=sys.stderr)
        return 128 + error.signum
    return 0


if __name__ == "__main__":
    app.run(main)
