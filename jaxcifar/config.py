"""The configuration: every field declared once, checked once, hashed once.

A file in configs/ starts from `default()`, changes what its report changes, and returns it; the
command line overrides single fields (`--config.seed=3`). A field that is not declared here does not
exist.
"""

import hashlib
import json
import math
import re

from ml_collections import ConfigDict

from jaxcifar.errors import UserError, unknown

# Fields that say where and how fast a run goes, never what it computes: a run may be resumed with
# other values of these (invariants 2 and 4).
RUNTIME_FIELDS = (
    "cache_features",
    "data_dir",
    "compilation_cache",
    "cuda_graphs",
    "eval_batch_size",
    "num_devices",
    "parallel",
    "progress",
    "reference_curve",
    "remat",
    "save_every_epochs",
    "steps_per_call",
    "tensorboard",
)

# Fields that came after results were recorded, and the value that means "as before": at that value
# they enter neither the hash nor a comparison, so that older results and run folders stay valid.
ADDED_FIELDS = {
    "eval_transform": "auto",
    "init_from": "",
    "trainable": "",
    "frozen_batch_norm": "batch",
    "lr_multipliers": "",
    "epoch_fraction": 1.0,
    "ema_warmup": True,
    "optimizer.muon_momentum": 0.95,
    "optimizer.muon_steps": 5,
    "optimizer.muon_exclude": "",
    "optimizer.muon_rest": "adamw",
}

# What `python -m jaxcifar.speedrun` reads, and nothing else; the values here: no speedrun.
SPEEDRUN = {
    "epochs": 0.0,  # of the whole training, fractions allowed (config.epochs is not read); 0: none
    "translate": 2,  # pixels at most, with reflected borders
    "cutout": 0,  # side of a square that is set to 0; 0: off
    "whiten_images": 5000,  # training images whose patches' covariance the first layer whitens
    "whiten_eps": 5e-4,  # added to the covariance's eigenvalues
    "whiten_bias_epochs": 3.0,  # in which the first layer's bias is trained
    "whiten_bias_linear": False,  # at a rate that falls from the base rate to 0; False: as the others
    "unit_filters": False,  # muon: set the filters' norms before every step
    "lookahead_every": 0,  # steps between which weights return to their moving average; 0: off
    "lookahead_decay": 0.95,  # of this average per step at the end, times (share of steps done)^3
    "tta_share": 1.0,  # of the test images, the least certain, that all six views are taken of
    "keep_share": 1.0,  # of every batch, the examples of which a proxy's losses are largest; 1: all
    "proxy_channels": (32, 64, 64),  # of the proxy, which is trained before, on the same batches
    "proxy_every": 4,  # batches between the proxy's steps; of the others it has the losses only
}
ADDED_FIELDS |= {f"speedrun.{name}": list(value) if isinstance(value, tuple) else value
                 for name, value in SPEEDRUN.items()}

IMAGE_SHAPE = (32, 32, 3)  # height, width, channels of the data, before any resize
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# torchvision's ImageNet weights: model: (name of the weights, their own transform, the last layer)
IMAGENET = {
    "imagenet_resnet18": (
        "ResNet18_Weights.IMAGENET1K_V1", "resize(256)|center_crop(224)", "fc"),
    "efficientnet_v2_s": (
        "EfficientNet_V2_S_Weights.IMAGENET1K_V1", "resize(384)|center_crop(384)", "classifier.1"),
    "mobilenet_v3_small": (
        "MobileNet_V3_Small_Weights.IMAGENET1K_V1", "resize(256)|center_crop(224)", "classifier.3"),
}

_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "precision": ("default", "high", "highest"),
    "selection": ("last", "best_val_loss", "best_val_accuracy", "best_test_accuracy"),
    "bn_sync": ("global", "replica"),
    "frozen_batch_norm": ("batch", "running"),
    "cuda_graphs": ("default", "step", "call", "off"),
    "parallel": ("auto", "jit", "pmap", "shard_map"),
}


