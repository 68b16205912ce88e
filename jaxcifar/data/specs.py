"""What each dataset must contain, and the check that arrays contain exactly that.

`SPECS` is the one table of names, counts, class names and checksums. Everything else in this
package takes a `DatasetSpec`, so that a hundred-image data set goes through the same code in the
tests.
"""

import dataclasses

import numpy as np

from jaxcifar.config import IMAGE_SHAPE
from jaxcifar.errors import UserError, unknown

SPLITS = ("train", "test")
SERVER = "https://www.cs.toronto.edu/~kriz/"
_MEAN_TOLERANCE = 2e-5  # the published means have five digits


class DataError(UserError):
    """Report data that is missing, damaged or not what its name says, in one line."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """Name one official archive: file name, md5 (hex), size in bytes, folder inside."""

    file_name: str
    md5: str
    num_bytes: int
    folder: str


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Describe one dataset: everything that is checked, and where its files are looked for.

    `class_names[i]` is the name of label i; `coarse_names` and `coarse_of_class` are the
    superclasses of CIFAR-100 (empty elsewhere). `mean` is the known training mean per channel, of
    pixels in [0, 1]. `generated`: this package draws the images itself. A data set without
    archives that is not generated is prepared from image folders.
    """

    name: str
    version: str
    class_names: tuple[str, ...]
    train_per_class: int
    test_per_class: int
    mean: tuple[float, float, float] | None = None
    coarse_names: tuple[str, ...] = ()
    coarse_of_class: tuple[int, ...] = ()
    generated: bool = False
    archives: tuple[Archive, ...] = ()
    train_files: tuple[str, ...] = ()  # of the python version; the binary one adds ".bin"
    test_files: tuple[str, ...] = ()
    server: str = SERVER
    description: str = ""
    homepage: str = ""

    def __post_init__(self):
        """Raise DataError for what no data set can have; lists of names become tuples."""
        if isinstance(self.class_names, str):
            raise DataError(f"DatasetSpec {self.name!r}: class_names = {self.class_names!r} is one text: "
                            "give a tuple of names")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if len(self.class_names) < 2 or min(self.train_per_class, self.test_per_class) < 1:
            raise DataError(f"DatasetSpec {self.name!r}: give two class_names or more, and at least one "
                            "image of each class in both splits (train_per_class, test_per_class)")
        if self.mean is not None and not all(0 <= value <= 1 for value in self.mean):
            raise DataError(f"DatasetSpec {self.name!r}: mean = {self.mean} is not of pixels in [0, 1]; "
                            "None leaves it unchecked")

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    def per_class(self, split: str) -> int:
        """Return the number of images of each class in `split` ("train" or "test")."""
        return {"train": self.train_per_class, "test": self.test_per_class}[split]

    def count(self, split: str) -> int:
        """Return the number of images in `split` ("train" or "test")."""
        return self.per_class(split) * self.num_classes


@dataclasses.dataclass(frozen=True)
class SplitArrays:
    """Hold one split: images uint8 [N, 32, 32, 3], labels and coarse_labels (or None) int32 [N]."""

    images: np.ndarray
    labels: np.ndarray
    coarse_labels: np.ndarray | None = None


def get_spec(name: str) -> DatasetSpec:
    """Return the spec of a dataset; DataError with the nearest name for an unknown one."""
    if name in SPECS:
        if SPECS[name].name != name:
            raise DataError(f"SPECS[{name!r}] of jaxcifar/data/specs.py has the name "
                            f"{SPECS[name].name!r}: give it that of its key")
        return SPECS[name]
    raise DataError(f"{unknown('dataset', name, SPECS)}; one of your own is a DatasetSpec in SPECS of "
                    "jaxcifar/data/specs.py")


