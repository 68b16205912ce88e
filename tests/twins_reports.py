"""PyTorch twins of the reports' own networks, written from the reports and their code."""

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    def __init__(self, num_classes=10, hidden=(1500, 500, 100), dropout_last=0.1,
                 activation="relu"):
        super().__init__()
        widths = [3 * 32 * 32, *hidden, num_classes]
        self.count = len(widths) - 1
        for i in range(self.count):
            setattr(self, f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))
        self.activation = getattr(torch, activation)
        self.dropout = nn.Dropout(dropout_last)

    def forward(self, x):
        x = torch.flatten(x, 1)
        for i in range(1, self.count):
            x = self.activation(getattr(self, f"fc{i}")(x))
        return getattr(self, f"fc{self.count}")(self.dropout(x))


class ViT(nn.Module):
    def __init__(self, num_classes=10, depth=1, patch=4, width=30, heads=6, mlp_dim=2048,
                 dropout=0.1):
        super().__init__()
        self.patch, pixels = patch, 3 * patch ** 2
        self.to_patch_embedding = nn.Sequential(
            nn.Identity(), nn.LayerNorm(pixels), nn.Linear(pixels, width), nn.LayerNorm(width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, (32 // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(width, heads, mlp_dim, dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, x):
        count, side = len(x), 32 // self.patch
        x = x.reshape(count, 3, side, self.patch, side, self.patch)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(count, side * side, -1)  # rows, columns, colours
        x = self.to_patch_embedding(x)
        x = torch.cat([self.cls_token.expand(count, -1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])


class CIFAR100CNN(nn.Module):
    def __init__(self, num_classes=100, filters=(128, 128, 128, 256), kernel_sizes=(5, 3, 3, 3),
                 batch_norm=False, fc_batch_norm=False, fc_width=4096, dropout=0.0):
        super().__init__()
        width, size = 3, 32
        for i, name in enumerate(("conv1", "conv2", "conv3", "conv_final")):
            stride = 2 if i == 0 else 1
            setattr(self, name, nn.Conv2d(width, filters[i], kernel_sizes[i], stride))
            setattr(self, name + "_bn",
                    nn.BatchNorm2d(filters[i]) if batch_norm else nn.Identity())
            width, size = filters[i], (size - kernel_sizes[i]) // stride + 1
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(width * (size // 2) ** 2, fc_width)
        self.fc1_bn = nn.BatchNorm1d(fc_width) if fc_batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(fc_width, num_classes)

    def forward(self, x):
        x = F.relu(self.conv1_bn(self.conv1(x)))
        x = F.relu(self.conv2_bn(self.conv2(x)))
        x = F.relu(self.conv3_bn(self.conv3(x)))
        x = F.relu(self.pool(self.conv_final_bn(self.conv_final(x))))
        x = F.relu(self.fc1_bn(self.fc1(torch.flatten(x, 1))))
        return self.fc2(self.dropout(x))


class SE(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width // 16, bias=False), nn.ReLU(),
                                nn.Linear(width // 16, width, bias=False), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class SEBottleneck(nn.Module):
    def __init__(self, width, features, stride, shortcut_kernel):
        super().__init__()
        self.conv1 = nn.Conv2d(width, features, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.conv3 = nn.Conv2d(features, features, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(features)
        self.se = SE(features)
        self.shortcut = nn.Sequential()
        if stride != 1 or width != features:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width, features, shortcut_kernel, stride, shortcut_kernel // 2,
                          bias=False),
                nn.BatchNorm2d(features))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.se(self.bn3(self.conv3(y))) + self.shortcut(x))


class Root(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.conv = nn.Conv2d(2 * features, features, 1, bias=False)
        self.bn = nn.BatchNorm2d(features)

    def forward(self, left, right):
        return F.relu(self.bn(self.conv(torch.cat([left, right], 1))))


class Tree(nn.Module):
    def __init__(self, width, features, level, stride, shortcut_kernel):
        super().__init__()
        self.root = Root(features)
        if level == 1:
            self.left_tree = SEBottleneck(width, features, stride, shortcut_kernel)
            self.right_tree = SEBottleneck(features, features, 1, shortcut_kernel)
        else:
            self.left_tree = Tree(width, features, level - 1, stride, shortcut_kernel)
            self.right_tree = Tree(features, features, level - 1, 1, shortcut_kernel)

    def forward(self, x):
        left = self.left_tree(x)
        return self.root(left, self.right_tree(left))


class SEDLA(nn.Module):
    def __init__(self, num_classes=10, C1=16, C2=32, C3=128, C4=256, filter_size=3,
                 shortcut_kernel=1, pool_size=4):
        super().__init__()
        def stem(width, features):
            return nn.Sequential(
                nn.Conv2d(width, features, filter_size, padding=filter_size // 2, bias=False),
                nn.BatchNorm2d(features), nn.ReLU())

        self.base, self.layer1, self.layer2 = stem(3, C1), stem(C1, C2), stem(C2, C3)
        self.layer3 = Tree(C3, C4, 1, 1, shortcut_kernel)
        self.layer4 = Tree(C4, C4, 2, 2, shortcut_kernel)
        self.layer5 = Tree(C4, C4, 2, 2, shortcut_kernel)
        self.layer6 = Tree(C4, C4, 1, 2, shortcut_kernel)
        self.avgpool = nn.AdaptiveAvgPool2d(pool_size)
        self.linear = nn.Linear(C4 * pool_size ** 2, num_classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.base(x)))
        x = self.layer6(self.layer5(self.layer4(self.layer3(x))))
        return self.linear(torch.flatten(self.avgpool(x), 1))
