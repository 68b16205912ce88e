"""Data augmentation inside the compiled step: torchvision's distributions, Pillow's pixels."""

from jaxcifar.augment.ops import normalize
from jaxcifar.augment.pipeline import Augment, build, describe, parse

__all__ = ["Augment", "build", "describe", "normalize", "parse"]
