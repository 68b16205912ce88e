"""PyTorch's input as pytorch-cifar's users have it: Pillow images, transforms, a DataLoader.

torchvision's transforms are used where it can be imported; else the same ones are written here in
the way that torchvision writes them (one Pillow image at a time, random numbers from torch).
"""

import re

import numpy as np

from jaxcifar.benchmark import inputs, pillow_transforms
from jaxcifar.errors import UserError

_WORKERS = 2  # as in pytorch-cifar's main.py


class Images:
    """A map-style dataset of (transformed image, label), as torchvision.datasets.CIFAR10."""

    def __init__(self, arrays, transform):
        """Keep arrays ({"images", "labels"}) and a function of a Pillow image."""
        self._arrays, self._transform = arrays, transform

    def __len__(self):
        """Return the number of images."""
        return len(self._arrays["labels"])

    def __getitem__(self, index):
        """Return (float32 tensor [3, 32, 32], int)."""
        from PIL import Image
        image = Image.fromarray(self._arrays["images"][index])
        return self._transform(image), int(self._arrays["labels"][index])


def loader(arrays, augment, batch, *, train, workers=_WORKERS):
    """Return a DataLoader with an augmentation (see `parse`), shuffled where it is to train."""
    import torch
    _transforms()  # an import that fails should do so here, not in each worker
    dataset = Images(arrays, transform(augment if train else ""))
    return torch.utils.data.DataLoader(
        dataset, batch_size=batch, shuffle=train, num_workers=workers, drop_last=train,
        pin_memory=False)


def parse(augment):
    """Return [(name, number or None)] of a specification such as "crop(4)|flip".

    Raises UserError for an operation that the PyTorch contenders do not have.
    """
    terms = []
    for term in filter(None, augment.split("|")):
        match = re.fullmatch(r"(rotation|crop|flip|autoaugment)(?:\((\d+)\))?", term.strip())
        if not match:
            raise UserError(f"augmentation {term!r}: the PyTorch contenders have "
                            "rotation(DEGREES), crop(PADDING), flip and autoaugment")
        terms.append((match[1], int(match[2]) if match[2] else None))
    return terms


def transform(augment):
    """Return the composed transform: augmentation, ToTensor, Normalize."""
    lib, steps = _transforms(), []
    for name, number in parse(augment):
        if name == "rotation":
            steps.append(lib.RandomRotation(number))
        elif name == "crop":
            steps.append(lib.RandomCrop(32, padding=number))
        elif name == "flip":
            steps.append(lib.RandomHorizontalFlip())
        else:
            steps.append(lib.AutoAugment(lib.AutoAugmentPolicy.CIFAR10))
    return lib.Compose([*steps, lib.ToTensor(), lib.Normalize(inputs.MEAN, inputs.STD)])


def source():
    """Return "torchvision" or "Pillow", whichever the transforms come from."""
    return "Pillow" if _transforms() is pillow_transforms else "torchvision"


def _transforms():
    try:
        from torchvision import transforms
    except Exception:  # absent, or built for another torch: RuntimeError, AttributeError, OSError
        return pillow_transforms
    return transforms


def device_data(arrays, device):
    """Return (uint8 [n, 3, 32, 32], int64 [n]) on a torch device."""
    import torch
    images = torch.from_numpy(np.ascontiguousarray(arrays["images"].transpose(0, 3, 1, 2)))
    return images.to(device), torch.from_numpy(arrays["labels"].astype(np.int64)).to(device)
