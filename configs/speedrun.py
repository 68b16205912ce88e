"""CIFAR-10 to 94% and 96% in seconds, the whole training one compiled program.

    python -m jaxcifar.speedrun --config=configs/speedrun.py:94 --runs=50 --out=results

Published, on one A100, with test-time augmentation, whose time is included (cifar10-airbench):
94: airbench94_muon, 94.01% (n = 200) in 2.59 s; the default
94_sgd: airbench94, SGD and lookahead (arXiv 2404.00498), 94.01% (n = 1,000) in 3.29 s
96: airbench96 with all images in every epoch, 96.05% (n = 200) in 49 s
"""

import math

from jaxcifar import config as config_lib

_PER_1024 = 1024 * (1 + 1 / (1 - 0.85))  # SGD's rates are for 1,024 examples, without momentum
_SGD94 = dict(epochs=9.9, lookahead_every=5)
_SGD96 = dict(_SGD94, epochs=40.0, translate=4, cutout=12)
VARIANTS = ("94", "94_sgd", "96")


def get_config(variant="94"):
    """Return the configuration of a speedrun."""
    recipe, *arguments = config_lib.choose(variant, {"94": (_muon,), **{
        "94_sgd": (_sgd, "speedrun94", 11.5, _SGD94), "96": (_sgd, "speedrun96", 9.0, _SGD96)}})
    config = config_lib.default()
    config.val_size = 0
    config.augment = ""  # config.speedrun has its own
    config.std = (0.2470, 0.2435, 0.2616)
    config.dtype = "bfloat16"
    config.trainable = "^(?!whiten/kernel)"
    config.drop_last = True
    config.eval_batch_size = 2000
    config.num_devices, config.label_smoothing = 1, 0.2
    config.optimizer.update(momentum=0.85, nesterov=True)
    recipe(config, *arguments)
    config.epochs = math.ceil(config.speedrun.epochs)
    return config


def _muon(config):
    """Muon for the filters, SGD for biases and the last layer; rates fall linearly."""
    config.model = config_lib.model("speedrun94", channels=(64, 256, 256), head_scale=1 / 256,
                                    head_std=1.0)
    config.batch_size = 2000
    config.optimizer.update(name="muon", muon_momentum=0.6, muon_steps=3, muon_exclude="^head/",
                            muon_rest="sgd", decay_exclude="/conv", learning_rate=0.24,
                            weight_decay=0.004 / 0.24)  # a step takes 0.004 of what decays
    config.lr_multipliers = f"bias={0.053 / 0.24}; ^head/={0.67 / 0.24}"
    config.schedule.name = "linear"
    config.speedrun.update(epochs=8.0, unit_filters=True)


def _sgd(config, model, rate, options):
    """SGD with lookahead, 64 times the rate for BatchNorm's biases; rates rise, then fall."""
    config.model = config_lib.model(model)
    config.batch_size = 1024
    config.optimizer.update(learning_rate=rate / _PER_1024, weight_decay=0.0153 * 1024 / rate)
    config.lr_multipliers = "/norm.*/bias=64"
    config.schedule.update(name="triangular", peak=0.23, start_factor=0.2, end_factor=0.07)
    config.speedrun.update(options)
