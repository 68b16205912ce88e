"""What a search varies. A configuration file declares it beside get_config, for jaxcifar.tune:

    from jaxcifar.search_space import Choice, Float, Search

    def search_space():
        return Search(
            {"optimizer.learning_rate": Float(1e-5, 1e-2, log=True),
             "model.C1": Choice(16, 32),
             "optimizer": Choice(adam={"optimizer.name": "adam"},
                                 sgd={"optimizer.name": "sgd", "optimizer.momentum": 0.9})},
            objective="train_loss", trial={"epochs": 5, "epoch_fraction": 0.25})

get_config() is the recipe that the best trial is to have; `trial` says what every trial does
otherwise, and the space what one trial does otherwise than the next.
"""

import copy
import dataclasses

from jaxcifar import config as config_lib
from jaxcifar.errors import UserError, unknown

PRUNERS = ("median", "halving", "none")
_EPOCHS = ("last", "best")
_MEASURED = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclasses.dataclass(frozen=True)
class Float:
    """A number from low to high, both included; log: uniform in its logarithm."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial, name):
        """Return the value of an optuna Trial."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def fields(self, name, value):
        """Return the configuration fields that a value sets, {path: value}."""
        return {name: value}

    def describe(self):
        """Return the range in words."""
        return f"{self.low:g} to {self.high:g}{', log-uniform' if self.log else ''}"

    def check(self, name):
        """Raise UserError for an empty range."""
        if not self.low <= self.high or self.log and self.low <= 0:
            raise UserError(f"search_space: {name} = {self}: low must be at most high"
                            f"{', and above 0 with log' if self.log else ''}")


@dataclasses.dataclass(frozen=True)
class Int(Float):
    """A whole number from low to high, both included; step: distance of two values (1 with log)."""

    step: int = 1

    def suggest(self, trial, name):
        """Return the value of an optuna Trial."""
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)

    def check(self, name):
        """Raise UserError for an empty range, or a step that is none."""
        super().check(name)
        if self.step < 1 or self.log and self.step > 1:
            raise UserError(f"search_space: {name} = {self}: step must be at least 1, and 1 with log")

    def describe(self):
        """Return the range in words."""
        step = f" in steps of {self.step}" if self.step > 1 else ""
        return f"{self.low} to {self.high}{step}, whole{', log-uniform' if self.log else ''}"


class Choice:
    """One of several values of a field or, by keyword, of several sets of fields.

    Choice(16, 32), or Choice(adam={"optimizer.name": "adam"}, sgd={...}), whose name in the space
    is then a mere label.
    """

    def __init__(self, *values, **sets):
        """Take values or sets of fields, not both."""
        self.sets = sets
        # Optuna stores numbers, strings and None; what else is chosen goes by its text.
        simple = (bool, int, float, str, type(None))
        self.values = sets or {v if isinstance(v, simple) else repr(v): v for v in values}
        self._count = len(sets) + len(values)

    def suggest(self, trial, name):
        """Return the label of an optuna Trial's choice."""
        return trial.suggest_categorical(name, list(self.values))

    def fields(self, name, label):
        """Return the configuration fields that a label sets, {path: value}."""
        return dict(self.sets[label]) if self.sets else {name: self.values[label]}

    def describe(self):
        """Return the choices in words."""
        if not self.sets:
            return ", ".join(map(str, self.values))
        return "; ".join(f"{label} ({_fields_text(fields)})" for label, fields in self.sets.items())

    def check(self, name):
        """Raise UserError where there is nothing to choose, or a choice occurs twice."""
        if not self.values or len(self.values) != self._count:
            raise UserError(f"search_space: {name} = Choice({self.describe()}): give different "
                            "values, or different sets of fields by keyword, not both")


@dataclasses.dataclass(frozen=True)
class Search:
    """A search: what varies, what is measured, and how trials differ from the full recipe.

    space: {config path, such as "model.C1": Float, Int or Choice}. objective: a column of
    metrics.jsonl, of training or validation; a loss is minimized, an accuracy maximized. epoch:
    which epoch's objective counts, "last" or "best". trial: fields of every trial, {path: value}.
    trials: how many. pruner: of PRUNERS, with optuna's options in pruner_options.
    """

    space: dict
    objective: str = "val_loss"
    epoch: str = "last"
    trial: dict = dataclasses.field(default_factory=dict)
    trials: int = 20
    pruner: str = "median"
    pruner_options: dict = dataclasses.field(default_factory=dict)

    @property
    def direction(self):
        """"minimize" or "maximize"."""
        return "maximize" if self.objective.endswith("accuracy") else "minimize"

    def check(self, config):
        """Check the declaration against the configuration that it is for.

        Raises:
          UserError: names what is wrong: no such field, range, objective, epoch or pruner.
        """
        if not self.space:
            raise UserError("search_space: nothing varies; declare a Float, Int or Choice")
        for what, value, known in (("epoch", self.epoch, _EPOCHS),
                                   ("pruner", self.pruner, PRUNERS)):
            if value not in known:
                raise UserError(unknown(f"{what} of search_space", value, known))
        varied = set()
        for name, domain in self.space.items():
            domain.check(name)
            sets = getattr(domain, "sets", None) or {"": {name: None}}
            varied |= {path for fields in sets.values() for path in fields}
        known = config_lib.flatten(config_lib.to_dict(config))
        for path in (*varied, *self.trial):
            if path not in known and not path.startswith("model."):
                raise UserError(unknown("config field of search_space", path, known))
        if both := sorted(varied & set(self.trial)):
            raise UserError(f"search_space: {', '.join(both)} is in the space and in `trial`: "
                            "choose one")
        known = _MEASURED if self._changed(config, self.trial).val_size else _MEASURED[:2]
        if self.objective not in known:
            raise UserError(unknown("objective of search_space", self.objective, known)
                            + " (val_ needs config.val_size; a search never looks at the test set)")

    def suggest(self, trial):
        """Return an optuna Trial's parameters, {name in the space: value or label}."""
        return {name: domain.suggest(trial, name) for name, domain in self.space.items()}

    def full_config(self, config, params):
        """Return a configuration's copy with the parameters of a trial."""
        fields = [domain.fields(name, params[name]) for name, domain in self.space.items()]
        return self._changed(config, *fields)

    def trial_config(self, config, params=None):
        """Return a configuration's copy with a trial's parameters, if any, and its fields."""
        return self._changed(self.full_config(config, params) if params else config, self.trial)

    def value(self, values):
        """Return the objective of a trial from the epochs' values, a non-empty list."""
        best = min if self.direction == "minimize" else max
        return best(values) if self.epoch == "best" else values[-1]

    def to_dict(self):
        """Return the declaration as {entry: text}, to compare and to print."""
        which = "lowest" if self.direction == "minimize" else "highest"
        pruner = f"{self.pruner} {_fields_text(self.pruner_options)}".strip()
        return {**{f"space {name}": domain.describe() for name, domain in self.space.items()},
                "objective": f"{which} {self.objective} of the {self.epoch} epoch",
                "every trial": _fields_text(self.trial) or "the full recipe",
                "pruner": pruner}

    @staticmethod
    def _changed(config, *changes):
        config = copy.deepcopy(config)
        for path, value in (item for change in changes for item in change.items()):
            *parents, name = path.split(".")
            target = config
            for parent in parents:
                target = target[parent]
            try:
                with target.unlocked():  # an option of the model may not be there yet
                    target[name] = value
            except TypeError as error:
                raise UserError(f"search_space: config.{path} = {value!r}: {error}") from error
        return config


def _fields_text(fields):
    return ", ".join(f"{path}={value}" for path, value in fields.items())
