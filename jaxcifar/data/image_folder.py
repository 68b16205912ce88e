"""Read a folder of class-named image folders: train/<class>/*.png and test/<class>/*.png."""

import pathlib

import numpy as np
from tqdm import tqdm

from jaxcifar.data import png_stream
from jaxcifar.data.specs import IMAGE_SHAPE, SPLITS, DataError, DatasetSpec, SplitArrays
from jaxcifar.errors import unknown

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"}
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")


def is_image_folder(path: pathlib.Path) -> bool:
    """Return whether `path` has the two split folders, train/ and test/."""
    return all((path / split).is_dir() for split in SPLITS)


def read_image_folder(spec: DatasetSpec, path: pathlib.Path) -> dict[str, SplitArrays]:
    """Read 32x32 images in folders named as the classes (in any case, with -, _ or a blank alike).

    The order is that of class, then file name. Returns {"train": SplitArrays, "test": SplitArrays};
    raises DataError naming the folder or file that does not fit.
    """
    return {split: _read_split(spec, split, path / split) for split in SPLITS}


def _read_split(spec, split, folder):
    files = []
    class_folders = {}
    known = {_plain(name): name for name in spec.class_names} | {n: n for n in spec.class_names}
    for child in sorted(p for p in folder.iterdir() if p.is_dir()):
        name = known.get(child.name) or known.get(_plain(child.name))
        if name is None:
            what = f"class of {spec.name} (the name of folder {child})"
            raise DataError(unknown(what, child.name, spec.class_names))
        class_folders[name] = child
    missing = [name for name in spec.class_names if name not in class_folders]
    if missing:
        raise DataError(f"{folder}: no folder for class {', '.join(missing[:4])}: expected one "
                        f"folder per class of {spec.name}")
    for label, name in enumerate(spec.class_names):
        paths = sorted(p for p in class_folders[name].iterdir()
                       if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
        if len(paths) != spec.per_class(split):
            raise DataError(f"{class_folders[name]}: {len(paths):,} images, expected "
                            f"{spec.per_class(split):,} for {spec.name}; complete the folder")
        files += [(label, p) for p in paths]
    images = np.empty((len(files), *IMAGE_SHAPE), np.uint8)
    for i, (_, p) in enumerate(tqdm(files, f"reading {split}", disable=None, leave=False)):
        images[i] = png_stream.read_image(p, _FORMATS)
    labels = np.array([label for label, _ in files], np.int32)
    coarse = np.asarray(spec.coarse_of_class, np.int32)[labels] if spec.coarse_names else None
    return SplitArrays(images, labels, coarse)


def _plain(name):
    return name.lower().replace("-", "_").replace(" ", "_")
