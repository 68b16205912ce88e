"""The speedruns' network in PyTorch: jaxcifar.models.speedrun_net, weight for weight.

Written from the description in arXiv 2404.00498. The first layer is a convolution, as published: in
float16, as torch_rival has it on a GPU, it is as exact as our float32 product is there (TF32, of as
many bits). torch is imported when a network is made.
"""

import functools


def create(num_classes=10, channels=(64, 256, 256), depth=2, bn_momentum=0.4, head_scale=1 / 9,
           head_std=0.0, draw_bias=False):
    """Return the torch.nn.Module of a network; the options are those of SpeedrunNet in Flax.

    It maps images, float [N, 3, 32, 32], to logits [N, num_classes]; `forward(images, False)` keeps
    the first layer's bias out of the gradient. Its state_dict has the names that
    `jaxcifar.torch_weights` knows.
    """
    return _network()(num_classes, tuple(channels), depth, bn_momentum, head_scale, head_std,
                      draw_bias)


@functools.cache
def _norm():
    """Return the class of BatchNorm without a scale."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Norm(nn.Module):
        def __init__(self, features, momentum):
            super().__init__()
            self.bn = nn.BatchNorm2d(features, 1e-12, momentum, affine=False)
            self.bias = nn.Parameter(torch.zeros(features))
            # One kernel adds the bias too, and cuDNN's, where it is one, asks for a scale.
            self.register_buffer("ones", torch.ones(features), persistent=False)

        def reset(self):
            self.bn.reset_running_stats()
            nn.init.zeros_(self.bias)

        def forward(self, x):
            bn = self.bn
            return F.batch_norm(x, bn.running_mean, bn.running_var, self.ones, self.bias,
                                self.training, bn.momentum, bn.eps)
    return Norm


@functools.cache
def _group():
    """Return the class of a group of convolutions."""
    import torch.nn.functional as F
    from torch import nn
    Norm = _norm()

    class ConvGroup(nn.Module):
        def __init__(self, width, features, depth, momentum):
            super().__init__()
            self.depth = depth
            for i in range(1, depth + 1):
                conv = nn.Conv2d(width if i == 1 else features, features, 3, padding=1, bias=False)
                setattr(self, f"conv{i}", conv)
                setattr(self, f"norm{i}", Norm(features, momentum))

        def reset(self):
            for i in range(1, self.depth + 1):
                weight = getattr(self, f"conv{i}").weight
                getattr(self, f"conv{i}").reset_parameters()
                nn.init.dirac_(weight.data[:weight.shape[1]])
                getattr(self, f"norm{i}").reset()

        def forward(self, x):
            x = shortcut = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
            x = F.gelu(self.norm2(self.conv2(x)))
            return x if self.depth == 2 else F.gelu(shortcut + self.norm3(self.conv3(x)))
    return ConvGroup


@functools.cache
def _network():
    """Return the class of the network."""
    import torch.nn.functional as F
    from torch import nn
    ConvGroup = _group()

    class SpeedrunNet(nn.Module):
        def __init__(self, num_classes, channels, depth, momentum, head_scale, head_std, draw_bias):
            super().__init__()
            self.whiten = nn.Conv2d(3, 24, 2)
            for i, (width, features) in enumerate(zip((24, *channels), channels), start=1):
                setattr(self, f"group{i}", ConvGroup(width, features, depth, momentum))
            self.groups = len(channels)
            side = (31 >> len(channels)) // 3  # of the last map
            self.head = nn.Linear(channels[-1] * side * side, num_classes, bias=False)
            self.head_scale, self.head_std, self.draw_bias = head_scale, head_std, draw_bias
            self.reset()

        def reset(self):
            """Draw all weights anew, in place: what was compiled goes on with them."""
            self.whiten.reset_parameters()
            if not self.draw_bias:
                nn.init.zeros_(self.whiten.bias)
            for i in range(1, self.groups + 1):
                getattr(self, f"group{i}").reset()
            self.head.reset_parameters()
            if self.head_std:
                self.head.weight.data *= self.head_std / self.head.weight.data.std()

        def forward(self, x, train_bias=True):
            bias = self.whiten.bias if train_bias else self.whiten.bias.detach()
            x = F.gelu(F.conv2d(x, self.whiten.weight, bias))
            for i in range(1, self.groups + 1):
                x = getattr(self, f"group{i}")(x)
            return self.head(F.max_pool2d(x, 3).flatten(1)) * self.head_scale
    return SpeedrunNet
