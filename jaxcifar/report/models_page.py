"""The page of models: name, paper, sizes, file, accuracy published and measured, training speed."""

from jaxcifar import models
from jaxcifar.models import counts
from jaxcifar.report import published

# Beginning of the registry name -> paper. The longest beginning that fits counts.
PAPERS = {
    "cifar100_": "CIFAR-100 report (course network)",
    "cnn3": "architectures report, experiment 2",
    "densenet": "Huang et al. 2017, Densely Connected Convolutional Networks",
    "dla": "Yu et al. 2018, Deep Layer Aggregation",
    "dpn": "Chen et al. 2017, Dual Path Networks",
    "efficientnet_b0": "Tan & Le 2019, EfficientNet",
    "efficientnet_v2_s": "Tan & Le 2021, EfficientNetV2 (torchvision's)",
    "googlenet": "Szegedy et al. 2015, Going Deeper with Convolutions",
    "imagenet_resnet18": "He et al. 2016, Deep Residual Learning (torchvision's stem)",
    "lenet": "LeCun et al. 1998, Gradient-Based Learning",
    "mlp_": "architectures report, experiment 1",
    "mobilenet": "Howard et al. 2017, MobileNets",
    "mobilenet_v3_small": "Howard et al. 2019, Searching for MobileNetV3 (torchvision's)",
    "mobilenetv2": "Sandler et al. 2018, MobileNetV2",
    "pnasnet": "Liu et al. 2018, Progressive Neural Architecture Search",
    "preact_resnet": "He et al. 2016, Identity Mappings",
    "regnet": "Radosavovic et al. 2020, Designing Network Design Spaces",
    "resnet": "He et al. 2016, Deep Residual Learning",
    "resnet5m": "ResNet-5M report (modified ResNet-18)",
    "resnext": "Xie et al. 2017, Aggregated Residual Transformations",
    "se_dla": "SE-ResNet report (SE bottlenecks in DLA trees)",
    "senet": "Hu et al. 2018, Squeeze-and-Excitation Networks",
    "shake_shake": "Gastaldi 2017, Shake-Shake regularization",
    "shufflenet": "Zhang et al. 2018, ShuffleNet",
    "shufflenetv2": "Ma et al. 2018, ShuffleNet V2",
    "simpledla": "Yu et al. 2018, Deep Layer Aggregation (simplified)",
    "speedrun": "Jordan 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
    "vgg": "Simonyan & Zisserman 2015, Very Deep Convolutional Networks",
    "vit": "Dosovitskiy et al. 2021, An Image is Worth 16x16 Words",
    "wide_resnet": "Zagoruyko & Komodakis 2016, Wide Residual Networks",
}


def describe(name):
    """Return a model's row at 32x32 and 10 classes: name, paper, file, params, multiply_adds."""
    return {"name": name, "paper": PAPERS[max((p for p in PAPERS if name.startswith(p)), key=len)],
            "file": f"{models.MODELS[name][0]}.py", **counts.count(models.create(name))}


def page(measured, speeds):
    """Return docs/models.md: every registered model, what is published of it and what was measured.

    measured, speeds: {model: text}, see jaxcifar.report.measured.
    """
    lines = [
        "# Models", "",
        "Made by `python scripts/models_page.py`. Parameters and multiply-adds (of convolutions and",
        "matrix products) are those of `jaxcifar.models.create(name)` at 32x32 and 10 classes.", "",
        "- File: of the class whose fields are the model's options; `jaxcifar.models.options(name)` gives",
        "  them with their defaults, `--config.model.OPTION=VALUE` changes one.",
        "- Published: test accuracy on CIFAR-10 in percent, from the README of kuangliu/pytorch-cifar. Its",
        "  recipe is 200 epochs down a cosine, which `configs/pytorch_cifar.py` trains; nine of the figures",
        "  stood there already when it was 350 epochs in three steps (the file says which).",
        "- Ours: mean test accuracy of a recipe with the model's options as registered, its epochs (of the",
        "  longest run) and seeds; on CIFAR-100 where it says so. Of several recipes, of which the row is",
        "  named, the one with most seeds (up to three) counts, among those the best on validation (on the",
        "  test set where there is no validation). Recipes with other options do not count: `cnn3` has no",
        "  dropout as registered, but 0.5 in the report's best cell, `configs/architectures.py:cnn`, which",
        "  the README quotes. [parity.md](parity.md) has all.",
        "- Training: images per second of a training step with batch 16 or more, and how many times",
        "  PyTorch's (eager, float32, the same processor, by CPU time) that is, from results/benchmark_*:",
        "  a GPU's, else on all cores, else on one. [performance.md](performance.md) has the machines.",
        "  Empty: not measured.", "",
        "| name | paper | parameters | multiply-adds | file | published | ours | training |",
        "| --- | --- | ---: | ---: | --- | ---: | --- | --- |"]
    return "\n".join([*lines, *(line(name, measured.get(name, ""), speeds.get(name, ""))
                                for name in models.names())]) + "\n"


def line(name, measured="", speed=""):
    """Return a model's line of the table; measured, speed: its last two cells."""
    row = describe(name)
    accuracy = [r.value for r in published.rows("peers", metric="test_accuracy")
                if r.note == f"kuangliu/pytorch-cifar {name}"]
    return (f"| `{name}` | {row['paper']} | {row['params']:,} | "
            f"{row['multiply_adds'] / 1e6:,.1f} M | [{row['file']}](../jaxcifar/models/{row['file']}) | "
            f"{accuracy[0] if accuracy else ''} | {measured} | {speed} |")
