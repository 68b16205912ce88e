"""Prepare CIFAR-10 or CIFAR-100 as a TFDS folder, without TensorFlow.

python scripts/prepare_data.py --dataset cifar10                  # look around, else download
python scripts/prepare_data.py --dataset cifar100 --source ~/data/cifar-100-python
"""

import sys
import time

from jaxcifar import command


def main() -> int:
    """Parse the flags, prepare, load once; return the exit code."""
    parser = command.Parser(__doc__)
    parser.add_argument("--dataset", default="cifar10", help="cifar10, cifar100, or one of your own")
    parser.add_argument("--source", default="auto",
                        help="auto, download, or the path of an archive, a folder or image folders")
    parser.add_argument("--data_dir", "--data-dir", default="",
                        help="TFDS store (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    flags = parser.parse_args()
    from jaxcifar.data import load, prepare  # here, so that Ctrl-C is caught meanwhile
    start = time.perf_counter()
    folder = prepare.prepare(flags.dataset, flags.source, flags.data_dir, say=print)
    data = load(flags.dataset, flags.data_dir)
    print(f"{flags.dataset} is ready in {folder}: {len(data.train_labels):,} training and "
          f"{len(data.test_labels):,} test images, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, "the same command goes on"))
