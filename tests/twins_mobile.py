"""PyTorch twins of the mobile families, written for the tests, with pytorch-cifar's names.

MobileNet, MobileNetV2, EfficientNet-B0, ShuffleNet, ShuffleNetV2; options are those of
jaxcifar's models, defaults those of each first registered name.
"""

import torch
import torch.nn.functional as F
from torch import nn


def conv_norm(width, features, kernel=1, stride=1, groups=1):
    """A convolution without biases and the BatchNorm after it."""
    conv = nn.Conv2d(width, features, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(features)


class Unit(nn.Module):
    """Holds conv1, bn1, conv2, bn2, ... as pytorch-cifar's blocks do; `step` applies the ith."""

    def __init__(self, *pairs):
        super().__init__()
        for i, (conv, norm) in enumerate(pairs, start=1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)

    def step(self, i, x):
        return getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))


def pooled(x):
    """The mean of each channel, as avg_pool2d over the whole map and a flattening view."""
    return torch.flatten(F.avg_pool2d(x, x.shape[-1]), 1)


class SE(nn.Module):
    def __init__(self, width, features, activation):
        super().__init__()
        self.se1 = nn.Conv2d(width, features, 1)
        self.se2 = nn.Conv2d(features, width, 1)
        self.activation = activation

    def forward(self, x):
        scale = self.activation(self.se1(F.adaptive_avg_pool2d(x, (1, 1))))
        return x * torch.sigmoid(self.se2(scale))


class Separable(Unit):
    def __init__(self, width, features, stride):
        super().__init__(conv_norm(width, width, 3, stride, width), conv_norm(width, features))

    def forward(self, x):
        return F.relu(self.step(2, F.relu(self.step(1, x))))


class MobileNet(Unit):
    def __init__(self, num_classes=10, channels=(64, 128, 128, 256, 256) + (512,) * 6 + (1024,) * 2,
                 strides=(1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), stem_width=32):
        super().__init__(conv_norm(3, stem_width, 3))
        widths = (stem_width, *channels)
        self.layers = nn.Sequential(*map(Separable, widths, channels, strides))
        self.linear = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        return self.linear(pooled(self.layers(F.relu(self.step(1, x)))))


class Inverted(Unit):
    """MobileNetV2's block."""

    def __init__(self, width, features, expansion, stride):
        inner = width * expansion
        super().__init__(conv_norm(width, inner), conv_norm(inner, inner, 3, stride, inner),
                         conv_norm(inner, features))
        self.stride = stride
        self.shortcut = nn.Sequential(
            *(conv_norm(width, features) if stride == 1 and width != features else ()))

    def forward(self, x):
        y = self.step(3, F.relu(self.step(2, F.relu(self.step(1, x)))))
        return y + self.shortcut(x) if self.stride == 1 else y


class MobileNetV2(Unit):
    def __init__(self, num_classes=10, expansion=(1, 6, 6, 6, 6, 6, 6),
                 channels=(16, 24, 32, 64, 96, 160, 320), blocks=(1, 2, 3, 4, 3, 3, 1),
                 strides=(1, 1, 2, 2, 1, 2, 1), stem_width=32, head_width=1280):
        super().__init__(conv_norm(3, stem_width, 3), conv_norm(channels[-1], head_width))
        layers, width = [], stem_width
        for factor, features, count, stride in zip(expansion, channels, blocks, strides):
            for i in range(count):
                layers.append(Inverted(width, features, factor, stride if i == 0 else 1))
                width = features
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(head_width, num_classes)

    def forward(self, x):
        x = self.layers(F.relu(self.step(1, x)))
        return self.linear(pooled(F.relu(self.step(2, x))))


class MBConv(Unit):
    """EfficientNet's block; expansion 1 keeps a conv1 and a bn1 that it does not use."""

    def __init__(self, width, features, kernel, stride, expansion):
        inner = width * expansion
        super().__init__(conv_norm(width, inner), conv_norm(inner, inner, kernel, stride, inner),
                         conv_norm(inner, features))
        self.se = SE(inner, int(width * 0.25), F.silu)
        self.expansion, self.skip = expansion, stride == 1 and width == features

    def forward(self, x):
        y = x if self.expansion == 1 else F.silu(self.step(1, x))
        y = self.step(3, self.se(F.silu(self.step(2, y))))
        return y + x if self.skip else y


