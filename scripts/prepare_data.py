"""Prepare CIFAR-10 or CIFAR-100 as a TFDS folder, without TensorFlow.

python scripts/prepare_data.py --dataset cifar10                  # look around, else download
python scripts/prepare_data.py --dataset cifar100 --source ~/data/cifar-100-python
"""

import argparse
import sys
import time

from jaxcifar.data import load
from jaxcifar.data.prepare import prepare
from jaxcifar.errors import UserError


def main() -> int:
    """Parse the flags, prepare, load once; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=["cifar10", "cifar100", "shapes32"], default="cifar10")
    parser.add_argument("--source", default="auto",
                        help="auto, download, or the path of an archive, a folder or image folders")
    parser.add_argument("--data_dir", default="",
                        help="TFDS store (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    flags = parser.parse_args()
    start = time.perf_counter()
    try:
        folder = prepare(flags.dataset, flags.source, flags.data_dir, say=print)
        data = load(flags.dataset, flags.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{flags.dataset} is ready in {folder}: {len(data.train_labels):,} training and "
          f"{len(data.test_labels):,} test images, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
