"""Datasets as arrays: `load(name, data_dir)`, `split_indices`, and `prepare` for official files.

specs       what each dataset must contain, and the check of it
dataset     load: prepared folder or cache -> Dataset; split_indices
cache       decoded uint8 arrays, memory-mapped
folders     where data lies; locks and temporary directories
store       TFDS folders, written and read without TensorFlow; builders: the TFDS builders
prepare     official archive, folder or images -> TFDS folder; official, image_folder, download
shapes32    the drawn dataset
png_stream  images to predict, read batch by batch
"""

from jaxcifar.data.dataset import Dataset, load, split_indices
from jaxcifar.data.specs import DataError

__all__ = ["DataError", "Dataset", "load", "split_indices"]