def verify_split(spec: DatasetSpec, split: str, arrays: SplitArrays, origin: str) -> None:
    """Check count, shape, dtype, label range, images per class and the known training mean.

    `origin` names the file or folder in the message. Raises DataError.
    """
    count, images, labels = spec.count(split), arrays.images, arrays.labels
    if images.shape != (count, *IMAGE_SHAPE) or images.dtype != np.uint8:
        raise DataError(
            f"{origin}: the {split} split of {spec.name} must be {count:,} images, uint8 "
            f"[{count}, 32, 32, 3], but it is {images.dtype} {list(images.shape)}; "
            "get the complete data set again"
        )
    verify_labels(spec, split, labels, spec.class_names, origin)
    if spec.coarse_names:
        coarse = arrays.coarse_labels
        if coarse is None or not np.array_equal(coarse, np.asarray(spec.coarse_of_class)[labels]):
            raise DataError(
                f"{origin}: coarse labels of the {split} split of {spec.name} do not belong to "
                "the fine labels; get the data set again"
            )
    if split == "train" and spec.mean is not None:
        mean = images.mean(axis=(0, 1, 2), dtype=np.float64) / 255
        if np.abs(mean - spec.mean).max() > _MEAN_TOLERANCE:
            found, expected = (", ".join(f"{m:.5f}" for m in ms) for ms in (mean, spec.mean))
            raise DataError(
                f"{origin}: not the images of {spec.name}: the training mean is {found}, "
                f"expected {expected}; get the data set again"
            )


def verify_labels(spec, split, labels, class_names, origin) -> None:
    """Check labels int [N]: N, range and images per class. Raises DataError naming `origin`."""
    if tuple(class_names) != spec.class_names:
        raise DataError(
            f"{origin}: class names {', '.join(class_names[:3])}... are not those of {spec.name} "
            f"({', '.join(spec.class_names[:3])}...)"
        )
    if labels.shape != (spec.count(split),):
        raise DataError(
            f"{origin}: {labels.size:,} labels in the {split} split of {spec.name}, "
            f"expected {spec.count(split):,}; get the data set again"
        )
    if labels.min() < 0 or labels.max() >= spec.num_classes:
        raise DataError(
            f"{origin}: labels of the {split} split of {spec.name} lie in "
            f"[{labels.min()}, {labels.max()}], expected 0 to {spec.num_classes - 1}; "
            "get the data set again"
        )
    per_class = np.bincount(labels, minlength=spec.num_classes)
    if (per_class != spec.per_class(split)).any():
        worst = int(np.abs(per_class - spec.per_class(split)).argmax())
        raise DataError(
            f"{origin}: {per_class[worst]:,} {split} images of class {spec.class_names[worst]!r}, "
            f"expected {spec.per_class(split):,}; get the data set again"
        )


_CIFAR100_FINE_BY_COARSE = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
_COARSE_OF_NAME = {
    fine: coarse
    for coarse, names in enumerate(_CIFAR100_FINE_BY_COARSE.values())
    for fine in names.split()
}

_HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

CIFAR10 = DatasetSpec(
    name="cifar10",
    version="3.0.2",
    class_names=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    train_per_class=5000,
    test_per_class=1000,
    mean=(0.49140, 0.48216, 0.44653),
    archives=(
        Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071,
                "cifar-10-batches-py"),
        Archive("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171,
                "cifar-10-batches-bin"),
    ),
    train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test_files=("test_batch",),
    homepage=_HOMEPAGE,
    description="CIFAR-10: 60,000 colour images of 32x32 pixels in 10 classes, 50,000 of them for "
    "training and 10,000 for testing.",
)

CIFAR100 = DatasetSpec(
    name="cifar100",
    version="3.0.2",
    class_names=tuple(sorted(_COARSE_OF_NAME)),
    train_per_class=500,
    test_per_class=100,
    mean=(0.50708, 0.48655, 0.44092),
    coarse_names=tuple(_CIFAR100_FINE_BY_COARSE),
    coarse_of_class=tuple(_COARSE_OF_NAME[name] for name in sorted(_COARSE_OF_NAME)),
    archives=(
        Archive("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437,
                "cifar-100-python"),
        Archive("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733,
                "cifar-100-binary"),
    ),
    train_files=("train",),
    test_files=("test",),
    homepage=_HOMEPAGE,
    description="CIFAR-100: 60,000 colour images of 32x32 pixels in 100 classes, which form 20 "
    "superclasses; 500 training and 100 test images per class.",
)

SHAPES32 = DatasetSpec(
    name="shapes32",
    version="1.0.0",
    class_names=("circle", "ring", "square", "frame", "triangle", "star", "cross", "crescent",
                 "bar", "corner"),
    train_per_class=1000,
    test_per_class=200,
    generated=True,
    description="shapes32: ten shapes drawn by a program on 32x32 colour images, with random "
    "position, size, rotation, colours, background, distractors and noise.",
)

SPECS = {spec.name: spec for spec in (CIFAR10, CIFAR100, SHAPES32)}
