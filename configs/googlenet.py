"""GoogLeNet's variants and others on CIFAR-10 ("Deep Learning Mini-Project - Fall 2022").

    python -m jaxcifar.main --config=configs/googlenet.py --list
    python -m jaxcifar.main --config=configs/googlenet.py:table3/0_5_v5/lr0.05_wd5e-5

Recipe of the report, that of kuangliu/pytorch-cifar: all 50,000 training images, SGD with momentum
0.9 in batches of 128, weight decay on all parameters, crop and flip. The cosine has T_max 200, so
runs of 2 to 25 epochs see only its start. The test set is measured after every epoch and the last
epoch counts. Reported test accuracy (jaxcifar/report/published.csv has every number):
table1/NETWORK: 2 epochs, 53.47 (resnet18) to 62.91 (densenet121)
table2/MODEL: 8 epochs, 68.03 (k3_k5_0_5_p2_k5) to 78.48 (k5_0_5), k3, GoogLeNet itself, 72.51
table3/MODEL/lrRATE_wdDECAY: 10 epochs, up to 86.31
long: 25 epochs of 0_5_v5, about 88; the default
"""

from jaxcifar import config as config_lib
from jaxcifar.models.googlenet import VARIANTS as MODELS

_NETWORKS = ("resnet18", "googlenet", "densenet121", "mobilenet", "mobilenetv2", "senet18")
_SETTINGS = {  # learning rate, weight decay
    "lr0.2_wd5e-4": (0.2, 5e-4),
    "lr0.05_wd5e-4": (0.05, 5e-4),
    "lr0.1_wd5e-3": (0.1, 5e-3),
    "lr0.2_wd5e-5": (0.2, 5e-5),
    "lr0.05_wd5e-5": (0.05, 5e-5),
}
_RUNS = {  # network, its options, epochs, learning rate, weight decay
    **{f"table1/{name}": (name, {}, 2, 0.1, 5e-4) for name in _NETWORKS},
    **{f"table2/{name}": ("googlenet", MODELS[name], 8, 0.1, 5e-4) for name in MODELS},
    **{f"table3/{name}/{setting}": ("googlenet", MODELS[name], 10, *values)
       for name in ("k5_0_5", "0_5_v5") for setting, values in _SETTINGS.items()},
    "long": ("googlenet", MODELS["0_5_v5"], 25, 0.05, 5e-5),
}
VARIANTS = tuple(_RUNS)


def get_config(variant="long"):
    """Return the configuration of one row of the report's tables."""
    name, options, epochs, learning_rate, weight_decay = config_lib.choose(variant, _RUNS)
    config = config_lib.default()
    config.dataset = "cifar10"
    config.val_size = 0
    config.augment = "crop(4)|flip"
    config.model = config_lib.model(name, **options)
    config.epochs = epochs
    config.batch_size = 128
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = weight_decay
    config.schedule.name = "cosine"
    config.schedule.t_max = 200
    config.test_every_epoch = True
    config.selection = "last"
    return config
