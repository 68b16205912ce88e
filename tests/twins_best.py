"""PyTorch twins of the networks of configs/resnet5m_best.py: Shake-Shake, and wide ResNets with SE.

Shake-Shake has the names of owruby/shake-shake_pytorch, with a BatchNorm (bn_in) in place of the
stem's biases, as in Gastaldi's code; wide ResNets those of xternalz/WideResNet-pytorch.
"""

import torch
import torch.nn.functional as F
from torch import nn
from twins_resnet import conv


class Mix(torch.autograd.Function):
    """alpha a + (1 - alpha) b forward, beta and 1 - beta backward; alpha, beta: [N]."""

    @staticmethod
    def forward(ctx, a, b, alpha, beta):
        ctx.beta = beta.view(-1, 1, 1, 1)
        alpha = alpha.view(-1, 1, 1, 1)
        return alpha * a + (1 - alpha) * b

    @staticmethod
    def backward(ctx, grad):
        return ctx.beta * grad, (1 - ctx.beta) * grad, None, None


class ShakeBlock(nn.Module):
    coefficients = None  # (alpha [N], beta [N]) of the coming pass in training

    def __init__(self, width, features, stride):
        super().__init__()
        self.branch1, self.branch2 = (nn.Sequential(
            nn.ReLU(), conv(width, features, 3, stride), nn.BatchNorm2d(features),
            nn.ReLU(), conv(features, features, 3), nn.BatchNorm2d(features)) for _ in range(2))
        self.same = width == features
        if not self.same:
            self.shortcut = ShakeShortcut(width, features, stride)

    def forward(self, x):
        a, b = self.branch1(x), self.branch2(x)
        y = Mix.apply(a, b, *self.coefficients) if self.training else 0.5 * a + 0.5 * b
        return (x if self.same else self.shortcut(x)) + y


class ShakeShortcut(nn.Module):
    def __init__(self, width, features, stride):
        super().__init__()
        self.stride = stride
        self.conv1, self.conv2 = conv(width, features // 2, 1), conv(width, features // 2, 1)
        self.bn = nn.BatchNorm2d(features)

    def forward(self, x):
        x = F.relu(x)
        moved = F.pad(x, (-1, 1, -1, 1))  # a negative side crops
        return self.bn(torch.cat([self.conv1(F.avg_pool2d(x, 1, self.stride)),
                                  self.conv2(F.avg_pool2d(moved, 1, self.stride))], 1))


class ShakeShake(nn.Module):
    def __init__(self, depth=26, width=32, num_classes=10):
        super().__init__()
        self.c_in, self.bn_in = conv(3, 16, 3), nn.BatchNorm2d(16)
        features = 16
        for stage in range(3):
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(ShakeBlock(features, width, 2 if stage and not i else 1))
                features = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            width *= 2
        self.fc_out = nn.Linear(features, num_classes)

    def blocks(self):
        return [*self.layer1, *self.layer2, *self.layer3]

    def forward(self, x):
        x = self.bn_in(self.c_in(x))
        for block in self.blocks():
            x = block(x)
        return self.fc_out(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


class Excitation(nn.Module):
    def __init__(self, features, hidden):
        super().__init__()
        self.se1, self.se2 = nn.Conv2d(features, hidden, 1), nn.Conv2d(hidden, features, 1)

    def forward(self, x):
        hidden = F.relu(self.se1(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.se2(hidden))


class WideBlock(nn.Module):
    keep = None  # the branch's factor for each image, [N], in training; None: all 1

    def __init__(self, width, features, stride, reduction):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, features, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(features), conv(features, features, 3)
        if width != features:
            self.convShortcut = conv(width, features, 1, stride)
        self.se = Excitation(features, features // reduction)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = self.convShortcut(y) if hasattr(self, "convShortcut") else x
        y = self.se(self.conv2(F.relu(self.bn2(self.conv1(y)))))
        if self.training and self.keep is not None:
            y = y * self.keep.view(-1, 1, 1, 1)
        return x + y


class WideResNet(nn.Module):
    def __init__(self, depth=28, width=3.5, reduction=8, num_classes=10):
        super().__init__()
        self.conv1, features = conv(3, 16, 3), 16
        for stage in range(3):
            layer = nn.Sequential()
            for i in range((depth - 4) // 6):
                wider = int(16 * width * 2 ** stage)
                layer.append(WideBlock(features, wider, 2 if stage and not i else 1, reduction))
                features = wider
            setattr(self, f"block{stage + 1}", nn.ModuleDict({"layer": layer}))
        self.bn1, self.fc = nn.BatchNorm2d(features), nn.Linear(features, num_classes)

    def blocks(self):
        return [*self.block1["layer"], *self.block2["layer"], *self.block3["layer"]]

    def forward(self, x):
        x = self.conv1(x)
        for block in self.blocks():
            x = block(x)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1).flatten(1))
