"""PyTorch twin of GoogLeNet, with the state_dict names of kuangliu/pytorch-cifar."""

import torch
from torch import nn


def unit(width, features, kernel):
    return [nn.Conv2d(width, features, kernel, padding=kernel // 2), nn.BatchNorm2d(features),
            nn.ReLU()]


class Inception(nn.Module):
    def __init__(self, width, n1, r3, n3, r5, n5, pooled, kernel):
        super().__init__()
        self.b1 = nn.Sequential(*unit(width, n1, 1))
        self.b2 = nn.Sequential(*unit(width, r3, 1), *unit(r3, n3, kernel))
        self.b3 = nn.Sequential(
            *unit(width, r5, 1), *unit(r5, n5, kernel), *unit(n5, n5, kernel))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), *unit(width, pooled, 1))

    def forward(self, x):
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


class GoogLeNet(nn.Module):
    def __init__(self, num_classes=10, stem=3, width=1.0, whole=(), kernel=3, max_pool=(3, 1),
                 avg_pool=(8, 0), cells=1):
        super().__init__()
        plan = [("a3", 64, 96, 128, 16, 32, 32), ("b3", 128, 128, 192, 32, 96, 64),
                ("a4", 192, 96, 208, 16, 48, 64), ("b4", 160, 112, 224, 24, 64, 64),
                ("c4", 128, 128, 256, 24, 64, 64), ("d4", 112, 144, 288, 32, 64, 64),
                ("e4", 256, 160, 320, 32, 128, 128), ("a5", 256, 160, 320, 32, 128, 128),
                ("b5", 384, 192, 384, 48, 128, 128)]
        features = int(192 * width)
        self.pre_layers = nn.Sequential(*unit(3, features, stem))
        for name, *widths in plan:
            if name not in whole:
                widths = [int(n * width) for n in widths]
            setattr(self, name, Inception(features, *widths, kernel))
            features = widths[0] + widths[2] + widths[4] + widths[5]
        self.maxpool = nn.MaxPool2d(max_pool[0], 2, max_pool[1])
        self.avgpool = nn.AvgPool2d(avg_pool[0], 1, avg_pool[1])
        self.linear = nn.Linear(features * cells, num_classes)

    def forward(self, x):
        x = self.maxpool(self.b3(self.a3(self.pre_layers(x))))
        x = self.maxpool(self.e4(self.d4(self.c4(self.b4(self.a4(x))))))
        return self.linear(torch.flatten(self.avgpool(self.b5(self.a5(x))), 1))
