"""The search of se_resnet_report ("Team DLEnthusiasts"): widths, kernels, rate, batch, optimizer.

    python -m jaxcifar.tune --config=configs/se_resnet_search.py --workdir=studies/se

As reported: Optuna, 20 trials, each 5 epochs on a quarter of the batches, mixed precision and four
batches to an update, the least training loss wins. The report names neither the sampler nor the
pruner: TPE and the median rule are Optuna's defaults. Mixed precision is bfloat16 here (float32
parameters, no loss scaling), which is slow on a CPU: --trial=dtype=float32 does without.
The best it reports: 16, 32, 128, 256, filter 3, shortcut 1, pool 4, rate 3.7e-4, batch 16, Adam;
configs/se_resnet.py trains it. The shortcut's kernel has an effect here, none in the report's code.
get_config() is the recipe of the final training (20 epochs), to which studies/se/best.py adds; its
networks have 2.5 to 12.2 million parameters, and --config.max_params=5000000 refuses larger ones.
"""

from jaxcifar import config as config_lib
from jaxcifar.search_space import Choice, Float, Search


def get_config():
    """Return the recipe that the best trial of the search is trained with."""
    config = config_lib.default()
    config.dataset = "cifar10"
    config.val_size = 0
    config.mean = (0.49140, 0.48216, 0.44653)  # of the 50,000 training images
    config.std = (0.24703, 0.24349, 0.26159)
    config.augment = "crop(4)|flip"
    config.model = config_lib.model("se_dla", C1=16, C2=32, C3=128, C4=256, filter_size=3,
                                    shortcut_kernel=1, pool_size=4)
    config.epochs = 20
    config.batch_size = 16
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.00037167893563643987
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    config.schedule.t_max = 200
    return config


def search_space():
    """Return the report's search."""
    return Search(
        {"model.C1": Choice(16, 32), "model.C2": Choice(32, 64), "model.C3": Choice(64, 128),
         "model.C4": Choice(128, 256), "model.filter_size": Choice(3, 5),
         "model.shortcut_kernel": Choice(1, 3), "model.pool_size": Choice(2, 4),
         "optimizer.learning_rate": Float(1e-5, 1e-2, log=True),
         "batch_size": Choice(8, 16, 32),
         "optimizer": Choice(adam={"optimizer.name": "adam"},
                             sgd={"optimizer.name": "sgd", "optimizer.momentum": 0.9})},
        objective="train_loss", epoch="last", trials=20, pruner="median",
        trial={"epochs": 5, "epoch_fraction": 0.25, "accumulate_steps": 4, "dtype": "bfloat16"})
