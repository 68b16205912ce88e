"""MLP, CNN and ViT on CIFAR-10 ("Deep Learning 2023 - Project I report"): so far the CNN's best cell.

    python -m jaxcifar.main --config=configs/architectures.py:cnn

Recipe of the report: 40,000 training and 10,000 validation images scaled to [0, 1], Adam at 1e-3 in
batches of 128, 30 to 100 epochs (from epoch 30 on, stop when the best of the last four validation
accuracies is the oldest of them), seeds 0, 1, 2; the epoch with the best validation accuracy counts.
cnn: dropout 0.5, flip and rotation by up to 10 degrees (the report's ColorJitter has strength zero).
Reported: about 71% validation accuracy. cnn_plain: no augmentation, about 67%.
"""

from jaxcifar import config as config_lib

VARIANTS = ("cnn", "cnn_plain")
_AUGMENT = {"cnn": "flip|color_jitter(0, 0, 0, 0)|rotation(10)", "cnn_plain": ""}


def get_config(variant="cnn"):
    """Return the configuration of one of the report's networks."""
    config = config_lib.default()
    config.dataset = "cifar10"
    config.val_size = 10_000
    config.mean, config.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config.augment = config_lib.choose(variant or "cnn", _AUGMENT)
    config.model = config_lib.model("cnn3", dropout=0.5)
    config.epochs = 100
    config.batch_size = 128
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.early_stopping.min_epochs = 30
    config.early_stopping.window = 4
    config.selection = "best_val_accuracy"
    return config
