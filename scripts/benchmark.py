"""Measure jaxcifar beside PyTorch: python scripts/benchmark.py --quick. Results are written after
each work (on a GPU: each contender), so that the same command with --resume goes on after a kill.
"""

import pathlib
import signal
import sys

from jaxcifar import command


def main():
    """Parse the flags, measure; return the exit code."""
    parser, count = command.Parser(__doc__), command.at_least(0)
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter list; CPU: ten minutes; GPU: six to nine")
    add("--work", default="", help="KIND:MODEL[@BATCH],...; kinds: step, epoch, eval, augment")
    add("--contenders", default="", help="of jaxcifar, jaxcifar_bf16, torch_eager, torch_best")
    add("--repeats", type=count, default=0, help="measurements of each (5; quick: 3, GPU: 2)")
    add("--batch", type=count, default=0, help="for --work without @BATCH (the model's usual one)")
    add("--epoch_steps", type=count, help="extrapolate epochs from so many; 0: whole")
    add("--threads", type=count, default=0, help="CPU cores for each contender (all)")
    add("--compiled", choices=("auto", "yes", "no"), default="auto", help="torch.compile tried?")
    add("--seconds", type=command.at_least(0, float), default=0.0,
        help="that one measurement should take (2; quick: 1)")
    add("--resume", action="store_true", help="keep what the file has of this source and versions")
    add("--limit", type=count, help="seconds to prepare, to measure (GPU: 300; CPU: 0)")
    add("--name", default="", help="results/benchmark_DEVICE_NAME.json (with --work: else none)")
    add("--out", default=pathlib.Path(__file__).resolve().parent.parent, help="folder of results/")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contenders end too
    given = parser.parse_args()
    from jaxcifar.benchmark import driver  # here, so that Ctrl-C is caught meanwhile
    return command.run(lambda: driver.run(**vars(given)), (
        "the same command with --resume goes on" if given.name or not given.work else
        "nothing was written"))


if __name__ == "__main__":
    sys.exit(command.run(main))
