"""Augmentation of a batch on the device in PyTorch, for PyTorch at its best.

The same design as jaxcifar.augment (a gather, a table, a blend for each image), in plain float32
arithmetic: pixels may differ from Pillow's by one level.
"""

import math

from jaxcifar.benchmark import inputs, torch_data


def build(augment, device):
    """Return a function uint8 [N, 3, 32, 32] -> the same, augmented, on a torch device.

    augment: specification (see torch_data.parse). Raises UserError.
    """
    makers = {"rotation": _rotation, "flip": _flip, "crop": _crop, "autoaugment": _autoaugment}
    steps = [makers[name](number, device) for name, number in torch_data.parse(augment)]

    def apply(images):
        for step in steps:
            images = step(images)
        return images
    return apply


def normalizer(device):
    """Return a function uint8 [N, 3, 32, 32] -> float32, normalised."""
    import torch
    mean = 255 * torch.tensor(inputs.MEAN, device=device).view(3, 1, 1)
    scale = 1 / (255 * torch.tensor(inputs.STD, device=device).view(3, 1, 1))
    return lambda images: (images.float() - mean) * scale


def _take(images, row, column):
    """Return images read at row and column (int64 [N, 32, 32]); black outside."""
    import torch
    inside = (row >= 0) & (row < 32) & (column >= 0) & (column < 32)
    index = (row.clamp(0, 31) * 32 + column.clamp(0, 31)).view(len(images), 1, -1)
    taken = torch.gather(images.flatten(2), 2, index.expand(-1, 3, -1)).view_as(images)
    return taken * inside.unsqueeze(1)


def _grid(device):
    import torch
    place = torch.arange(32, device=device)
    return place.view(1, 32, 1), place.view(1, 1, 32)


def _affine(images, matrix, row, column):
    """Transform by inverse matrices, float32 [N, 6], of pixel centres; nearest neighbour."""
    import torch
    a, b, c, d, e, f = (matrix[:, i].view(-1, 1, 1) for i in range(6))
    x, y = column + 0.5, row + 0.5
    return _take(images, torch.floor(d * x + e * y + f).long(),
                 torch.floor(a * x + b * y + c).long())


def _rotation(degrees, device):
    import torch
    row, column = _grid(device)

    def apply(images):
        angle = math.radians(degrees) * (2 * torch.rand(len(images), device=device) - 1)
        cosine, sine = angle.cos(), angle.sin()
        matrix = torch.stack([cosine, sine, 16 - 16 * (cosine + sine),
                              -sine, cosine, 16 - 16 * (cosine - sine)], 1)
        return _affine(images, matrix, row, column)
    return apply


def _flip(_, device):
    import torch

    def apply(images):
        chosen = torch.rand(len(images), device=device) < 0.5
        return torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)
    return apply


def _crop(padding, device):
    import torch
    row, column = _grid(device)

    def apply(images):
        shift = torch.randint(-padding, padding + 1, (2, len(images), 1, 1), device=device)
        return _take(images, row + shift[0], (column + shift[1]).expand(-1, 32, -1))
    return apply


def _autoaugment(_, device):
    import numpy as np
    import torch

    from jaxcifar.augment import policies
    draw = policies.autoaugment((32, 32))
    rows = {name: torch.from_numpy(np.ascontiguousarray(value)).to(device)
            for name, value in draw.rows._asdict().items()}
    signed = [torch.from_numpy(x).long().to(device) for x in (draw.negative, draw.positive)]
    probability = torch.from_numpy(draw.probability).to(device)

    def apply(images):
        count, slots = len(images), probability.shape[1]
        choice = torch.randint(len(probability), (count,), device=device)
        negative = torch.rand(count, slots, device=device) < 0.5
        number = torch.where(negative, signed[0][choice], signed[1][choice])
        number *= torch.rand(count, slots, device=device) <= probability[choice]  # 0: identity
        for slot in range(slots):
            images = operate(images, rows, number[:, slot])
        return images
    return apply


def operate(images, rows, chosen):
    """Apply to each of uint8 [N, 3, 32, 32] the row (of policies.Rows) numbered in int64 [N]."""
    row, column = _grid(images.device)
    matrix = rows["matrix"][chosen].long()  # 16.16 fixed point, the half pixel folded in
    a, b, c, d, e, f = (matrix[:, i].view(-1, 1, 1) for i in range(6))
    images = _take(images, (column * d + row * e + f) >> 16, (column * a + row * b + c) >> 16)
    return _blend(_look_up(images, rows, chosen), rows, chosen)


def _luma(images):
    """Return Pillow's gray, int64 [N, 1, H, W], of int64 [N, 3, H, W]."""
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _look_up(images, rows, chosen):
    """Replace values by the table of each image's operation."""
    import torch

    from jaxcifar.augment import policies
    pixels = images.long()
    flat = pixels.flatten(2)
    below = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=images.device)
    below = below.scatter_add(2, flat, torch.ones_like(flat))
    below = below.cumsum(2) - below
    kind = rows["table_kind"][chosen].view(-1, 1, 1)
    ramp = torch.arange(256, device=images.device).view(1, 1, 256)
    mean = _luma(pixels).float().mean((2, 3), keepdim=True).add(0.5).floor().view(-1, 1, 1)
    contrast = mean + (ramp - mean) * rows["contrast"][chosen].view(-1, 1, 1)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    autocontrast = torch.where(high > low, (ramp - low) * 255 // (high - low).clamp(min=1), ramp)
    step = torch.where(below < 1024, below, 0).amax(2, keepdim=True) // 255
    equalized = torch.where(step > 0, (below + step // 2) // step.clamp(min=1), ramp)
    table = rows["table"].long()[chosen].unsqueeze(1).expand(-1, 3, -1)
    for code, made in ((policies.CONTRAST, contrast.long()), (policies.AUTOCONTRAST, autocontrast),
                       (policies.EQUALIZE, equalized)):
        table = torch.where(kind == code, made.clamp(0, 255), table)
    return torch.gather(table, 2, flat).to(torch.uint8).view_as(images)


def _blend(images, rows, chosen):
    """Blend with the gray image (Color) or the smoothed one (Sharpness)."""
    import torch
    import torch.nn.functional as F
    pixels = images.float()
    smooth = pixels.clone()
    total = F.avg_pool2d(pixels, 3, 1) * 9 + 4 * pixels[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    gray = _luma(images.long()).float()
    base = torch.where(rows["smooth"][chosen].view(-1, 1, 1, 1), smooth, gray)
    mixed = base + (pixels - base) * rows["blend"][chosen].view(-1, 1, 1, 1)
    return mixed.clamp(0, 255).to(torch.uint8)
