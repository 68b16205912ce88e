"""Parameter counts and twins of the classic families, by registered name."""

from twins_densenet import DenseNet
from twins_googlenet import GoogLeNet
from twins_resnet import (BasicBlock, Bottleneck, PreActBlock, PreActBottleneck, ResNet, ResNeXt,
                          SEBlock, WideResNet)
from twins_vgg import PLANS, VGG, LeNet

MODELS = {  # parameters, the twin's constructor
    "lenet": (62006, LeNet),
    "vgg11": (9231114, lambda **kw: VGG(PLANS["vgg11"], **kw)),
    "vgg13": (9416010, lambda **kw: VGG(PLANS["vgg13"], **kw)),
    "vgg16": (14728266, lambda **kw: VGG(PLANS["vgg16"], **kw)),
    "vgg19": (20040522, lambda **kw: VGG(PLANS["vgg19"], **kw)),
    "resnet18": (11173962, lambda **kw: ResNet(BasicBlock, (2, 2, 2, 2), **kw)),
    "resnet34": (21282122, lambda **kw: ResNet(BasicBlock, (3, 4, 6, 3), **kw)),
    "resnet50": (23520842, lambda **kw: ResNet(Bottleneck, (3, 4, 6, 3), **kw)),
    "resnet101": (42512970, lambda **kw: ResNet(Bottleneck, (3, 4, 23, 3), **kw)),
    "resnet152": (58156618, lambda **kw: ResNet(Bottleneck, (3, 8, 36, 3), **kw)),
    "preact_resnet18": (
        11171146, lambda **kw: ResNet(PreActBlock, (2, 2, 2, 2), norm=False, **kw)),
    "preact_resnet34": (
        21279306, lambda **kw: ResNet(PreActBlock, (3, 4, 6, 3), norm=False, **kw)),
    "preact_resnet50": (
        23509066, lambda **kw: ResNet(PreActBottleneck, (3, 4, 6, 3), norm=False, **kw)),
    "preact_resnet101": (
        42501194, lambda **kw: ResNet(PreActBottleneck, (3, 4, 23, 3), norm=False, **kw)),
    "preact_resnet152": (
        58144842, lambda **kw: ResNet(PreActBottleneck, (3, 8, 36, 3), norm=False, **kw)),
    "senet18": (11260354, lambda **kw: ResNet(SEBlock, (2, 2, 2, 2), **kw)),
    "resnext29_2x64d": (9128778, lambda **kw: ResNeXt(2, 64, **kw)),
    "resnext29_4x64d": (27104586, lambda **kw: ResNeXt(4, 64, **kw)),
    "resnext29_8x64d": (89598282, lambda **kw: ResNeXt(8, 64, **kw)),
    "resnext29_32x4d": (4774218, lambda **kw: ResNeXt(32, 4, **kw)),
    "googlenet": (6166250, GoogLeNet),
    "densenet121": (6956298, lambda **kw: DenseNet((6, 12, 24, 16), 32, **kw)),
    "densenet161": (26482378, lambda **kw: DenseNet((6, 12, 36, 24), 48, **kw)),
    "densenet169": (12493322, lambda **kw: DenseNet((6, 12, 32, 32), 32, **kw)),
    "densenet201": (18104330, lambda **kw: DenseNet((6, 12, 48, 32), 32, **kw)),
    "densenet_cifar": (1000618, lambda **kw: DenseNet((6, 12, 24, 16), 12, **kw)),
    "wide_resnet28_10": (36479194, lambda **kw: WideResNet(28, 10, **kw)),
    "wide_resnet16_8": (10961370, lambda **kw: WideResNet(16, 8, **kw)),
}
HALF = {"stem": 5, "width": 0.5, "whole": ("a4",)}
HALF_K5 = HALF | {"kernel": 5}
GOOGLENETS = {  # parameters, the twin's options
    "k3": (6166250, {}),
    "k5": (6175466, {"stem": 5}),
    "0_5": (1798122, HALF | {"stem": 3}),
    "k5_0_5": (1802730, HALF),
    "k3_k5_0_5_p2": (3799530, HALF_K5),
    "k3_k5_0_5_p2_k5": (3814890, HALF_K5 | {"avg_pool": (9, 1), "cells": 4}),
    "0_5_v5": (3799530, HALF_K5 | {"avg_pool": (7, 0), "max_pool": (5, 1)}),
}