def default():
    """Return the default configuration: a new, locked ConfigDict with every field there is.

    Lengths carry their unit in their name; sizes are counts of examples; 0 or "" means "off" or
    "automatic", as the comment beside the field says.
    """
    c = ConfigDict()
    c.seed = 0  # of initialisation, order, augmentation, dropout

    # Data
    c.dataset = "cifar10"  # cifar10, cifar100 or shapes32
    c.data_dir = ""  # "": TFDS_DATA_DIR, else TFDS's own default
    c.val_size = 5000  # training examples held out for validation; 0: none
    c.split_seed = 0  # of the random split into training and validation
    c.mean = CIFAR_MEAN  # per channel, of pixels in [0, 1]
    c.std = CIFAR_STD
    c.augment = "crop(4)|flip"  # jaxcifar.augment.pipeline lists the operations
    # Of held-out images: resize and center_crop; "auto": those of config.augment
    c.eval_transform = "auto"

    # Model
    c.model = ConfigDict({"name": "resnet5m"})  # every other entry is an option of that model
    # Weights to start from: a file (.safetensors, .pt, .pth, .pth.tar, .ckpt, .bin), a run folder, or
    # torchvision's name such as "ResNet18_Weights.IMAGENET1K_V1"; a classifier of other classes is new
    c.init_from = ""
    c.trainable = ""  # regular expression over parameter paths, "^fc/": the rest is frozen; "": all
    c.frozen_batch_norm = "batch"  # in training: statistics of the "batch", or the "running" ones
    c.cache_features = True  # compute what a frozen backbone gives once, where nothing else changes
    c.remat = False  # keep no activations inside blocks for the gradient: compute them again
    c.max_params = 0  # refuse a model with more parameters; 0: no limit
    c.dtype = "float32"  # of the computation; parameters and statistics stay float32
    c.precision = "default"  # of float32 matrix products (on GPU "default" is TensorFloat-32)

    # Optimisation
    c.epochs = 100
    c.batch_size = 128  # over all devices
    c.drop_last = False  # drop the last, partial batch of an epoch
    c.epoch_fraction = 1.0  # an epoch ends after this share of its batches (others every epoch)
    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"  # sgd, adam or adamw, as in torch.optim, or muon
    c.optimizer.learning_rate = 0.1
    c.optimizer.weight_decay = 0.0  # coupled (L2) for sgd and adam, decoupled for adamw
    c.optimizer.momentum = 0.0
    c.optimizer.dampening = 0.0
    c.optimizer.nesterov = False
    c.optimizer.betas = (0.9, 0.999)
    c.optimizer.eps = 1e-8
    c.optimizer.decay_exclude = ""  # regular expression over parameter paths: these are not decayed
    c.optimizer.muon_momentum = 0.95  # muon: of the kernels
    c.optimizer.muon_steps = 5  # muon: Newton-Schulz steps
    c.optimizer.muon_exclude = ""  # muon: regular expression: kernels for muon_rest's rule
    c.optimizer.muon_rest = "adamw"  # muon: rule of all other parameters, with the options above
    c.max_grad_norm = 0.0  # clip the gradient's global norm; 0: off
    c.max_grad_value = 0.0  # clip each gradient entry; 0: off
    c.lr_multipliers = ""  # shares of the rate by parameter path: "layer1=0.1; layer2=0.3"
    c.accumulate_steps = 1  # batches whose gradients are averaged into one update
    c.label_smoothing = 0.0  # of the training loss; no held-out loss is smoothed
    c.ema_decay = 0.0  # exponential moving average of the weights, evaluated in their place; 0: off
    c.ema_warmup = True  # at update s by min(ema_decay, 1 - s^(-2/3)); False: by ema_decay throughout
    c.schedule = ConfigDict()
    c.schedule.name = "constant"
    c.schedule.warmup_epochs = 0.0  # any but plateau: linear from 0
    c.schedule.t_max = 200  # cosine: epochs of half a period, whatever the number of epochs
    c.schedule.eta_min = 0.0  # cosine, cosine_step
    c.schedule.step_size = 30  # step, in epochs
    c.schedule.milestones = (60, 120, 160)  # multistep, in epochs
    c.schedule.gamma = 0.1  # step, multistep; exponential: per epoch, so set it (torch has no default)
    c.schedule.total_iters = 100  # polynomial, in epochs
    c.schedule.power = 1.0  # polynomial
    c.schedule.peak = 0.25  # triangular, as a fraction of all steps
    c.schedule.start_factor = 0.0  # triangular
    c.schedule.end_factor = 0.0  # triangular, linear
    c.schedule.pct_start = 0.3  # one_cycle, as a fraction of all steps
    c.schedule.div_factor = 25.0  # one_cycle
    c.schedule.final_div_factor = 1e4  # one_cycle
    c.schedule.anneal_strategy = "cos"  # one_cycle: cos or linear
    c.schedule.three_phase = False  # one_cycle
    c.schedule.cycle_momentum = False  # one_cycle (torch's default is True)
    c.schedule.base_momentum = 0.85  # one_cycle
    c.schedule.max_momentum = 0.95  # one_cycle
    c.schedule.monitor = "val_loss"  # plateau: val_loss or val_accuracy (or test_...)
    c.schedule.factor = 0.1  # plateau
    c.schedule.patience = 10  # plateau, in epochs
    c.schedule.threshold = 1e-4  # plateau
    c.schedule.threshold_mode = "rel"  # plateau: rel or abs
    c.schedule.cooldown = 0  # plateau, in epochs
    c.schedule.min_lr = 0.0  # plateau
    c.schedule.eps = 1e-8  # plateau

    # Selection and stopping
    c.selection = "last"  # which epoch is tested: last, or best_val_loss, best_val_accuracy, ...
    c.test_every_epoch = False  # measure the test set after every epoch (as some reports did)
    c.early_stopping = ConfigDict()
    c.early_stopping.min_epochs = 0  # never stop before
    c.early_stopping.window = 0  # stop when the best of the last n (2 or more) is the oldest; 0: off

    c.speedrun = ConfigDict(SPEEDRUN)

    # Devices
    c.num_devices = 0  # 0: all of them
    c.parallel = "auto"  # auto: jit on one device, pmap on several; or shard_map
    c.bn_sync = "global"  # BatchNorm statistics over the whole batch, or per "replica" (torch DDP)
    # Steps in one compiled call: "auto", "epoch" or a number ("16"). On CPU, "epoch" is a rolled loop,
    # in which XLA runs convolutions 25-55 times slower.
    c.steps_per_call = "auto"
    # What XLA launches as one CUDA graph: the kernels between two convolutions ("default"), a whole
    # training "step", a whole compiled "call" (see steps_per_call), or nothing ("off")
    c.cuda_graphs = "default"
    c.deterministic = False  # bit-equal runs on GPU too (slower there; CPU always is)
    c.eval_batch_size = 0  # over all devices; 0: 1000, on CPU 100 (see epoch.eval_batch_size)

    # Output
    c.progress = True  # a progress bar where there is a terminal
    c.tensorboard = True
    c.save_every_epochs = 1
    c.compilation_cache = "auto"  # a folder; "auto": the user's cache folder; "": off
    c.reference_curve = ""  # a published curve to draw beside ours (jaxcifar.report.published)
    c.lock()
    c.model.unlock()  # of any model
    return c


