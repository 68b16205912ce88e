"""Predict classes with a trained run and write them as CSV:

    python -m jaxcifar.predict --workdir=runs/NAME --images=test_images --out=submission.csv

--images: a folder of 32x32 PNG or JPEG files, an .npz or .npy file (uint8 [n, 32, 32, 3]), or a
split of the run's dataset: test, val or train (a folder of such a name is written ./test).
--format=kaggle  id,label: the number that the file's name is (1.png ... 300000.png, in that order;
                 rows of an array count from 1) and the class name, as Kaggle's CIFAR-10 wants it.
--format=course  ID,Label: the same number (rows of an array count from 0) and the class index.
The run is only read, and may be going on. The file appears when it is complete.
"""

import sys

import numpy as np
from tqdm import tqdm

from jaxcifar import command, errors, inference, logs, run_folder
from jaxcifar.data import png_stream, specs
from jaxcifar.errors import UserError

HEADERS = {"kaggle": "id,label", "course": "ID,Label"}
_FIRST = {"kaggle": 1, "course": 0}  # id of an array's first row


def predict(workdir, images, out, *, format="kaggle", checkpoint="selected", flip=False,
            say=print):
    """Write the predicted classes of images as CSV, in the order of their ids.

    Args:
      workdir: the run's folder. images: a folder, an array file, or a split's name. out: the file,
        replaced if it exists. format: "kaggle" or "course". checkpoint: see `inference.load`.
      flip: see `inference.logits`. say: called with each line for the user.

    Returns:
      int32 [n], the predicted class indices.

    Raises:
      UserError: a mistake in an argument, in an image (its file is named) or in the run; then no
        file is written.
    """
    if format not in HEADERS:
        raise UserError(errors.unknown("format", format, HEADERS))
    out = run_folder.check_target(out)
    given = None if images in inference.SPLITS else _opened(images, format, say)
    trained = inference.load(workdir, checkpoint)
    say(trained.description)
    labels = None
    if given is None:
        given, labels = _split(trained, images)
    names = _class_names(trained.task, trained.config.dataset, format)
    ids = _ids(given, format)

    watch, predictions = logs.Stopwatch(), np.empty(given.count, np.int32)
    lines, done = [HEADERS[format]], 0
    batches = given.batches(trained.config.eval_batch_size)
    with tqdm(total=given.count, desc="predicting", unit=" images", disable=None,
              leave=False) as bar:
        for values in inference.logits(trained, batches, flip=flip):
            stop = done + len(values)
            predictions[done:stop] = classes = np.argmax(values, axis=-1)
            lines.append("\n".join(
                f"{i},{names[c]}" for i, c in zip(ids[done:stop], classes, strict=True)))
            done = stop
            bar.update(len(values))
    run_folder.write_atomic(out, "\n".join(lines) + "\n")
    say(_closing_line(out, predictions, labels, watch.seconds()))
    return predictions


def _opened(path, format, say):
    """Open what is not a split; say what the user may not expect."""
    images = png_stream.open_images(path)
    for note in images.notes:
        say(f"{path}: {note}")
    if images.names and images.numbers is None:
        if format == "kaggle":
            raise UserError(f"{path}: the name of {images.names[0]} is no number (of 18 digits at most), and "
                            "Kaggle's ids are the numbers in 1.png, 2.png, ...: rename the files, "
                            "or use --format=course, which then counts them")
        say(f"{path}: the file names are no numbers (such as {images.names[0]}): ID counts the files "
            "from 0, sorted by name, test_2 before test_10")
    return images


def _split(trained, split):
    """Return (Images, labels int32 [n]) of a split."""
    images, labels = inference.split_arrays(trained, split)
    return png_stream.Images(
        len(images), None, lambda size: inference.batches_of(trained, images)), labels


def _ids(images, format):
    if images.numbers is not None:
        return images.numbers
    return range(_FIRST[format], _FIRST[format] + images.count)


def _class_names(task, dataset, format):
    """Return what stands for each class in the file, a tuple of strings."""
    if format == "course":
        return tuple(map(str, range(task.num_classes)))
    return specs.get_spec(dataset).class_names


def _closing_line(out, predictions, labels, seconds):
    count = len(predictions)
    speed = f"{count / seconds:,.0f} images/s, compilation included"
    line = f"wrote {out}: {count:,} predictions in {seconds:.1f} s ({speed})"
    if labels is None:
        return line
    correct = int(np.sum(predictions == labels))
    return f"{line}; accuracy {100 * correct / count:.2f}% ({correct:,} correct)"


def main(argv):
    """Predict as the command line `argv` says. Raises UserError."""
    parser = inference.Parser("python -m jaxcifar.predict", __doc__)
    parser.add_argument("--images", required=True,
                        help="folder, .npz or .npy file, or test, val, train")
    parser.add_argument("--out", required=True, help="the CSV file, in a folder that exists")
    parser.add_argument("--format", default="kaggle", help="kaggle (default) or course")
    given = parser.parse_args(argv[1:])
    predict(given.workdir, given.images, given.out, format=given.format,
            checkpoint=given.checkpoint, flip=given.flip)


if __name__ == "__main__":
    sys.exit(command.run(lambda: main(sys.argv)))
