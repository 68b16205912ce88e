"""PyTorch twins of torchvision's ImageNet models, with its state_dict names.

Compared with torchvision 0.28 by hand: state_dict keys, their order and shapes, and the logits.
"""

import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, width, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride != 1 or width != features:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, features, 1, stride, bias=False), nn.BatchNorm2d(features))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ImageNetResNet(nn.Module):
    def __init__(self, num_classes=10, channels=(64, 128, 256, 512), blocks=(2, 2, 2, 2)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.pool = nn.MaxPool2d(3, 2, 1)
        width, self.stages = channels[0], len(channels)
        for stage, (features, count) in enumerate(zip(channels, blocks)):
            layer = []
            for i in range(count):
                layer.append(BasicBlock(width, features, 2 if stage and i == 0 else 1))
                width = features
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def conv_norm(width, features, kernel=1, stride=1, groups=1, activation=None, momentum=0.1):
    layers = [nn.Conv2d(width, features, kernel, stride, (kernel - 1) // 2, groups=groups,
                        bias=False),
              nn.BatchNorm2d(features, eps=1e-3, momentum=momentum)]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


class SqueezeExcitation(nn.Module):
    def __init__(self, width, squeeze, activation, gate):
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, width, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x):
        hidden = self.activation(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.gate(self.fc2(hidden))


def divisible(channels):
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class InvertedResidual(nn.Module):
    def __init__(self, width, kernel, expanded, features, squeeze, activation, stride):
        super().__init__()
        act = {"RE": nn.ReLU, "HS": nn.Hardswish}[activation]
        layers = []
        if expanded != width:
            layers.append(conv_norm(width, expanded, activation=act, momentum=0.01))
        layers.append(conv_norm(expanded, expanded, kernel, stride, expanded, act, 0.01))
        if squeeze:
            layers.append(SqueezeExcitation(
                expanded, divisible(expanded // 4), nn.ReLU, nn.Hardsigmoid))
        layers.append(conv_norm(expanded, features, momentum=0.01))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and width == features

    def forward(self, x):
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3(nn.Module):
    def __init__(self, num_classes=10, *, blocks, stem_width=16, last_width=1024, dropout=0.2):
        super().__init__()
        layers = [conv_norm(3, stem_width, 3, 2, activation=nn.Hardswish, momentum=0.01)]
        width = stem_width
        for block in blocks:
            layers.append(InvertedResidual(width, *block))
            width = block[2]
        layers.append(conv_norm(width, 6 * width, activation=nn.Hardswish, momentum=0.01))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(6 * width, last_width), nn.Hardswish(), nn.Dropout(dropout),
            nn.Linear(last_width, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width, kind, expansion, stride, features):
        super().__init__()
        expanded = divisible(width * expansion)
        if kind == "fused" and expanded == width:
            layers = [conv_norm(width, features, 3, stride, activation=nn.SiLU)]
        elif kind == "fused":
            layers = [conv_norm(width, expanded, 3, stride, activation=nn.SiLU),
                      conv_norm(expanded, features)]
        else:
            layers = [conv_norm(width, expanded, activation=nn.SiLU),
                      conv_norm(expanded, expanded, 3, stride, expanded, nn.SiLU),
                      SqueezeExcitation(expanded, max(1, width // 4), nn.SiLU, nn.Sigmoid),
                      conv_norm(expanded, features)]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and width == features

    def forward(self, x):  # stochastic depth is off in evaluation, and zero in the training test
        return x + self.block(x) if self.residual else self.block(x)


class EfficientNetV2(nn.Module):
    def __init__(self, num_classes=10, *, stages, stem_width=24, last_width=1280, dropout=0.2,
                 stochastic_depth=0.0):
        super().__init__()
        layers = [conv_norm(3, stem_width, 3, 2, activation=nn.SiLU)]
        width = stem_width
        for kind, expansion, stride, features, count in stages:
            stage = []
            for i in range(count):
                stage.append(Block(width, kind, expansion, 1 if i else stride, features))
                width = features
            layers.append(nn.Sequential(*stage))
        layers.append(conv_norm(width, last_width, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last_width, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


SMALL = (  # torchvision's mobilenet_v3_small: table 2 of the paper
    (3, 16, 16, True, "RE", 2), (3, 72, 24, False, "RE", 2), (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2), (5, 240, 40, True, "HS", 1), (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1), (5, 144, 48, True, "HS", 1), (5, 288, 96, True, "HS", 2),
    (5, 576, 96, True, "HS", 1), (5, 576, 96, True, "HS", 1))
S = (  # torchvision's efficientnet_v2_s: table 4 of the paper
    ("fused", 1, 1, 24, 2), ("fused", 4, 2, 48, 4), ("fused", 4, 2, 64, 4),
    ("mb", 4, 2, 128, 6), ("mb", 6, 1, 160, 9), ("mb", 6, 2, 256, 15))
