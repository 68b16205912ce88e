"""CIFAR-10 to 94% and 96% in seconds, the whole training one compiled program.

    python -m jaxcifar.speedrun --config=configs/speedrun.py:94 --runs=50 --out=results

Published, on one A100, with test-time augmentation, whose time is included (cifar10-airbench):
94: airbench94_muon, 94.01% (n = 200) in 2.59 s; the default
94_sgd: airbench94, SGD and lookahead (arXiv 2404.00498), 94.01% (n = 1,000) in 3.29 s
96: airbench96 as improved after the paper (46.3 s), 96.03% (n = 400) in 34.7 s
96_selected: airbench96_faster, half of every batch, 96.00% (n = 200) in 27.3 s (speedrun/proxy.py)
"""

import math

from jaxcifar import config as config_lib

_PER_1024 = 1024 * (1 + 1 / (1 - 0.85))  # SGD's rates are for 1,024 examples, without momentum
_96 = dict(translate=4, cutout=12)
_SGD = {  # network, rate, decay, peak and end of the rates, config.speedrun
    "94_sgd": ("speedrun94", 11.5, 0.0153, 0.23, 0.07, {"epochs": 9.9}),
    "96": ("speedrun96", 9.0, 0.012, 0.1, 0.0, _96 | {"epochs": 37.0}),
    "96_selected": ("speedrun96", 9.0, 0.012, 0.1, 0.0,
                    _96 | {"epochs": 45.0, "keep_share": 0.5})}
VARIANTS = ("94", *_SGD)


def get_config(variant="94"):
    """Return the configuration of a speedrun."""
    arguments = config_lib.choose(variant, {"94": (), **_SGD})
    config = config_lib.default()
    config.val_size, config.augment = 0, ""  # config.speedrun has its own augmentation
    config.std, config.dtype = (0.2470, 0.2435, 0.2616), "bfloat16"
    config.trainable = "^(?!whiten/kernel)"
    config.drop_last, config.eval_batch_size = True, 2000
    config.num_devices, config.label_smoothing = 1, 0.2
    config.optimizer.update(momentum=0.85, nesterov=True)
    (_sgd if arguments else _muon)(config, *arguments)
    config.epochs = math.ceil(config.speedrun.epochs)
    return config


def _muon(config):
    """Muon for the filters, SGD for biases and the last layer; rates fall linearly."""
    config.model = config_lib.model("speedrun94", channels=(64, 256, 256), head_scale=1 / 256,
                                    head_std=1.0, draw_bias=True)
    config.batch_size, config.schedule.name = 2000, "linear"
    config.optimizer.update(name="muon", muon_momentum=0.6, muon_steps=3, muon_exclude="^head/",
                            muon_rest="sgd", decay_exclude="/conv", learning_rate=0.24,
                            weight_decay=0.004 / 0.24)  # a step takes 0.004 of what decays
    config.lr_multipliers = f"bias={0.053 / 0.24}; ^head/={0.67 / 0.24}"
    config.speedrun.update(epochs=8.0, unit_filters=True, whiten_bias_linear=True)


def _sgd(config, model, rate, decay, peak, end, speedrun):
    """SGD with lookahead, 64 times the rate for BatchNorm's biases; rates rise, then fall."""
    config.model, config.batch_size = config_lib.model(model), 1024
    config.optimizer.update(learning_rate=rate / _PER_1024, weight_decay=decay * 1024 / rate)
    config.lr_multipliers = "/norm.*/bias=64"
    config.schedule.update(name="triangular", peak=peak, start_factor=0.2, end_factor=end)
    config.speedrun.update(speedrun, lookahead_every=5)
