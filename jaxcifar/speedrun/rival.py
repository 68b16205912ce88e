"""PyTorch's side of a speedrun: start it in a process of its own, and collect what it measured."""

import importlib.util
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxcifar import config as config_lib
from jaxcifar import models, muon, partition
from jaxcifar.benchmark import children
from jaxcifar.errors import UserError
from jaxcifar.speedrun import torch_rival, training

_MODEL_OPTIONS = ("num_classes", "channels", "depth", "bn_momentum", "head_scale", "head_std",
                  "draw_bias")
_PATIENCE_SECONDS = 240  # for the first mode of "auto", which tries many kernels for each layer
_ROW = ("accuracy", "accuracy_tta", "seconds", "seconds_with_evaluation")
# What the rival has not, where it says nothing: fields, and their values without it.
_NONE = {"speedrun.tta_share": 1.0, "max_grad_norm": 0.0, "max_grad_value": 0.0, "accumulate_steps": 1}


def check(config):
    """Raise UserError where a configuration has no rival, or PyTorch is not installed."""
    fields = config_lib.flatten(config_lib.to_dict(config))
    for path, neutral in _NONE.items():
        if fields[path] != neutral:
            raise UserError(f"--rival: the PyTorch rival has no config.{path}: set it to {neutral}, or "
                            "leave --rival out")
    if config.speedrun.keep_share < 1:
        raise UserError("--rival: the PyTorch rival has no data selection (config.speedrun."
                        "keep_share); measure 96 beside it, or leave --rival out")
    options = config.optimizer
    if options.name != "sgd" and (options.name, options.muon_rest) != ("muon", "sgd"):
        raise UserError("--rival: the PyTorch rival has SGD, and Muon with SGD for the rest; "
                        f"config.optimizer.name is {options.name!r}, muon_rest "
                        f"{options.muon_rest!r}")
    if importlib.util.find_spec("torch") is None:
        raise UserError("--rival: PyTorch is not installed in this environment: pip install torch")


def specification(run, *, runs, platform, compile_mode):
    """Return what the child needs to know, fit for JSON; see torch_rival.

    run: training.Speedrun. runs: with the seeds 0 to runs - 1. platform: "gpu" or "cpu", JAX's.
    compile_mode: of torch.compile, or "auto", or "off". Raises UserError: weights that Muon takes
    would decay, which the rival's do not.
    """
    config, options = run.config, run.config.optimizer
    steps = jnp.arange(run.total_steps)
    rates = jax.vmap(lambda number: training.learning_rate(run, number))(steps)
    shares = jax.vmap(lambda number: training.bias_share(run, number))(steps[:run.bias_steps])
    return {
        "model": {name: getattr(run.task.model, name) for name in _MODEL_OPTIONS},
        "parameters": _parameters(run), "rates": rates.tolist(), "bias_shares": shares.tolist(),
        "batch_size": config.batch_size, "eval_batch_size": config.eval_batch_size,
        "label_smoothing": config.label_smoothing, "mean": list(config.mean),
        "std": list(config.std), "speedrun": dict(config.speedrun),
        "optimizer": {
            **{name: options[name] for name in (
                "momentum", "nesterov", "weight_decay", "muon_momentum", "muon_steps")},
            "coefficients": list(muon.COEFFICIENTS)},
        "runs": runs, "platform": platform, "compile": compile_mode}


def _parameters(run):
    """Return {torch's name: its factor of the rate, whether it decays, whether Muon takes it}."""
    config = run.config
    trained, _ = partition.split(models.shapes(run.task.model)["params"], config.trainable)
    pairs = partition.multipliers(config.lr_multipliers)
    factors = jax.tree.leaves(partition.factors(trained, pairs))
    kept = config.optimizer.decay_exclude
    search = partition.pattern(kept, "decay_exclude").search if kept else lambda name: None
    matrices = muon.matrices(trained, config.optimizer.muon_exclude) if (
        config.optimizer.name == "muon") else "(?!)"  # this matches nothing
    by_muon = partition.pattern(matrices, "muon_exclude").search
    names = [partition.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    for name in names:
        if config.optimizer.weight_decay and by_muon(name) and not search(name):
            raise UserError(f"--rival: the PyTorch rival's Muon has no weight decay, and {name} has: let "
                            "config.optimizer.decay_exclude match it, or leave --rival out")
    return {name.replace("/", ".").replace("kernel", "weight"): {
        "factor": factor, "decays": not search(name), "muon": bool(by_muon(name))}
        for name, factor in zip(names, factors, strict=True)}


def measure(spec, dataset, *, ready, row):
    """Run the rival; call ready(message) once, and row(dict) after every run.

    "auto" on a GPU, not ready within _PATIENCE_SECONDS: once more, without its first mode.
    Raises UserError with its message where it ends before its last run.
    """
    limit = _PATIENCE_SECONDS if spec["compile"] == "auto" and spec["platform"] != "cpu" else 0
    first, *rest = torch_rival.COMPILE_MODES

    def ready_late(message):
        message["ready"]["failed"].insert(0, f"auto from {first} on: not ready within {limit} s")
        ready(message)

    with tempfile.TemporaryDirectory(prefix="jaxcifar_rival_") as folder:
        arrays = pathlib.Path(folder, "arrays.npz")
        np.savez(arrays, **{
            f"{split}_{kind}": np.asarray(getattr(dataset, f"{split}_{kind}"))
            for split in ("train", "test") for kind in ("images", "labels")})
        spec = {**spec, "arrays": str(arrays)}
        try:
            _measure(spec, folder, limit, ready, row)
        except children.TimedOut:
            _measure({**spec, "modes": rest}, folder, 0, ready_late, row)


def _measure(spec, folder, limit, ready, row):
    """Hand on what a child sends, the first message within `limit` seconds, and end it."""
    path = pathlib.Path(folder, "specification.json")
    path.write_text(json.dumps(spec), encoding="utf-8")
    child = children.Child("the PyTorch rival", "jaxcifar.speedrun.torch_rival", str(path))
    try:
        ready(child.receive(limit))
        while message := child.receive(may_end=True):
            row({key: message[key] for key in ("seed", *_ROW)})
    finally:
        child.close()
