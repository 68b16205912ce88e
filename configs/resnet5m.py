"""ResNets under 5 million parameters on CIFAR-10 ("Deep Learning Mini Project").

    python -m jaxcifar.main --config=configs/resnet5m.py --workdir=runs/resnet5m
    python -m jaxcifar.main --config=configs/resnet5m.py:model2        # --list names all

Recipe of the report: 45,000 training and 5,000 validation images, Adam at 1e-3 in batches of 64,
150 epochs, the rate divided by 10 after 10 epochs without a better validation loss; the epoch with
the lowest validation loss is tested once. Reported test accuracy: model1 94.63, model2 94.39,
model3 94.10, model4 84.02 (no augmentation), model5 93.77 (five stages), model6 93.79 in the table
and 92.92 in the authors' log (SGD without schedule). model1 is the default. What led to them:
optimizer/NAME (100 epochs), shortcut/kSIZE (40, as blocks: the report does not say), both without
augmentation; blocks/COUNTS (40); channels/WIDTHS (the report gives only their sizes).
"""

from jaxcifar import config as config_lib

_FULL, _SMALL = (64, 128, 128, 256), (32, 64, 128, 256)
_TWO = (2, 2, 2, 2)
_WIDTHS = (_SMALL, (64, 64, 128, 256), (32, 128, 128, 256), (32, 64, 256, 256), (32, 64, 128, 372))
_BLOCKS = ("2222", "3222", "3322", "3332", "4332", "5432", "8432")
_RUNS = {  # channels, blocks per stage, kernel of the shortcuts, epochs, augmentation, optimizer
    "model1": (_FULL, (5, 4, 3, 2), 3, 150, True, "adam"),
    "model2": (_SMALL, (10, 8, 6, 2), 3, 150, True, "adam"),
    "model3": ((32, 128, 128, 256), (10, 4, 4, 2), 3, 150, True, "adam"),
    "model4": (_FULL, (5, 4, 3, 2), 3, 150, False, "adam"),
    "model5": ((32, 64, 128, 128, 256), (5, 4, 4, 3, 2), 3, 150, True, "adam"),
    "model6": (_FULL, (5, 4, 3, 2), 3, 150, True, "sgd"),
    **{f"optimizer/{o}": (_SMALL, _TWO, 1, 100, False, o) for o in ("sgd", "adamw", "adam")},
    **{f"channels/{'-'.join(map(str, c))}": (c, _TWO, 1, 150, True, "adam") for c in _WIDTHS},
    **{f"shortcut/k{k}": (_SMALL, _TWO, k, 40, False, "adam") for k in (1, 2, 3)},
    **{f"blocks/{b}": (_FULL, tuple(map(int, b)), 1, 40, True, "adam") for b in _BLOCKS},
}
VARIANTS = tuple(_RUNS)


def get_config(variant="model1"):
    """Return the configuration of one of the report's networks."""
    channels, blocks, kernel, epochs, augment, optimizer = config_lib.choose(variant, _RUNS)
    config = config_lib.default()
    config.dataset, config.val_size = "cifar10", 5000
    config.augment = "rotation(5)|flip|crop(2)|autoaugment" if augment else ""
    config.model = config_lib.model("resnet5m", channels=channels, blocks=blocks, kernel_size=3,
                                    shortcut_kernel=kernel, stem_width=32,
                                    pool=2 if len(channels) == 5 else 4)
    config.max_params = 5_000_000
    config.epochs, config.batch_size = epochs, 64
    config.optimizer.name = optimizer
    config.optimizer.learning_rate = 1e-3
    config.optimizer.momentum = 0.9 if optimizer == "sgd" else 0.0
    config.optimizer.weight_decay = 0.01 if optimizer == "adamw" else 0.0  # torch's defaults
    config.schedule.name = "constant" if variant == "model6" else "plateau"
    config.selection = "best_val_loss"
    config.reference_curve = f"resnet5m_{variant}" if variant.startswith("model") else ""
    return config
