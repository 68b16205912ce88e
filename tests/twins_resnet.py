"""PyTorch twins of the residual families, with the state_dict names of kuangliu/pytorch-cifar.

Wide networks have the names of xternalz/WideResNet-pytorch.
"""

import torch
import torch.nn.functional as F
from torch import nn


def conv(width, features, kernel, stride=1, groups=1):
    return nn.Conv2d(width, features, kernel, stride, kernel // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, width, features, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(width, features, 3, stride), nn.BatchNorm2d(features)
        self.conv2, self.bn2 = conv(features, features, 3), nn.BatchNorm2d(features)
        self.shortcut = projection(width, features, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, width, features, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(width, features, 1), nn.BatchNorm2d(features)
        self.conv2, self.bn2 = conv(features, features, 3, stride), nn.BatchNorm2d(features)
        self.conv3, self.bn3 = conv(features, 4 * features, 1), nn.BatchNorm2d(4 * features)
        self.shortcut = projection(width, 4 * features, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def projection(width, features, stride, norm=True):
    if stride == 1 and width == features:
        return nn.Sequential()
    entries = [nn.Conv2d(width, features, 1, stride, bias=False)]
    return nn.Sequential(*entries, *[nn.BatchNorm2d(features)] * norm)


class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, width, features, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, features, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(features), conv(features, features, 3)
        if stride != 1 or width != features:
            self.shortcut = projection(width, features, stride, norm=False)

    def excite(self, y):
        return y

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = self.shortcut(y) if hasattr(self, "shortcut") else x
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return self.excite(y) + shortcut


class SEBlock(PreActBlock):
    def __init__(self, width, features, stride, reduction=16):
        super().__init__(width, features, stride)
        self.fc1 = nn.Conv2d(features, features // reduction, 1)
        self.fc2 = nn.Conv2d(features // reduction, features, 1)

    def excite(self, y):
        w = F.relu(self.fc1(F.avg_pool2d(y, y.size(2))))
        return y * torch.sigmoid(self.fc2(w))


class PreActBottleneck(nn.Module):
    expansion = 4

    def __init__(self, width, features, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, features, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(features), conv(features, features, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(features), conv(features, 4 * features, 1)
        if stride != 1 or width != 4 * features:
            self.shortcut = projection(width, 4 * features, stride, norm=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = self.shortcut(y) if hasattr(self, "shortcut") else x
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return self.conv3(F.relu(self.bn3(y))) + shortcut


class ResNeXtBlock(nn.Module):
    def __init__(self, width, cardinality, bottleneck_width, stride):
        super().__init__()
        group = cardinality * bottleneck_width
        self.conv1, self.bn1 = conv(width, group, 1), nn.BatchNorm2d(group)
        self.conv2 = conv(group, group, 3, stride, cardinality)
        self.bn2 = nn.BatchNorm2d(group)
        self.conv3, self.bn3 = conv(group, 2 * group, 1), nn.BatchNorm2d(2 * group)
        self.shortcut = projection(width, 2 * group, stride)

    forward = Bottleneck.forward


class ResNet(nn.Module):
    """`norm`: a BatchNorm and ReLU after the stem, which pre-activation networks do without."""

    def __init__(self, block, blocks, num_classes=10, channels=(64, 128, 256, 512), norm=True,
                 stem_width=64):
        super().__init__()
        self.conv1 = conv(3, stem_width, 3)
        if norm:
            self.bn1 = nn.BatchNorm2d(stem_width)
        width = stem_width
        self.stages = len(blocks)
        for stage, (features, count) in enumerate(zip(channels, blocks)):
            layer = []
            for i in range(count):
                layer.append(block(width, features, 2 if stage > 0 and i == 0 else 1))
                width = features * getattr(block, "expansion", 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        if hasattr(self, "bn1"):
            x = F.relu(self.bn1(x))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.linear(torch.flatten(F.avg_pool2d(x, x.shape[-1]), 1))


class ResNeXt(nn.Module):
    def __init__(self, cardinality, bottleneck_width, blocks=(3, 3, 3), num_classes=10,
                 stem_width=64):
        super().__init__()
        self.conv1, self.bn1 = conv(3, stem_width, 1), nn.BatchNorm2d(stem_width)
        width, self.stages = stem_width, len(blocks)
        for stage, count in enumerate(blocks):
            layer = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                layer.append(ResNeXtBlock(width, cardinality, bottleneck_width, stride))
                width = 2 * cardinality * bottleneck_width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
            bottleneck_width *= 2
        self.linear = nn.Linear(width, num_classes)

    forward = ResNet.forward


class WideBlock(nn.Module):
    def __init__(self, width, features, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, features, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(features), conv(features, features, 3)
        self.same = width == features
        if not self.same:
            self.convShortcut = nn.Conv2d(width, features, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = x if self.same else self.convShortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideStage(nn.Module):
    def __init__(self, count, width, features, stride):
        super().__init__()
        rest = [WideBlock(features, features, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(WideBlock(width, features, stride), *rest)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth, width, num_classes=10):
        super().__init__()
        count = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = WideStage(count, 16, 16 * width, 1)
        self.block2 = WideStage(count, 16 * width, 32 * width, 2)
        self.block3 = WideStage(count, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(torch.flatten(F.avg_pool2d(F.relu(self.bn1(x)), 8), 1))
