"""Stream images to predict: a folder of PNG or JPEG files, or an .npz or .npy file, batch by batch.

    images = png_stream.open_images("test")     # names and counts only: no pixel is read yet
    for batch in images.batches(1000):          # uint8 [1000, 32, 32, 3], the last one smaller
        ...

Threads decode a folder's next batches while the caller works on one; no more than `AHEAD` batches
wait. Decoding a 32x32 PNG takes Pillow about 70 microseconds, so two threads outrun any network
here; more of them only wait for Python's lock.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import zipfile
from collections.abc import Callable

import numpy as np
from PIL import Image

from jaxcifar.data.specs import IMAGE_SHAPE, DataError
from jaxcifar.errors import first_line

SUFFIXES = (".png", ".jpg", ".jpeg")
ARRAY_SUFFIXES = (".npz", ".npy")
AHEAD = 4  # batches of a folder that are decoded or under way while the caller has one
_THREADS = 2
_FORMATS = ("PNG", "JPEG")
_RGB_MODES = ("RGB", "L", "1", "P")  # what RGB holds without loss, if nothing is transparent
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images in a known order, read when asked for.

    count: int. numbers: for each the number that its file's name is, ascending, or None where the
    source has no file names or they are no numbers. batches: size -> iterator of uint8
    [n, 32, 32, 3], n = size but for the last. names: of the files, () for an array. notes: sentences
    for the user.
    """

    count: int
    numbers: tuple | None
    batches: Callable
    names: tuple = ()
    notes: tuple = ()


def open_images(path):
    """Open a folder of images or an array file.

    A folder's files are taken in the order of their numbers (2.png before 10.png), or by name
    (test_2.png before test_10.png) where none is a number; subfolders and other files are not read
    and a note says so.

    Returns:
      Images. Raises DataError: nothing there, no image in it, two files of one number, names of which
      some are numbers and some are not, or an array that is not uint8 [n, 32, 32, 3]. Iterating
      raises DataError naming a file that cannot be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise DataError(f"there is no folder or file {path}: give a folder of 32x32 PNG or JPEG "
                        "files, an .npz or .npy file, or the name of a split")
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        raise DataError(f"{path} is neither a folder nor an .npz or .npy file: give the folder "
                        "that holds the images (unpack an archive first)")
    return _open_array(path)


def read_image(path, formats=_FORMATS):
    """Return an image file's pixels, uint8 [32, 32, 3]; formats: of Pillow, that it may have.

    Grey, palette and opaque RGBA images become RGB, which loses nothing. Raises DataError naming
    the file: damaged, not 32x32, or with transparency, CMYK or more than 8 bits.
    """
    try:
        with Image.open(path, formats=formats) as image:
            if image.size != IMAGE_SHAPE[1::-1]:
                raise DataError(f"{path}: {image.width}x{image.height} pixels, expected 32x32: "
                                "resize the images first, such as by Pillow's Image.resize")
            if (image.format == "PNG" and image.mode in ("RGB", *_ALPHA_MODES)
                    and "16" in str(image.tile[0][3])):
                raise DataError(f"{path}: 16 bits per channel, of which Pillow would drop half; save "
                                "it as 8-bit RGB")
            as_it_is = image.mode == "RGB" and "transparency" not in image.info
            return np.asarray(image if as_it_is else _to_rgb(image, path))
    except (OSError, ValueError, SyntaxError, EOFError, IndexError,  # no pixels: an empty tile list
            Image.DecompressionBombError) as error:
        raise DataError(f"{path}: is no readable {', '.join(formats[:-1])} or {formats[-1]} "
                        f"({_reason(error)}); replace the file") from error


def _reason(error):
    if isinstance(error, Image.UnidentifiedImageError):
        return "no such format begins so"
    return getattr(error, "strerror", None) or first_line(error)


def _to_rgb(image, path):
    mode = image.mode
    if mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            raise DataError(f"{path}: has transparent pixels, whose colour is undefined; save it "
                            "as RGB on a background of your choice")
    elif mode not in _RGB_MODES:
        raise DataError(f"{path}: Pillow's mode {mode}, which 8-bit RGB cannot hold without loss; "
                        "save it as 8-bit RGB")
    return image.convert("RGB")


def _open_folder(path):
    try:
        with os.scandir(path) as entries:
            kinds = [(entry.name, entry.is_file()) for entry in entries]
    except OSError as error:
        raise DataError(f"cannot read the folder {path}: {error.strerror or error}") from error
    names = [name for name, is_file in kinds if is_file and _is_image(name)]
    others = sorted(name for name, is_file in kinds if not (is_file and _is_image(name)))
    if not names:
        has = f"only {_some(others)}" if others else "nothing"
        raise DataError(f"{path} holds no PNG or JPEG file ({has}): give the folder that holds the "
                        "images themselves (subfolders are not searched)")
    numbers = _numbers(names, path)
    if numbers:
        order = sorted(range(len(names)), key=numbers.__getitem__)
        names, numbers = [names[i] for i in order], tuple(numbers[i] for i in order)
    else:
        names.sort(key=_by_numbers)
    notes = (f"not read: {_some(others)}",) if others else ()
    return Images(len(names), numbers, lambda size: _folder_batches(path, names, size),
                  tuple(names), notes)


def _is_image(name):  # "._1.png" is macOS's file about 1.png
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _some(names):
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def number_of(name):
    """Return the number that a file's name is, or None where it is none of 18 digits at most."""
    stem = os.path.splitext(name)[0]
    return int(stem) if re.fullmatch("[0-9]{1,18}", stem) else None