def model(name, **options):
    """Return the `config.model` entry for a registered model name and its options."""
    return ConfigDict({"name": name, **options})


def fine_tune(config):
    """Let a configuration train a new last layer on torchvision's ImageNet weights of its model.

    The images take the transform of these weights; the model is one of IMAGENET.
    """
    config.init_from, config.augment, last = IMAGENET[config.model.name]
    config.mean, config.std = IMAGENET_MEAN, IMAGENET_STD
    config.trainable = f"^{re.escape(last)}/"
    config.eval_batch_size = 256


def choose(variant, table):
    """Return `table[variant]`; UserError with the nearest name when there is no such variant."""
    if variant not in table:
        raise UserError(unknown("variant", variant, table))
    return table[variant]


def validate(config):
    """Check a configuration's values.

    Raises:
      UserError: a field is unknown, missing or out of its range; it is named, with what is allowed.
    """
    declared = default()
    _check_fields(config, declared, "")
    for field, allowed in _CHOICES.items():
        if config[field] not in allowed:
            raise UserError(unknown(f"value of config.{field}", config[field], allowed))
    for field in ("epochs", "batch_size", "accumulate_steps", "save_every_epochs"):
        _require(config[field] >= 1, field, config[field], "at least 1")
    for field in ("seed", "split_seed", "val_size", "num_devices", "eval_batch_size", "max_params",
                  "max_grad_norm", "max_grad_value"):
        _require(config[field] >= 0, field, config[field], "0 or more")
    for field in ("min_epochs", "window"):
        _require(config.early_stopping[field] >= 0, f"early_stopping.{field}",
                 config.early_stopping[field], "0 or more")
    for field in ("seed", "split_seed"):
        _require(config[field] < 2**32, field, config[field], "below 2**32")
    for field in ("mean", "std"):
        _require(len(config[field]) == 3 and all(isinstance(v, int | float) for v in config[field]),
                 field, config[field], "three numbers, one per channel")
    _require(all(0 <= value <= 1 for value in config.mean), "mean", config.mean,
             "of pixels in [0, 1], not of 0 to 255")
    _require(all(0 < value <= 1 for value in config.std), "std", config.std,
             "above 0, and of pixels in [0, 1], not of 0 to 255")
    _require(0 < config.epoch_fraction <= 1, "epoch_fraction", config.epoch_fraction,
             "above 0 and at most 1")
    for field in ("ema_decay", "label_smoothing"):
        _require(0 <= config[field] < 1, field, config[field], "in [0, 1)")
    _require(config.ema_decay or config.ema_warmup, "ema_warmup", config.ema_warmup,
             "True where config.ema_decay = 0 averages nothing")
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    _require(rate >= 0, "optimizer.learning_rate", rate, "0 or more")
    _require(decay >= 0, "optimizer.weight_decay", decay, "0 or more")
    for field in ("patience", "cooldown", "warmup_epochs"):
        _require(config.schedule[field] >= 0, f"schedule.{field}", config.schedule[field],
                 "0 or more")
    _check_measured(config)
    _require(config.num_devices or config.bn_sync == "global", "num_devices", config.num_devices,
             'given with bn_sync = "replica": the result depends on it')
    _require(config.trainable or config.frozen_batch_norm == "batch", "frozen_batch_norm",
             config.frozen_batch_norm, '"batch" where nothing is frozen (config.trainable = "")')
    steps = config.steps_per_call
    _require(steps in ("auto", "epoch") or (str(steps).isdigit() and int(steps) >= 1),
             "steps_per_call", steps, '"auto", "epoch" or a number of steps')