class EfficientNet(Unit):
    def __init__(self, num_classes=10, expansion=(1, 6, 6, 6, 6, 6, 6),
                 channels=(16, 24, 40, 80, 112, 192, 320), blocks=(1, 2, 2, 3, 3, 4, 1),
                 kernel_sizes=(3, 3, 5, 3, 5, 5, 3), strides=(1, 2, 2, 2, 1, 2, 1), stem_width=32,
                 dropout=0.2):
        super().__init__(conv_norm(3, stem_width, 3))
        layers, width = [], stem_width
        stages = zip(expansion, channels, blocks, kernel_sizes, strides)
        for factor, features, count, kernel, stride in stages:
            for i in range(count):
                layers.append(MBConv(width, features, kernel, 1 if i else stride, factor))
                width = features
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(width, num_classes)
        self.dropout = dropout

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.layers(F.silu(self.step(1, x))), 1)
        return self.linear(F.dropout(torch.flatten(x, 1), self.dropout, self.training))


def shuffled(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleUnit(Unit):
    """ShuffleNet's bottleneck."""

    def __init__(self, width, features, stride, groups):
        inner = int(features / 4)
        self_groups = 1 if width == 24 else groups
        super().__init__(conv_norm(width, inner, groups=self_groups),
                         conv_norm(inner, inner, 3, stride, inner),
                         conv_norm(inner, features, groups=groups))
        self.stride, self.groups = stride, self_groups

    def forward(self, x):
        y = shuffled(F.relu(self.step(1, x)), self.groups)
        y = self.step(3, F.relu(self.step(2, y)))
        if self.stride == 1:
            return F.relu(y + x)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))


class ShuffleNet(Unit):
    def __init__(self, num_classes=10, channels=(200, 400, 800), blocks=(4, 8, 4), groups=2):
        super().__init__(conv_norm(3, 24))
        width = 24
        for stage, (features, count) in enumerate(zip(channels, blocks), start=1):
            layers = [ShuffleUnit(width, features - width, 2, groups)]
            layers += [ShuffleUnit(features, features, 1, groups) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            width = features
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.step(1, x)))))
        return self.linear(pooled(x))


class BasicUnit(Unit):
    """ShuffleNetV2's block of stride 1."""

    def __init__(self, width):
        half = int(width * 0.5)
        super().__init__(conv_norm(half, half), conv_norm(half, half, 3, 1, half),
                         conv_norm(half, half))

    def forward(self, x):
        kept, y = x.chunk(2, dim=1)
        y = F.relu(self.step(3, self.step(2, F.relu(self.step(1, y)))))
        return shuffled(torch.cat([kept, y], 1), 2)


class DownUnit(Unit):
    """ShuffleNetV2's block of stride 2."""

    def __init__(self, width, features):
        half = features // 2
        super().__init__(
            conv_norm(width, width, 3, 2, width), conv_norm(width, half), conv_norm(width, half),
            conv_norm(half, half, 3, 2, half), conv_norm(half, half))

    def forward(self, x):
        left = F.relu(self.step(2, self.step(1, x)))
        right = F.relu(self.step(5, self.step(4, F.relu(self.step(3, x)))))
        return shuffled(torch.cat([left, right], 1), 2)


class ShuffleNetV2(Unit):
    def __init__(self, num_classes=10, channels=(116, 232, 464), blocks=(3, 7, 3),
                 head_width=1024):
        super().__init__(conv_norm(3, 24, 3), conv_norm(channels[-1], head_width))
        width = 24
        for stage, (features, count) in enumerate(zip(channels, blocks), start=1):
            basic = [BasicUnit(features) for _ in range(count)]
            setattr(self, f"layer{stage}", nn.Sequential(DownUnit(width, features), *basic))
            width = features
        self.linear = nn.Linear(head_width, num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.step(1, x)))))
        return self.linear(pooled(F.relu(self.step(2, x))))
