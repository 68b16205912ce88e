"""Train a small ResNet on generated images: a first run that needs no network and no data.

    python -m jaxcifar.main --config=configs/quickstart.py

Expected: at least 95% test accuracy within 2 minutes on 2 CPU cores. The dataset, "shapes32", is
drawn by jaxcifar.data.shapes32 on first use.
"""

from jaxcifar import config as config_lib


def get_config():
    """Return the configuration."""
    config = config_lib.default()
    config.dataset = "shapes32"
    config.val_size = 1000
    config.augment = "crop(2)|flip"
    config.model = config_lib.model(
        "resnet5m", channels=(16, 32, 64), blocks=(1, 1, 1), shortcut_kernel=1, stem_width=16, pool=8)
    config.epochs = 4
    config.batch_size = 96  # to be divided among 2, 3, 4, 6 or 8 devices
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 0.01
    config.schedule.name = "one_cycle"
    return config