def to_dict(config):
    """Return the configuration as plain, JSON-ready dicts, lists, strings and numbers."""
    return json.loads(config.to_json())


def flatten(tree, prefix=""):
    """Return nested dicts as one dict: "optimizer.momentum" -> value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def config_hash(config):
    """Return 12 hexadecimal digits that differ when a field that can change a result differs."""
    fields = effective(flatten(to_dict(config)))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def differences(ours, theirs):
    """Return one line per result-changing field that differs between two `flatten`ed dicts."""
    here, there = effective(ours), effective(theirs)
    paths = sorted((set(here) | set(there)) - set(_without_effect(ours)))
    return [f"config.{p}: {theirs.get(p, 'absent')!r} there, {ours.get(p, 'absent')!r} here"
            for p in paths if here.get(p) != there.get(p)]


def effective(fields):
    """Return the fields that can change a result, of `flatten`ed ones."""
    without = _without_effect(fields)
    return {path: value for path, value in fields.items()
            if path not in without and not (path in ADDED_FIELDS and value == ADDED_FIELDS[path])}


def _without_effect(fields):
    """Return RUNTIME_FIELDS, less the number of devices where each has BatchNorm statistics of its own."""
    replica = fields.get("bn_sync") == "replica"
    return [name for name in RUNTIME_FIELDS if not (replica and name == "num_devices")]


def _check_fields(config, declared, prefix):
    for key in config:
        if key not in declared:
            raise UserError(unknown(f"field in config{prefix and '.' + prefix[:-1]}", key, declared))
        if isinstance(declared[key], ConfigDict) and key != "model":
            _check_fields(config[key], declared[key], f"{prefix}{key}.")
        else:  # what ConfigDict itself lets through: None anywhere, and booleans for numbers
            same = isinstance(config[key], bool) == isinstance(declared[key], bool)
            _require(same and config[key] is not None, prefix + key, config[key],
                     f"of type {type(declared[key]).__name__}, as its default {declared[key]!r}")
            _require(not isinstance(config[key], float) or math.isfinite(config[key]), prefix + key,
                     config[key], "a finite number")
    for key in declared:
        if key not in config:
            raise UserError(f"config field '{prefix}{key}' is missing; start from "
                            "jaxcifar.config.default()")


def _check_measured(config):
    measured = {"last"}
    if config.val_size:
        measured |= {"best_val_loss", "best_val_accuracy"}
    if config.test_every_epoch:
        measured |= {"best_test_accuracy"}
    _require(config.selection in measured, "selection", config.selection,
             f"one of {', '.join(sorted(measured))} with val_size={config.val_size} and "
             f"test_every_epoch={config.test_every_epoch}")
    if config.schedule.name == "plateau":
        have = ("val_loss", "val_accuracy") if config.val_size else ()
        have += ("test_loss", "test_accuracy") if config.test_every_epoch else ()
        _require(config.schedule.monitor in have, "schedule.monitor", config.schedule.monitor,
                 f"what is measured with val_size={config.val_size} and test_every_epoch="
                 f"{config.test_every_epoch}: {', '.join(have) or 'nothing'}")
    if config.early_stopping.window:
        _require(config.val_size > 0, "early_stopping.window", config.early_stopping.window,
                 "0 (off) without a validation set (val_size = 0)")


def _require(condition, field, value, expected):
    if not condition:
        raise UserError(f"config.{field} = {value!r}: must be {expected}")
