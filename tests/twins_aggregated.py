"""PyTorch twins of DPN, RegNet, PNASNet and DLA, written for the tests, with pytorch-cifar's names.

Options are those of jaxcifar's models, defaults those of each first registered name.
"""

import torch
import torch.nn.functional as F
from torch import nn
from twins_mobile import SE, Unit, conv_norm, pooled


class DualPath(Unit):
    """DPN's bottleneck."""

    def __init__(self, width, inner, features, dense, stride, groups, project):
        total = features + dense
        super().__init__(conv_norm(width, inner), conv_norm(inner, inner, 3, stride, groups),
                         conv_norm(inner, total))
        self.shortcut = nn.Sequential(*(conv_norm(width, total, 1, stride) if project else ()))
        self.features = features

    def forward(self, x):
        y = self.step(3, F.relu(self.step(2, F.relu(self.step(1, x)))))
        x, d = self.shortcut(x), self.features
        return F.relu(torch.cat([x[:, :d] + y[:, :d], x[:, d:], y[:, d:]], 1))


class DPN(Unit):
    def __init__(self, num_classes=10, widths=(96, 192, 384, 768),
                 channels=(256, 512, 1024, 2048), blocks=(2, 2, 2, 2), dense=(16, 32, 24, 128),
                 groups=32, stem_width=64):
        super().__init__(conv_norm(3, stem_width, 3))
        last = stem_width
        for k in range(4):
            layers = []
            for i in range(blocks[k]):
                stride = 2 if k > 0 and i == 0 else 1
                shape = (widths[k], channels[k], dense[k], stride, groups)
                layers.append(DualPath(last, *shape, project=i == 0))
                last = channels[k] + (i + 2) * dense[k]
            setattr(self, f"layer{k + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x):
        x = F.relu(self.step(1, x))
        return self.linear(pooled(self.layer4(self.layer3(self.layer2(self.layer1(x))))))


class RegBlock(Unit):
    def __init__(self, width, features, stride, group_width, ratio, se_ratio):
        inner = int(round(features * ratio))
        super().__init__(conv_norm(width, inner),
                         conv_norm(inner, inner, 3, stride, inner // group_width),
                         conv_norm(inner, features))
        self.se = SE(inner, int(round(width * se_ratio)), F.relu) if se_ratio else nn.Identity()
        same = stride == 1 and width == features
        self.shortcut = nn.Sequential(*(() if same else conv_norm(width, features, 1, stride)))

    def forward(self, x):
        y = self.se(F.relu(self.step(2, F.relu(self.step(1, x)))))
        return F.relu(self.step(3, y) + self.shortcut(x))


class RegNet(Unit):
    def __init__(self, num_classes=10, channels=(24, 56, 152, 368), blocks=(1, 1, 4, 7),
                 strides=(1, 1, 2, 2), group_width=8, bottleneck_ratio=1, se_ratio=0,
                 stem_width=64):
        super().__init__(conv_norm(3, stem_width, 3))
        self.stages, width = len(channels), stem_width
        for k in range(self.stages):
            layers = []
            for i in range(blocks[k]):
                layers.append(RegBlock(width, channels[k], 1 if i else strides[k], group_width,
                                       bottleneck_ratio, se_ratio))
                width = channels[k]
            setattr(self, f"layer{k + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        x = F.relu(self.step(1, x))
        for k in range(self.stages):
            x = getattr(self, f"layer{k + 1}")(x)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class SepConv(Unit):
    def __init__(self, width, features, kernel, stride):
        super().__init__(conv_norm(width, features, kernel, stride, width))

    def forward(self, x):
        return self.step(1, x)


class CellA(nn.Module):
    kernels = (7,)

    def __init__(self, width, features, stride=1):
        super().__init__()
        for i, kernel in enumerate(self.kernels, start=1):
            setattr(self, f"sep_conv{i}", SepConv(width, features, kernel, stride))
        if stride == 2:
            self.conv1, self.bn1 = conv_norm(width, features)
        self.stride = stride

    def pooled(self, x):
        x = F.max_pool2d(x, 3, stride=self.stride, padding=1)
        return self.bn1(self.conv1(x)) if self.stride == 2 else x

    def forward(self, x):
        return F.relu(self.sep_conv1(x) + self.pooled(x))


class CellB(CellA):
    kernels = (7, 3, 5)

    def __init__(self, width, features, stride=1):
        super().__init__(width, features, stride)
        self.conv2, self.bn2 = conv_norm(2 * features, features)

    def forward(self, x):
        left = F.relu(self.sep_conv1(x) + self.sep_conv2(x))
        right = F.relu(self.pooled(x) + self.sep_conv3(x))
        return F.relu(self.bn2(self.conv2(torch.cat([left, right], 1))))


class PNASNet(Unit):
    def __init__(self, num_classes=10, cell="A", num_cells=6, width=44):
        super().__init__(conv_norm(3, width, 3))
        cell = {"A": CellA, "B": CellB}[cell]
        for k in range(3):
            w = width * 2 ** k
            cells = [cell(w, w) for _ in range(num_cells)]
            setattr(self, f"layer{2 * k + 1}", nn.Sequential(*cells))
            if k < 2:
                setattr(self, f"layer{2 * k + 2}", cell(w, 2 * w, 2))
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        x = F.relu(self.step(1, x))
        for k in range(5):
            x = getattr(self, f"layer{k + 1}")(x)
        return self.linear(pooled(x))


class Basic(Unit):
    def __init__(self, width, features, stride=1):
        super().__init__(conv_norm(width, features, 3, stride), conv_norm(features, features, 3))
        same = stride == 1 and width == features
        self.shortcut = nn.Sequential(*(() if same else conv_norm(width, features, 1, stride)))

    def forward(self, x):
        return F.relu(self.step(2, F.relu(self.step(1, x))) + self.shortcut(x))


class Root(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.conv, self.bn = conv_norm(width, features)

    def forward(self, *nodes):
        return F.relu(self.bn(self.conv(torch.cat(nodes, 1))))


class Tree(nn.Module):
    def __init__(self, width, features, level, stride):
        super().__init__()
        self.level = level
        self.root = Root((level + 2 if level > 1 else 2) * features, features)
        if level > 1:
            self.prev_root = Basic(width, features, stride)
            self.level_1 = Tree(width, features, 1, stride)
            width, stride = features, 1
        self.left_node = Basic(width, features, stride)
        self.right_node = Basic(features, features)

    def forward(self, x):
        nodes = []
        if self.level > 1:
            nodes.append(self.prev_root(x))
            x = self.level_1(x)
            nodes.append(x)
        left = self.left_node(x)
        return self.root(*nodes, left, self.right_node(left))


class SimpleTree(nn.Module):
    def __init__(self, width, features, level, stride):
        super().__init__()
        self.root = Root(2 * features, features)
        part = Basic if level == 1 else SimpleTree
        deeper = () if level == 1 else (level - 1,)
        self.left_tree = part(width, features, *deeper, stride)
        self.right_tree = part(features, features, *deeper, 1)

    def forward(self, x):
        left = self.left_tree(x)
        return self.root(left, self.right_tree(left))


class DLA(nn.Module):
    def __init__(self, num_classes=10, stem_channels=(16, 16, 32), channels=(64, 128, 256, 512),
                 levels=(1, 2, 2, 1), strides=(1, 2, 2, 2), simple=False):
        super().__init__()
        parts = {}
        for i, (width, features) in enumerate(zip((3, *stem_channels), stem_channels)):
            parts[f"layer{i}" if i else "base"] = nn.Sequential(
                *conv_norm(width, features, 3), nn.ReLU())
        tree, width = SimpleTree if simple else Tree, stem_channels[-1]
        for i, shape in enumerate(zip(channels, levels, strides), start=len(stem_channels)):
            parts[f"layer{i}"] = tree(width, *shape)
            width = channels[i - len(stem_channels)]
        for name, part in parts.items():
            self.add_module(name, part)
        self.parts = list(parts)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        for name in self.parts:
            x = getattr(self, name)(x)
        return self.linear(pooled(x))
