"""The PyTorch networks: the tests' twins, which have the same weights and operations as ours."""

import importlib
import pathlib
import sys

from jaxcifar.errors import UserError, unknown

_TESTS = pathlib.Path(__file__).resolve().parents[2] / "tests"
_REGNET_400MF = {"channels": (32, 64, 160, 384), "blocks": (1, 2, 7, 12), "group_width": 16}
# name: (module: a file under tests or a dotted name, class, options). The classic families:
# twins_classic.MODELS.
_TWINS = {
    "resnet5m": ("torch_twins", "ResNet", {}),
    "cnn3": ("torch_twins", "CNN3", {}),
    "mlp_s": ("twins_reports", "MLP", {}),
    "mlp_l": ("twins_reports", "MLP", {"hidden": (2048, 1024, 512, 256, 128, 64, 32, 16)}),
    "vit": ("twins_reports", "ViT", {}),
    "cifar100_nn": ("twins_reports", "MLP", {
        "hidden": (4096, 4096), "dropout_last": 0, "activation": "sigmoid"}),
    "cifar100_cnn": ("twins_reports", "CIFAR100CNN", {}),
    "se_dla": ("twins_reports", "SEDLA", {}),
    "imagenet_resnet18": ("twins_imagenet", "ImageNetResNet", {}),
    "mobilenet_v3_small": ("twins_imagenet", "MobileNetV3", {"blocks": "SMALL"}),
    "efficientnet_v2_s": ("twins_imagenet", "EfficientNetV2", {"stages": "S"}),
    "mobilenet": ("twins_mobile", "MobileNet", {}),
    "mobilenetv2": ("twins_mobile", "MobileNetV2", {}),
    "efficientnet_b0": ("twins_mobile", "EfficientNet", {}),
    "shufflenet_g2": ("twins_mobile", "ShuffleNet", {}),
    "shufflenet_g3": ("twins_mobile", "ShuffleNet", {"channels": (240, 480, 960), "groups": 3}),
    "shufflenetv2_0_5": ("twins_mobile", "ShuffleNetV2", {"channels": (48, 96, 192)}),
    "shufflenetv2_1": ("twins_mobile", "ShuffleNetV2", {}),
    "shufflenetv2_1_5": ("twins_mobile", "ShuffleNetV2", {"channels": (176, 352, 704)}),
    "shufflenetv2_2": ("twins_mobile", "ShuffleNetV2", {
        "channels": (224, 488, 976), "head_width": 2048}),
    "dpn26": ("twins_aggregated", "DPN", {}),
    "dpn92": ("twins_aggregated", "DPN", {"blocks": (3, 4, 20, 3)}),
    "regnetx_200mf": ("twins_aggregated", "RegNet", {}),
    "regnetx_400mf": ("twins_aggregated", "RegNet", _REGNET_400MF),
    "regnety_400mf": ("twins_aggregated", "RegNet", _REGNET_400MF | {"se_ratio": 0.25}),
    "pnasnet_a": ("twins_aggregated", "PNASNet", {}),
    "pnasnet_b": ("twins_aggregated", "PNASNet", {"cell": "B", "width": 32}),
    "dla": ("twins_aggregated", "DLA", {}),
    "simpledla": ("twins_aggregated", "DLA", {"simple": True}),
    "shake_shake26_2x32d": ("twins_best", "ShakeShake", {}),
    "speedrun94": ("jaxcifar.speedrun.torch_network", "create", {}),
    "speedrun96": ("jaxcifar.speedrun.torch_network", "create", {
        "channels": (128, 384, 512), "depth": 3, "bn_momentum": 0.1}),
}


def build(name, num_classes):
    """Return the torch module of a registered model, with torch's default initialisation.

    Puts tests/ on sys.path. Raises UserError where torch or the twins are missing.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("PyTorch is not installed in this environment: pip install torch, or leave "
                        "its contenders out: --contenders=jaxcifar") from None
    if not _TESTS.is_dir():
        raise UserError(f"the PyTorch networks are those of {_TESTS}, which is not there: run the "
                        "benchmark from a checkout of the repository")
    if str(_TESTS) not in sys.path:
        sys.path.insert(0, str(_TESTS))
    classic = importlib.import_module("twins_classic").MODELS
    if name in classic:
        return classic[name][1](num_classes=num_classes)
    if name not in _TWINS:
        raise UserError(unknown("PyTorch twin", name, sorted([*classic, *_TWINS])))
    file, cls, options = _TWINS[name]
    module = importlib.import_module(file)
    # a string that is a name of the file stands for its value, such as a table of blocks
    options = {key: getattr(module, value) if isinstance(value, str) and hasattr(module, value)
               else value for key, value in options.items()}
    return getattr(module, cls)(num_classes=num_classes, **options)
