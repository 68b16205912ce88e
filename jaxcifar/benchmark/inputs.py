"""The images that every contender works on: generated, so that no dataset has to be prepared."""

import numpy as np

NUM_CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# The device's peak is measured on these: {on CPU: (rows of square matrices, products in a row)}.
PRODUCTS = {True: (2048, 4), False: (8192, 50)}


def generated(count, seed=0):
    """Return {"images": uint8 [count, 32, 32, 3], "labels": int32 [count]}: noise, classes by hue.

    The speed of a step does not depend on what the pixels show; a loss that falls shows that the
    steps train.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, count).astype(np.int32)
    images = rng.integers(0, 128, (count, 32, 32, 3), dtype=np.uint8)
    hues = np.random.default_rng(1).integers(0, 128, (NUM_CLASSES, 1, 1, 3), dtype=np.uint8)
    return {"images": images + hues[labels], "labels": labels}
