"""MLP, CNN, ViT and fine-tuning on CIFAR-10 ("Deep Learning 2023 - Project I report").

    python -m jaxcifar.main --config=configs/architectures.py --list
    python -m jaxcifar.main --config=configs/architectures.py:cnn

Recipe of the report: 40,000 training and 10,000 validation images scaled to [0, 1], Adam at 1e-3 in
batches of 128, 30 to 100 epochs (from epoch 30 on, stop when the best of the last four validation
accuracies is the oldest), seeds 0, 1, 2; the epoch with the best validation accuracy counts.
Reported accuracy on validation, and on Kaggle, whose 10,000 scored images are the test set:
mlp_s about 40, 42.42; mlp_l about 10 (does not train); vit about 51, 54.08: one encoder layer, as
in the code (vit/depth6: six, as in the text). The CNN's grid is cnn/bBATCH_lrRATE_lL2_dDROPOUT_
and none, basic or basic_erasing. cnn, the default, is its best cell, b128_lr0.001_l0_d0.5_basic:
about 71, 72.52; with random erasing too about 65; without augmentation (cnn_plain) about 67, and
about 63 without dropout either. basic is flip, ColorJitter of zero strength and rotation by up to
10 degrees. The published code augments the validation images too; ours does not. finetune/: a new
last layer on ImageNet weights, at 1e-4: resnet18 about 77, efficientnet_v2_s about 73,
mobilenet_v3_small about 87, 83.16; frozen BatchNorms use batch statistics, as in the code.
"""

import itertools

from jaxcifar import config as config_lib

_BASIC = "flip|color_jitter(0, 0, 0, 0)|rotation(10)"
_AUGMENT = {"none": "", "basic": _BASIC, "basic_erasing": f"{_BASIC}|normalize|random_erasing"}
_GRID = {  # batch size, learning rate, weight decay (L2), dropout, augmentation
    f"cnn/b{b}_lr{r}_l{l2}_d{d}_{a}": (b, r, l2, d, _AUGMENT[a]) for b, r, l2, d, a in
    itertools.product((64, 128), (0.01, 0.001, 0.0001), (0, 0.01), (0, 0.5), _AUGMENT)}
_RUNS = {  # network, its options, batch size, learning rate, weight decay, augmentation
    "mlp_s": ("mlp_s", {"dropout_last": 0.1}, 128, 1e-3, 0.01, ""),
    "mlp_l": ("mlp_l", {"dropout_last": 0.1}, 128, 1e-3, 0.01, ""),
    "cnn": ("cnn3", {"dropout": 0.5}, 128, 1e-3, 0.0, _BASIC),
    "cnn_plain": ("cnn3", {"dropout": 0.5}, 128, 1e-3, 0.0, ""),
    "vit": ("vit", {"depth": 1}, 128, 1e-3, 0.0, ""),
    "vit/depth6": ("vit", {"depth": 6}, 128, 1e-3, 0.0, ""),
    **{name: ("cnn3", {"dropout": float(d)}, b, r, float(l2), augment)
       for name, (b, r, l2, d, augment) in _GRID.items()},
    "finetune/resnet18": ("imagenet_resnet18", {}, 128, 1e-4, 0.0, ""),
    "finetune/efficientnet_v2_s": ("efficientnet_v2_s", {}, 128, 1e-4, 0.0, ""),
    "finetune/mobilenet_v3_small": ("mobilenet_v3_small", {}, 128, 1e-4, 0.0, ""),
}
VARIANTS = tuple(_RUNS)


def get_config(variant="cnn"):
    """Return the configuration of one of the report's runs."""
    name, options, batch, rate, decay, augment = config_lib.choose(variant, _RUNS)
    config = config_lib.default()
    config.dataset, config.val_size = "cifar10", 10_000
    config.mean, config.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config.augment = augment
    config.model = config_lib.model(name, **options)
    config.epochs, config.batch_size = 100, batch
    config.optimizer.name, config.optimizer.learning_rate = "adam", rate
    config.optimizer.weight_decay = decay
    config.early_stopping.min_epochs, config.early_stopping.window = 30, 4
    config.selection = "best_val_accuracy"
    if variant.startswith("finetune/"):
        config_lib.fine_tune(config)
    return config
