"""PyTorch twin of DenseNet, with the state_dict names of kuangliu/pytorch-cifar."""

import torch
import torch.nn.functional as F
from torch import nn


class Bottleneck(nn.Module):
    def __init__(self, width, growth):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([self.conv2(F.relu(self.bn2(y))), x], 1)


class Transition(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, features, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    def __init__(self, blocks, growth, num_classes=10):
        super().__init__()
        width = 2 * growth
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stages = len(blocks)
        for stage, count in enumerate(blocks, start=1):
            layer = [Bottleneck(width + i * growth, growth) for i in range(count)]
            setattr(self, f"dense{stage}", nn.Sequential(*layer))
            width += count * growth
            if stage < len(blocks):
                setattr(self, f"trans{stage}", Transition(width, width // 2))
                width //= 2
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"dense{stage}")(x)
            if stage < self.stages:
                x = getattr(self, f"trans{stage}")(x)
        x = F.relu(self.bn(x))
        return self.linear(torch.flatten(F.avg_pool2d(x, x.shape[-1]), 1))
