"""Fully connected and convolutional networks on CIFAR-100 ("Report Homework 3 - Deep Learning").

    python -m jaxcifar.main --config=configs/cifar100.py --list
    python -m jaxcifar.main --config=configs/cifar100.py:cnn/bn

Recipe of the report: all 50,000 training images, Adam at 1e-4 in batches of 256, 20 epochs; the
test set is measured after every epoch and the last epoch counts. Pixels in [-1, 1] and a dropped
partial batch are what the course's published code does; ours tests all 10,000 images, it 9,984.
Reported test accuracy: nn 26; cnn/32 28-30, cnn/128 31, cnn/256 34, cnn/512 36 (width of the first
convolution); on cnn/128: cnn/bn 42, cnn/bn_fc8192 43, cnn/bn_dropout about 43, cnn/flip 36,
cnn/crop 39 (not described; ours: as RandomCrop(32, padding=4)). cnn/bn is the default. finetune,
83: all layers of torchvision's ResNet-18, from its ImageNet weights, at 224x224 in batches of 128,
10 epochs, with an augmentation that the report does not describe (ours: crop from 256x256, at test
from its middle, and flip); finetune/plain, 76: without. own, 60: from scratch with SGD and flips,
not described further; ours is a ResNet-18 of half the width, 12 epochs in one cycle of the learning
rate, crops too: 67.1.
"""

from jaxcifar import config as config_lib

_CNN = {  # options of the network, augmentation
    "cnn/32": ({"filters": (32, 32, 32, 64)}, ""),
    "cnn/128": ({"filters": (128, 128, 128, 256)}, ""),
    "cnn/256": ({"filters": (256, 256, 256, 512)}, ""),
    "cnn/512": ({"filters": (512, 512, 512, 1024)}, ""),
    "cnn/bn": ({"batch_norm": True}, ""),
    "cnn/bn_fc8192": ({"batch_norm": True, "fc_width": 8192}, ""),
    "cnn/bn_dropout": ({"batch_norm": True, "dropout": 0.5}, ""),
    "cnn/flip": ({}, "flip"),
    "cnn/crop": ({}, "crop(4)"),
}
_FINETUNE = {"finetune": "resize(256)|crop(0, size=224)|flip", "finetune/plain": "resize(224)"}
_TESTED = {"finetune": "resize(256)|center_crop(224)", "finetune/plain": "resize(224)"}
_RUNS = {"nn": ("cifar100_nn", {}, ""),
         "own": ("resnet18", {"channels": (32, 64, 128, 256)}, "crop(4)|flip"),
         **{name: ("cifar100_cnn", *values) for name, values in _CNN.items()},
         **{name: ("imagenet_resnet18", {}, augment) for name, augment in _FINETUNE.items()}}
VARIANTS = tuple(_RUNS)


def get_config(variant="cnn/bn"):
    """Return the configuration of one of the report's networks."""
    name, options, augment = config_lib.choose(variant, _RUNS)
    config = config_lib.default()
    config.dataset, config.val_size = "cifar100", 0
    config.mean = config.std = (0.5, 0.5, 0.5)
    config.augment = augment
    config.model = config_lib.model(name, **options)
    config.epochs, config.batch_size, config.drop_last = 20, 256, True
    config.optimizer.name, config.optimizer.learning_rate = "adam", 1e-4
    if variant in _FINETUNE:
        config.init_from, config.eval_transform = "ResNet18_Weights.IMAGENET1K_V1", _TESTED[variant]
        config.epochs, config.batch_size, config.eval_batch_size = 10, 128, 256
    if variant == "own":
        config.epochs, config.batch_size = 12, 128
        config.optimizer.update(
            name="sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        config.schedule.name, config.schedule.pct_start = "one_cycle", 0.25
    config.test_every_epoch, config.selection = True, "last"
    return config
