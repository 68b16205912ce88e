"""Fine-tuning without ImageNet weights: a network trained on CIFAR-100 stands in for them.

    python -m jaxcifar.main --config=configs/finetune_standin.py:pretrain --workdir=runs/standin
    python -m jaxcifar.main --config=configs/finetune_standin.py:whole --config.init_from=runs/standin

It shows that the path of configs/cifar100.py:finetune and configs/architectures.py:finetune/ works, on
a CPU: a ResNet-18 of half the width with the ImageNet stem (2.8 million parameters), images enlarged
to 64x64. pretrain: CIFAR-100, 16 epochs. Then CIFAR-10, one epoch each: frozen trains a new last
layer (the rest is computed once), whole all layers, scratch the same from its initial values; all are
tested once, at the end. README.md has what they reached.
"""

from jaxcifar import config as config_lib

VARIANTS = ("pretrain", "frozen", "whole", "scratch")


def get_config(variant="whole"):
    """Return the configuration of the pretraining, or of one of the three runs to compare."""
    config_lib.choose(variant, dict.fromkeys(VARIANTS))
    config = config_lib.default()
    config.model = config_lib.model("imagenet_resnet18", channels=(32, 64, 128, 256))
    config.val_size = 0
    config.augment = "resize(64)"
    config.optimizer.name, config.optimizer.learning_rate = "adam", 1e-3
    config.schedule.name = "linear"
    config.epochs = 1
    if variant == "pretrain":
        config.dataset, config.augment = "cifar100", "crop(4)|flip|resize(64)"
        config.epochs = 16
    if variant in ("frozen", "whole"):
        config.init_from = "runs/standin"
    if variant == "frozen":
        config.trainable, config.frozen_batch_norm = "^fc/", "running"
        config.optimizer.learning_rate = 1e-2  # of one layer
    return config
