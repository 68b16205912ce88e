"""Data augmentation inside the compiled step: torchvision's distributions, Pillow's pixels."""

from jaxcifar.augment.ops import normalize
from jaxcifar.augment.pipeline import (
    Augment, Evaluation, build, centered, describe, evaluation, parse)

__all__ = ["Augment", "Evaluation", "build", "centered", "describe", "evaluation", "normalize",
           "parse"]
