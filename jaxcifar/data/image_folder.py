"""Read a folder of class-named image folders: train/<class>/*.png and test/<class>/*.png."""

import pathlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxcifar.data.specs import IMAGE_SHAPE, SPLITS, DataError, DatasetSpec, SplitArrays
from jaxcifar.errors import first_line
from jaxcifar.errors import unknown

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"}


def is_image_folder(path: pathlib.Path) -> bool:
    """Return whether `path` has the two split folders, train/ and test/."""
    return all((path / split).is_dir() for split in SPLITS)


def read_image_folder(spec: DatasetSpec, path: pathlib.Path) -> dict[str, SplitArrays]:
    """Read 32x32 images in folders named as the official classes (any case, - or blank for _).

    The order is that of class, then file name. Returns {"train": SplitArrays, "test": SplitArrays};
    raises DataError naming the folder or file that does not fit.
    """
    return {split: _read_split(spec, split, path / split) for split in SPLITS}


def _read_split(spec, split, folder):
    files = []
    class_folders = {}
    for child in sorted(p for p in folder.iterdir() if p.is_dir()):
        name = child.name.lower().replace("-", "_").replace(" ", "_")
        if name not in spec.class_names:
            what = f"class of {spec.name} (the name of folder {child})"
            raise DataError(unknown(what, name, spec.class_names))
        class_folders[name] = child
    missing = [name for name in spec.class_names if name not in class_folders]
    if missing:
        raise DataError(f"{folder}: no folder for class {', '.join(missing[:4])}: expected one "
                        f"folder per class of {spec.name}")
    for label, name in enumerate(spec.class_names):
        paths = sorted(p for p in class_folders[name].iterdir() if p.suffix.lower() in _SUFFIXES)
        if len(paths) != spec.per_class(split):
            raise DataError(f"{class_folders[name]}: {len(paths):,} images, expected "
                            f"{spec.per_class(split):,} for {spec.name}; complete the folder")
        files += [(label, p) for p in paths]
    images = np.empty((len(files), *IMAGE_SHAPE), np.uint8)
    for i, (_, p) in enumerate(tqdm(files, f"reading {split}", disable=None, leave=False)):
        images[i] = _read_image(p)
    labels = np.array([label for label, _ in files], np.int32)
    coarse = np.asarray(spec.coarse_of_class, np.int32)[labels] if spec.coarse_names else None
    return SplitArrays(images, labels, coarse)


def _read_image(path):
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{path}: is no readable image ({first_line(error)}); replace the file"
        ) from error
    if pixels.shape != IMAGE_SHAPE:
        height, width = pixels.shape[:2]
        raise DataError(f"{path}: {width}x{height} pixels, expected 32x32 as in the original")
    return pixels
