"""The models: one literal registry of names, and `create`."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp

from jaxcifar.errors import UserError, unknown

# name: (file under jaxcifar/models, class, options that differ from the class's defaults)
MODELS = {
    "resnet5m": ("resnet", "ResNet", {}),
    "resnet18": ("resnet", "ResNet", {
        "channels": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), "shortcut_kernel": 1,
        "stem_width": 64}),
    "resnet34": ("resnet", "ResNet", {
        "channels": (64, 128, 256, 512), "blocks": (3, 4, 6, 3), "shortcut_kernel": 1,
        "stem_width": 64}),
    "resnet50": ("resnet", "ResNet", {
        "channels": (64, 128, 256, 512), "blocks": (3, 4, 6, 3), "shortcut_kernel": 1,
        "stem_width": 64, "bottleneck": True}),
    "resnet101": ("resnet", "ResNet", {
        "channels": (64, 128, 256, 512), "blocks": (3, 4, 23, 3), "shortcut_kernel": 1,
        "stem_width": 64, "bottleneck": True}),
    "resnet152": ("resnet", "ResNet", {
        "channels": (64, 128, 256, 512), "blocks": (3, 8, 36, 3), "shortcut_kernel": 1,
        "stem_width": 64, "bottleneck": True}),
    "preact_resnet18": ("preact_resnet", "PreActResNet", {}),
    "preact_resnet34": ("preact_resnet", "PreActResNet", {"blocks": (3, 4, 6, 3)}),
    "preact_resnet50": ("preact_resnet", "PreActResNet", {
        "blocks": (3, 4, 6, 3), "bottleneck": True}),
    "preact_resnet101": ("preact_resnet", "PreActResNet", {
        "blocks": (3, 4, 23, 3), "bottleneck": True}),
    "preact_resnet152": ("preact_resnet", "PreActResNet", {
        "blocks": (3, 8, 36, 3), "bottleneck": True}),
    "senet18": ("preact_resnet", "SENet", {}),
    "resnext29_2x64d": ("resnext", "ResNeXt", {}),
    "resnext29_4x64d": ("resnext", "ResNeXt", {"cardinality": 4}),
    "resnext29_8x64d": ("resnext", "ResNeXt", {"cardinality": 8}),
    "resnext29_32x4d": ("resnext", "ResNeXt", {"cardinality": 32, "bottleneck_width": 4}),
    "wide_resnet28_10": ("wide_resnet", "WideResNet", {}),
    "wide_resnet16_8": ("wide_resnet", "WideResNet", {"depth": 16, "width": 8}),
    "shake_shake26_2x32d": ("shake_shake", "ShakeShakeNet", {}),
    "lenet": ("lenet", "LeNet", {}),
    "vgg11": ("vgg", "VGG", {"blocks": (1, 1, 2, 2, 2)}),
    "vgg13": ("vgg", "VGG", {"blocks": (2, 2, 2, 2, 2)}),
    "vgg16": ("vgg", "VGG", {}),
    "vgg19": ("vgg", "VGG", {"blocks": (2, 2, 4, 4, 4)}),
    "googlenet": ("googlenet", "GoogLeNet", {}),
    "densenet121": ("densenet", "DenseNet", {}),
    "densenet161": ("densenet", "DenseNet", {"growth_rate": 48, "blocks": (6, 12, 36, 24)}),
    "densenet169": ("densenet", "DenseNet", {"blocks": (6, 12, 32, 32)}),
    "densenet201": ("densenet", "DenseNet", {"blocks": (6, 12, 48, 32)}),
    "densenet_cifar": ("densenet", "DenseNet", {"growth_rate": 12}),
    "cnn3": ("cnn", "CNN3", {}),
    "mlp_s": ("mlp", "MLP", {}),
    "mlp_l": ("mlp", "MLP", {"hidden": (2048, 1024, 512, 256, 128, 64, 32, 16)}),
    "vit": ("vit", "ViT", {}),
    "cifar100_nn": ("mlp", "MLP", {
        "hidden": (4096, 4096), "dropout_last": 0.0, "activation": "sigmoid"}),
    "cifar100_cnn": ("cifar100", "CIFAR100CNN", {}),
    "se_dla": ("se_dla", "SEDLA", {}),
    "imagenet_resnet18": ("imagenet_resnet", "ImageNetResNet", {}),
    "mobilenet_v3_small": ("mobilenet_v3", "MobileNetV3", {}),
    "efficientnet_v2_s": ("efficientnet_v2", "EfficientNetV2", {}),
    "mobilenet": ("mobilenet", "MobileNet", {}),
    "mobilenetv2": ("mobilenetv2", "MobileNetV2", {}),
    "dpn26": ("dpn", "DPN", {}),
    "dpn92": ("dpn", "DPN", {"blocks": (3, 4, 20, 3)}),
    "shufflenet_g2": ("shufflenet", "ShuffleNet", {}),
    "shufflenet_g3": ("shufflenet", "ShuffleNet", {"channels": (240, 480, 960), "groups": 3}),
    "shufflenetv2_0_5": ("shufflenetv2", "ShuffleNetV2", {"channels": (48, 96, 192)}),
    "shufflenetv2_1": ("shufflenetv2", "ShuffleNetV2", {}),
    "shufflenetv2_1_5": ("shufflenetv2", "ShuffleNetV2", {"channels": (176, 352, 704)}),
    "shufflenetv2_2": ("shufflenetv2", "ShuffleNetV2", {
        "channels": (224, 488, 976), "head_width": 2048}),
    "efficientnet_b0": ("efficientnet", "EfficientNet", {}),
    "regnetx_200mf": ("regnet", "RegNet", {}),
    "regnetx_400mf": ("regnet", "RegNet", {
        "channels": (32, 64, 160, 384), "blocks": (1, 2, 7, 12), "group_width": 16}),
    "regnety_400mf": ("regnet", "RegNet", {
        "channels": (32, 64, 160, 384), "blocks": (1, 2, 7, 12), "group_width": 16,
        "se_ratio": 0.25}),
    "pnasnet_a": ("pnasnet", "PNASNet", {}),
    "pnasnet_b": ("pnasnet", "PNASNet", {"cell": "B", "width": 32}),
    "dla": ("dla", "DLA", {}),
    "simpledla": ("dla", "DLA", {"simple": True}),
    "speedrun94": ("speedrun_net", "SpeedrunNet", {}),
    "speedrun96": ("speedrun_net", "SpeedrunNet", {
        "channels": (128, 384, 512), "depth": 3, "bn_momentum": 0.1}),
}


def names():
    """Return the registered model names, sorted."""
    return sorted(MODELS)


def options(name):
    """Return the model's options and their defaults; UserError where the name is unknown."""
    cls, preset = _lookup(name)
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    hidden = {"num_classes", "dtype", "remat", "parent", "name"}
    return {key: preset.get(key, value) for key, value in fields.items() if key not in hidden}