def _by_numbers(name):
    """Return a key that sorts "test_2.png" before "test_10.png"."""
    return [(int(part), part) if part.isdecimal() else (0, part)
            for part in re.split("([0-9]+)", name)]


def _numbers(names, path):
    """Return the numbers that the files' names are, or None where none is a number.

    Raises DataError: some are, and some are not, or two are the same.
    """
    odd = next((name for name in sorted(names) if number_of(name) is None), None)
    if odd and any(number_of(name) is not None for name in names):
        raise DataError(f"{path}: the names of some files are numbers, and that of {odd} is not (of 18 "
                        "digits at most): an image's id would be neither its number nor its place; "
                        "remove or rename what is not to be predicted")
    if odd:
        return None
    numbers, seen = [], {}
    for name in names:
        numbers.append(number_of(name))
        other = seen.setdefault(numbers[-1], name)
        if other != name:
            raise DataError(f"{path} holds {min(name, other)} and {max(name, other)}, both image "
                            f"number {numbers[-1]}: remove one")
    return numbers


def _folder_batches(path, names, size):
    """Decode batches in threads, at most AHEAD of them before the caller asks for the next."""
    folder = str(path)

    def decode(first):
        part = names[first:first + size]
        batch = np.empty((len(part), *IMAGE_SHAPE), np.uint8)
        for i, name in enumerate(part):
            batch[i] = read_image(os.path.join(folder, name))
        return batch

    firsts = iter(range(0, len(names), size))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        waiting = collections.deque(pool.submit(decode, i) for i in itertools.islice(firsts, AHEAD))
        try:
            while waiting:
                batch = waiting.popleft().result()
                for first in itertools.islice(firsts, 1):
                    waiting.append(pool.submit(decode, first))
                yield batch
        finally:  # an error, or a caller that stops: what has not begun never begins
            pool.shutdown(wait=False, cancel_futures=True)


def _open_array(path):
    with _reading(path), _array_stream(path) as (_, count, key):
        notes = (f"array {key!r} of {path.name}",) if key else ()
    if not count:
        raise DataError(f"{path} holds no image (shape [0, 32, 32, 3])")
    return Images(count, None, lambda size: _array_batches(path, size), notes=notes)


def _array_batches(path, size):
    with _reading(path), _array_stream(path) as (stream, count, _):
        for first in range(0, count, size):
            shape = min(size, count - first), *IMAGE_SHAPE
            data = stream.read(int(np.prod(shape)))
            if len(data) != np.prod(shape):
                raise DataError(f"{path}: ends within image {first + len(data) // 3072 + 1:,} "
                                f"of {count:,}; replace the file")
            yield np.frombuffer(data, np.uint8).reshape(shape)


@contextlib.contextmanager
def _reading(path):
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes zipfile, zlib and NumPy raise
        raise DataError(f"{path}: is no readable array file ({first_line(error)}); replace the "
                        "file") from error


@contextlib.contextmanager
def _array_stream(path):
    """Open an array file; give (stream of pixels, number of images, name in an .npz or "")."""
    with contextlib.ExitStack() as stack:
        stream, key = stack.enter_context(path.open("rb")), ""
        if path.suffix.lower() == ".npz":
            archive = stack.enter_context(zipfile.ZipFile(stream))
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            if "images" not in keys and len(keys) != 1:
                raise DataError(f"{path} holds the arrays {', '.join(keys) or 'none'}: expected "
                                "one array, or one called images")
            key = "images" if "images" in keys else keys[0]
            stream = stack.enter_context(archive.open(f"{key}.npy"))
        yield stream, _check_header(path, stream), key


def _check_header(path, stream):
    """Read an .npy header; return the number of images."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise DataError(f"{path}: .npy format {version}, expected 1.0 or 2.0: save it with np.save")
    shape, fortran, dtype = read(stream)
    if len(shape) != 4 or shape[1:] != IMAGE_SHAPE or dtype != np.uint8:
        hint = "; move the channels last" if shape[1:] == (3, 32, 32) else ""
        raise DataError(f"{path}: {dtype} {list(shape)}, expected uint8 [n, 32, 32, 3] of values 0 "
                        f"to 255{hint}")
    if fortran:
        raise DataError(f"{path}: in Fortran order: save np.ascontiguousarray(images)")
    return shape[0]
