"""torchvision's transforms for where it is missing: the same work on the same Pillow images.

Written after the documentation of torchvision.transforms, with its names: random numbers from
torch, one image at a time, nearest neighbour, black fill.
"""

import enum

import numpy as np

class AutoAugmentPolicy(enum.Enum):
    """The policies there are."""

    CIFAR10 = "cifar10"


class Compose:
    """Apply one transform after the other."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomRotation:
    """Rotate by an angle uniform in [-degrees, degrees]."""

    def __init__(self, degrees):
        self.degrees = float(degrees)

    def __call__(self, image):
        import torch
        angle = float(torch.empty(1).uniform_(-self.degrees, self.degrees).item())
        return image.rotate(angle, fillcolor=0)


class RandomCrop:
    """Pad with zeros on all sides and cut out size x size pixels."""

    def __init__(self, size, padding):
        self.size, self.padding = size, padding

    def __call__(self, image):
        import torch
        from PIL import ImageOps
        image = ImageOps.expand(image, border=self.padding, fill=0)
        top = torch.randint(0, image.height - self.size + 1, size=(1,)).item()
        left = torch.randint(0, image.width - self.size + 1, size=(1,)).item()
        return image.crop((left, top, left + self.size, top + self.size))


class RandomHorizontalFlip:
    """Mirror with probability 0.5."""

    def __call__(self, image):
        import torch
        from PIL import Image
        if torch.rand(1) < 0.5:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class ToTensor:
    """Turn a Pillow image into a float32 tensor [3, H, W] in [0, 1]."""

    def __call__(self, image):
        import torch
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        return pixels.permute((2, 0, 1)).contiguous().to(torch.float32).div(255)


class Normalize:
    """Subtract the mean and divide by the standard deviation, per channel."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, tensor):
        import torch
        mean = torch.as_tensor(self.mean).view(-1, 1, 1)
        std = torch.as_tensor(self.std).view(-1, 1, 1)
        return tensor.clone().sub_(mean).div_(std)


class AutoAugment:
    """One of 25 pairs of operations, each with its own probability and magnitude."""

    def __init__(self, policy):
        from jaxcifar.augment import policies  # the published table; imports jax
        assert policy is AutoAugmentPolicy.CIFAR10
        self._signed = policies.SIGNED
        self._pairs = [
            [(name, p, float(policies.magnitudes(name, 10, (32, 32))[level or 0]))
             for name, p, level in pair] for pair in policies.CIFAR10_POLICY]

    def __call__(self, image):
        import torch
        chosen = int(torch.randint(len(self._pairs), (1,)).item())
        probabilities, signs = torch.rand((2,)), torch.randint(2, (2,))
        for i, (name, probability, magnitude) in enumerate(self._pairs[chosen]):
            if probabilities[i] <= probability:
                negative = name in self._signed and signs[i] == 0
                image = _operation(image, name, -magnitude if negative else magnitude)
        return image


def _operation(image, name, magnitude):
    from PIL import Image, ImageEnhance, ImageOps
    matrices = {"ShearX": (1, magnitude, 0, 0, 1, 0), "ShearY": (1, 0, 0, magnitude, 1, 0),
                "TranslateX": (1, 0, -int(magnitude), 0, 1, 0),
                "TranslateY": (1, 0, 0, 0, 1, -int(magnitude))}
    if name in matrices:
        return image.transform(image.size, Image.Transform.AFFINE, matrices[name],
                               Image.Resampling.NEAREST, fillcolor=0)
    if name == "Rotate":
        return image.rotate(magnitude, fillcolor=0)
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(1.0 + magnitude)
    if name == "Posterize":
        return ImageOps.posterize(image, int(magnitude))
    if name == "Solarize":
        return ImageOps.solarize(image, magnitude)
    plain = {"AutoContrast": ImageOps.autocontrast, "Equalize": ImageOps.equalize,
             "Invert": ImageOps.invert}
    return plain[name](image)