def create(name, num_classes=10, *, dtype=jnp.float32, remat=False, **model_options):
    """Build the linen module of a registered model.

    `model.apply(variables, images, train, ...)` takes images float [N, H, W, 3] and returns logits
    float32 [N, num_classes]; dtype is the type of the computation, parameters stay float32; remat:
    see config.remat. Raises UserError for an unknown name or option, with the nearest known one.
    """
    cls, preset = _lookup(name)
    known = options(name)
    for key, value in model_options.items():
        if key not in known:
            raise UserError(unknown(f"option of model {name!r}", key, known))
        if any(isinstance(value, kind) != isinstance(known[key], kind) for kind in (bool, str)):
            raise UserError(f"config.model.{key} = {value!r}: must be of the kind of its default, "
                            f"{known[key]!r}")
    chosen = {key: _hashable(value) for key, value in (preset | model_options).items()}
    if remat and "remat" not in {field.name for field in dataclasses.fields(cls)}:
        raise UserError(f"config.remat = True: model {name!r} does not offer it; set it to False")
    chosen |= {"remat": True} if remat else {}
    return cls(num_classes=num_classes, dtype=dtype, **chosen)


def shapes(model, image_shape=(32, 32, 3), **options):
    """Return the variables of a linen module as shapes (jax.eval_shape's); nothing is computed.

    image_shape: (H, W, C) of its inputs; options: of its __call__, such as part. Raises ValueError
    where a model without options returns anything but a row of logits for each image.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    logits, variables = jax.eval_shape(lambda x: model.init_with_output(
        {"params": jax.random.key(0)}, x, train=False, **options), images)
    if not options and getattr(logits, "shape", None) != (2, model.num_classes):
        returned = f"{list(logits.shape)}" if hasattr(logits, "shape") else f"a {type(logits).__name__}"
        raise ValueError(f"of 2 images it makes {returned}, expected logits [2, {model.num_classes}]")
    return variables


def count_params(params):
    """Return the number of scalars in a pytree of arrays or of shapes (jax.eval_shape's result)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _lookup(name):
    if name not in MODELS:
        raise UserError(unknown("model", name, names()))
    module, cls, preset = MODELS[name]
    path = f"jaxcifar.models.{module}"
    try:
        return getattr(importlib.import_module(path), cls), preset
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise UserError(f"MODELS has {name!r} in the file jaxcifar/models/{module}.py, and there is "
                        "none") from error
    except AttributeError as error:
        if error.name != cls:
            raise
        raise UserError(f"MODELS has {name!r} as the class {cls} of jaxcifar/models/{module}.py, "
                        "which defines no such class") from error


def _hashable(value):
    """Return tuples for the lists that configurations hold: linen's fields are hashed by jit."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
