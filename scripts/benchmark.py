"""Measure jaxcifar beside PyTorch: python scripts/benchmark.py --quick. Results are written after
each work (on a GPU: each contender), so that the same command with --resume goes on after a kill.
"""

import argparse
import pathlib
import signal
import sys

from jaxcifar.benchmark import driver
from jaxcifar.errors import UserError


def main():
    """Parse the flags, measure; return the exit code, None for success."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter list; CPU: ten minutes; GPU: six to nine")
    add("--work", default="", help="KIND:MODEL[@BATCH],...; kinds: step, epoch, eval, augment")
    add("--contenders", default="", help="of jaxcifar, jaxcifar_bf16, torch_eager, torch_best")
    add("--repeats", type=int, default=0, help="measurements of each (5; quick: 3, GPU: 2)")
    add("--batch", type=int, default=0, help="for --work without @BATCH (the model's usual one)")
    add("--epoch_steps", type=int, default=None, help="extrapolate epochs from so many; 0: whole")
    add("--threads", type=int, default=0, help="CPU cores for each contender (all)")
    add("--compiled", choices=("auto", "yes", "no"), default="auto", help="torch.compile tried?")
    add("--seconds", type=float, default=0.0, help="that one measurement should take (2; quick: 1)")
    add("--resume", action="store_true", help="keep what the result file has of this source")
    add("--limit", type=int, default=None, help="seconds to prepare, to measure (GPU: 300; CPU: 0)")
    add("--name", default="", help="results/benchmark_DEVICE_NAME.json (with --work: else none)")
    add("--out", default=pathlib.Path(__file__).resolve().parent.parent, help="folder of results/")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contenders end too
    try:
        return driver.run(**vars(parser.parse_args()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
