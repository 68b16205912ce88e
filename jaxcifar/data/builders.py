"""TFDS builders that write the datasets without TensorFlow, in TFDS's own layout and names.

TFDS's `cifar10` and `cifar100` builders need TensorFlow to read the binary files and to encode
images. These take uint8 arrays that are already in memory, and hand TFDS finished PNG files; the
result has the same folder, features, splits and record keys, so everything that reads TFDS folders
reads it. They are not registered with TFDS, so `tfds.builder("cifar10")` stays TFDS's own;
`shapes32` is new, and registered.

Importing this module imports tensorflow_datasets (half a second): do it only to write.
"""

import io
import types

import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from jaxcifar.data import shapes32
from jaxcifar.data.specs import IMAGE_SHAPE, SHAPES32, SPECS, SPLITS


class _ArrayBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Write `self.arrays`, a dict from split name to SplitArrays."""

    name = "arrays"
    VERSION = tfds.core.Version("1.0.0")
    arrays = None
    code_path = None  # TFDS would look beside this file for checksums of downloads; there are none

    def _info(self):
        spec = SPECS[self.name]
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=IMAGE_SHAPE),
            "label": tfds.features.ClassLabel(names=spec.class_names),
        }
        if spec.coarse_names:
            features["coarse_label"] = tfds.features.ClassLabel(names=spec.coarse_names)
        return tfds.core.DatasetInfo(
            builder=self,
            description=spec.description,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=spec.homepage,
        )

    def _split_arrays(self):
        return self.arrays

    def _split_generators(self, dl_manager):
        arrays = self._split_arrays()
        return {split: self._generate_examples(split, arrays[split]) for split in SPLITS}

    def _generate_examples(self, split, arrays):
        """Yield (index, example); TFDS shuffles by a hash of the index, as in its own builders."""
        # disable=None: no bar unless standard error is a terminal
        for i in tqdm(range(len(arrays.labels)), f"writing {split}", disable=None, leave=False):
            example = {
                "id": f"{split}_{i:05d}",
                "image": encode_png(arrays.images[i]),
                "label": int(arrays.labels[i]),
            }
            if arrays.coarse_labels is not None:
                example["coarse_label"] = int(arrays.coarse_labels[i])
            yield i, example


class Shapes32(_ArrayBuilder):
    """Draw and write shapes32; `tfds.builder("shapes32")` works once this module is imported."""

    name = SHAPES32.name
    VERSION = tfds.core.Version(SHAPES32.version)

    def _split_arrays(self):
        spec = SPECS[self.name]
        return self.arrays or {split: shapes32.generate(spec, split) for split in SPLITS}


def builder_of(spec):
    """Return the builder class of a dataset; CIFAR's write what TFDS's cifar10 and cifar100 are."""
    if spec.name == SHAPES32.name:
        return Shapes32
    fields = {"name": spec.name, "VERSION": tfds.core.Version(spec.version), "__module__": __name__}
    return types.new_class(spec.name.title(), (_ArrayBuilder,), {"skip_registration": True},
                           lambda namespace: namespace.update(fields))


def encode_png(image) -> bytes:
    """Return the PNG file of one image, uint8 [32, 32, 3]."""
    buffer = io.BytesIO()
    # Level 1: files are 2% larger than at the default level, and written a fifth faster.
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
