"""PyTorch twins of the models, written for the tests from the papers' and reports' definitions."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, features, stride, kernel, shortcut_kernel):
        super().__init__()
        self.conv1 = nn.Conv2d(width, features, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, kernel, 1, kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.shortcut = nn.Sequential()
        if stride != 1 or width != features:
            padding = "same" if stride == 1 else {1: 0, 2: 0, 3: 1}[shortcut_kernel]
            self.shortcut = nn.Sequential(
                nn.Conv2d(width, features, shortcut_kernel, stride, padding, bias=False),
                nn.BatchNorm2d(features))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, num_classes=10, channels=(64, 128, 128, 256), blocks=(5, 4, 3, 2),
                 kernel_size=3, shortcut_kernel=3, stem_width=32, stem_kernel=3, pool=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, stem_kernel, 1, stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        width = stem_width
        for stage, (features, count) in enumerate(zip(channels, blocks)):
            layer = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                layer.append(Block(width, features, stride, kernel_size, shortcut_kernel))
                width = features
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.stages = len(channels)
        size = 32 // 2 ** (len(channels) - 1)
        self.pool = pool or size
        self.linear = nn.Linear(width * (size // self.pool) ** 2, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.linear(torch.flatten(F.avg_pool2d(x, self.pool), 1))


class CNN3(nn.Module):
    def __init__(self, num_classes=10, filters=(32, 64, 128), hidden=(512, 40), dropout=0.0):
        super().__init__()
        widths = [3, *filters]
        for i in range(3):
            setattr(self, f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1))
        self.drop = nn.Dropout2d(dropout)
        widths = [filters[-1] * 4, *hidden, num_classes]
        self.linears = len(widths) - 1
        for i in range(self.linears):
            setattr(self, f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x):
        for i in range(3):
            x = F.relu(getattr(self, f"conv{i + 1}")(x))
        x = torch.flatten(self.drop(F.max_pool2d(x, 2)), 1)
        for i in range(self.linears):
            x = getattr(self, f"fc{i + 1}")(x)
            x = F.relu(x) if i + 1 < self.linears else x
        return x


TWINS = {"resnet5m": ResNet, "cnn3": CNN3}
WITHOUT_TWIN = set()  # names of models that have no PyTorch original, such as a fork's own


def randomized(model, seed=0):
    """Give every BatchNorm of a twin other parameters and statistics than the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def timm_decay(decay, step, warmup):
    """The decay of timm.utils.ModelEmaV3.get_decay with its defaults."""
    if step is None:
        return decay
    updates = max(0, step - 1)
    if updates == 0:
        return 0.0
    return min(1 - (1 + updates) ** (-2 / 3), decay) if warmup else decay
