"""The rows that can be run: their configurations, which of them are meant, and what each costs."""

import dataclasses
import difflib
import fnmatch
import functools
import json
import pathlib
import runpy
import statistics
from typing import Any

from ml_collections import ConfigDict

from jaxcifar import augment, models
from jaxcifar import config as config_lib
from jaxcifar.data.specs import IMAGE_SHAPE, get_spec
from jaxcifar.errors import UserError
from jaxcifar.models import counts as model_counts
from jaxcifar.report import published
from jaxcifar.run_folder import write_json

PUBLISHED = "published"  # the word for all rows with a published number that needs a run


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row: REPORT/VARIANT, its configuration, and under which other names it is known.

    name: "googlenet/table2/k5". spec: as --config takes it. config: with seed 0. hash: of that
    configuration. aliases: names of variants with the same configuration. numbers: the published
    numbers (published.Row) that it is to reproduce; may be empty.
    """

    name: str
    spec: str
    config: Any
    hash: str
    aliases: tuple
    numbers: tuple

    @property
    def needs_run(self):
        """Whether a published number can only come from a run."""
        return not all(number.is_count for number in self.numbers)

    @property
    def needs_weights(self):
        """Whether a run starts from weights that have to be brought along."""
        return bool(self.config.get("init_from", ""))


def row_name(variant):
    """Return the row's name of a published variant: configs/googlenet.py:long -> googlenet/long."""
    path, _, name = variant.partition(":")
    return f"{pathlib.PurePosixPath(path).stem}/{name}"


def reports():
    """Return the names of the reports, in their order; "peers" is none."""
    return list(dict.fromkeys(row.report for row in published.rows() if row.needs != "peer"))


def recipes(root):
    """Return {row's name: Recipe} of every variant in root/configs of the reports' files.

    Variants with the same configuration are one row: the one with a published number, or the first.
    """
    groups = {}
    for report in reports():
        path = pathlib.Path(root, "configs", f"{report}.py")
        module = runpy.run_path(str(path)) if path.is_file() else {"VARIANTS": ()}
        for variant in module["VARIANTS"]:
            config = module["get_config"](variant)
            spec = f"configs/{report}.py:{variant}"
            groups.setdefault((report, hash_of(config)), []).append((spec, config))
    made = [_recipe(group, digest) for (_, digest), group in groups.items()]
    return {recipe.name: recipe for recipe in made}


def hash_of(config):
    """Return the hash of a configuration (ConfigDict, or config.json's dict) with seed 0."""
    config = ConfigDict(config_lib.to_dict(config) if hasattr(config, "to_json")
                                   else config)
    config.seed = 0
    return config_lib.config_hash(config)


def select(known, patterns):
    """Return the recipes that a comma-separated list of globs names, in the order of `known`.

    known: {name: Recipe}. A glob is compared with names, aliases and specifications; its * matches
    slashes too. "published": every row with a published number that needs a run, and no weights
    from elsewhere. Raises UserError where a glob matches nothing.
    """
    chosen = set()
    for pattern in map(str.strip, patterns.split(",")):
        found = {name for name, recipe in known.items() if _matches(recipe, pattern)}
        if not found:
            names = [n for recipe in known.values() for n in (recipe.name, *recipe.aliases)]
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(f"no row matches {pattern!r}{hint}; --list --rows='*' prints the rows")
        chosen |= found
    return [recipe for name, recipe in known.items() if name in chosen]


def counts(root, known):
    """Return {row's name: {"params", "multiply_adds", ...}}, see `count`.

    They are kept in root/results/counts.json. What is missing there, or was counted for another
    configuration, is counted now (seconds for a deep network) and written.
    """
    kept, made = read_counts(root), {}
    for name, recipe in known.items():
        entry = kept.get(name, {})
        if entry.get("config_hash") != recipe.hash:
            entry = {"config_hash": recipe.hash, **count(recipe.config)}
        made[name] = entry
    if made != kept:
        path = pathlib.Path(root, "results", "counts.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, made)
    return made


def read_counts(root):
    """Return the content of root/results/counts.json, see `counts`; {} if there is none."""
    path = pathlib.Path(root, "results", "counts.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def count(config):
    """Return a configuration's {"params", "multiply_adds"}, ints; nothing is computed.

    The multiply-adds are of one image's forward pass, at the size to which its augmentation brings
    it. A network of config.IMAGENET has "imagenet_params" too, its parameters with 1,000 classes.
    """
    num_classes = get_spec(config.dataset).num_classes
    pipeline = augment.build(config.augment, tuple(config.mean), tuple(config.std), num_classes)
    model, shape = config.model.to_json(sort_keys=True), pipeline.output_shape(IMAGE_SHAPE)
    counted = dict(_count(model, num_classes, shape))
    if config.model.name in config_lib.IMAGENET:
        counted["imagenet_params"] = _count(model, 1000, shape)["params"]
    return counted


@functools.cache
def _count(model_json, num_classes, image_shape):
    options = json.loads(model_json)
    model = models.create(options.pop("name"), num_classes, **options)
    return model_counts.count(model, image_shape)


def work(config, multiply_adds):
    """Return a run's multiply-adds, a float: forward and backward (twice that) over all epochs,
    and the forward pass of the validation and test images that are measured after each."""
    spec = get_spec(config.dataset)
    train = spec.count("train") - config.val_size
    measured = config.val_size + spec.count("test") * config.test_every_epoch
    return float(config.epochs * (3 * train + measured) * multiply_adds)


def seconds(known, counted, results, platform):
    """Return {row's name: expected seconds of a run, or None where nothing can be said}.

    results: {row's name: content of its result file}. platform: "cpu" or "gpu"; only what was
    measured there counts. A measured row is expected to take its mean; others by their multiply-
    adds at the median speed of the measured ones.
    """
    measured = {}
    for name, entry in results.items():
        taken = [record["seconds"] for record in entry["seeds"].values()
                 if record["device"]["platform"] == platform and record["seconds"]]
        if taken and name in known:
            measured[name] = statistics.mean(taken)
    works = {name: work(recipe.config, counted[name]["multiply_adds"])
             for name, recipe in known.items()}
    rates = [taken / works[name] for name, taken in measured.items()]
    rate = statistics.median(rates) if rates else None
    return {name: measured.get(name, rate and works[name] * rate) for name in known}


def by_cost(chosen, counted, expected):
    """Return recipes with the cheapest first: by expected seconds, else by multiply-adds."""
    return sorted(chosen, key=lambda recipe: (
        expected[recipe.name] or 0.0, work(recipe.config, counted[recipe.name]["multiply_adds"]),
        recipe.name))


def _recipe(group, digest):
    """Make one row of the variants [(spec, config), ...] that share a configuration."""
    spec, config = next((entry for entry in group if published.rows(variant=entry[0])), group[0])
    return Recipe(row_name(spec), spec, config, digest,
                  tuple(row_name(other) for other, _ in group if other != spec),
                  tuple(published.rows(variant=spec)))


def _matches(recipe, pattern):
    if pattern == PUBLISHED:
        return recipe.needs_run and not recipe.needs_weights
    pattern = row_name(pattern) if ":" in pattern else pattern
    return any(fnmatch.fnmatchcase(name, pattern) for name in (recipe.name, *recipe.aliases))


def cnn_cells(cells):
    """Return the (row's name, label) of cells of the architectures report's grid, a tuple.

    cells: ((batch size, learning rate, L2, dropout, augmentation), label).
    """
    return tuple(("architectures/cnn/b{}_lr{}_l{}_d{}_{}".format(*cell), label)
                 for cell, label in cells)
