"""The flag --config=FILE[:VARIANT], and the fields that --config.FIELD=VALUE overrides."""

import contextlib
import inspect
import pathlib
import re
import runpy
import traceback

from ml_collections import ConfigDict, config_flags

from jaxcifar import config as config_lib
from jaxcifar.errors import UserError, first_line, nearest, unknown

# What other programs call a field: its path here.
_ELSEWHERE = {
    "lr": "optimizer.learning_rate", "wd": "optimizer.weight_decay", "bs": "batch_size",
    "arch": "model.name", "amp": "dtype", "gpus": "num_devices", "num_epochs": "epochs",
    "dropout": "model.dropout", "scheduler": "schedule.name", "clip_grad": "max_grad_norm",
    "cutout": "augment", "mixup": "augment", "cutmix": "augment", "autoaugment": "augment",
}


def define(help_text, **options):
    """Define the flag --config, whose fields can be overridden; return its holder.

    An option of the model may be given that the configuration file leaves at its default. options:
    of config_flags.DEFINE_config_file. The parsed value is not locked.
    """
    return config_flags.DEFINE_config_file(
        "config", None, help_text, lock_config=False, accept_new_attributes=True, **options)


def where_to_run():
    """Return "" where there are configuration files, else what to do, for the end of a message."""
    return "" if files() else "; run this in the repository's folder, where configs/ is"


def files():
    """Return the paths of the configuration files in configs/, sorted."""
    return sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))


def read(specification):
    """Return the configuration that FILE or FILE:VARIANT gives.

    Raises:
      UserError: there is no such file or variant, or the file is wrong: the message has the line.
    """
    path, colon, variant = specification.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(unknown("configuration file", path, files()) + where_to_run())
    with explaining(path):
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path} defines no function get_config() that returns the configuration")
        if colon and not inspect.signature(get_config).parameters:
            raise UserError(f"{path} has no variants: leave out ':{variant}'")
        config = get_config(variant) if colon else get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returned {config!r:.60}, no configuration: start from "
                        "jaxcifar.config.default() and return it")
    return config


@contextlib.contextmanager
def explaining(path):
    """Turn what a configuration file raises in the `with` block into a UserError with its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the file does
        raise UserError(_place(error, path) + _explained(error)) from error


def check(argv):
    """Raise UserError for the first word of argv that overrides a field that there is not."""
    for path in paths(argv):
        _check_path(path.split("."))


def settle(config, read_config, argv):
    """Drop options of the file's model from `config` where argv names another model.

    config: parsed from argv. read_config: what the file alone gives. Options in argv stay. Returns
    the names of what was dropped, a list.
    """
    if config.model.get("name") == read_config.model.get("name"):
        return []
    given = {path.partition(".")[2] for path in paths(argv) if path.startswith("model.")}
    dropped = [option for option in read_config.model
               if option != "name" and option not in given and option in config.model]
    with config.unlocked():
        for option in dropped:
            del config.model[option]
    return dropped


def hint(name):
    """Return " (did you mean --config.FIELD?)" for the name of a flag that there is not, or ""."""
    name = name.replace("-", "_")
    if name == "resume":
        return ": the same command with the same --workdir goes on from where it stopped"
    path = _ELSEWHERE.get(name) or next(
        (path for path in _declared() if path == name or path.endswith(f".{name}")
         and not path.startswith("speedrun.")), None)  # those have an effect on speedruns only
    return f" (did you mean --config.{path}?)" if path else ""


def paths(argv):
    """Return the paths of the fields that argv overrides, such as "optimizer.name"."""
    found = (re.match(r"--?(?:no)?config\.([\w.]+)", word) for word in argv)
    return [match[1] for match in found if match]


def _declared():
    """Return the paths of all fields there are."""
    return list(config_lib.flatten(config_lib.to_dict(config_lib.default())))


def _no_field(name, known):
    """Return the message for a field that there is not, with what was meant, or the nearest known."""
    meant = "" if name in _ELSEWHERE or name in known else nearest(name, known)
    return f"there is no config field {name!r}{meant or hint(name)}; jaxcifar/config.py lists them"


def _check_path(names):
    field = config_lib.default()
    for i, name in enumerate(names):
        path = ".".join(("config", *names[:i]))
        if not isinstance(field, ConfigDict):
            raise UserError(f"{path} has no fields of its own: set it as --{path}=VALUE")
        if name not in field:
            if names[0] == "model" and i == 1:
                return  # an option, which the model knows
            raise UserError(_no_field(name, field))
        field = field[name]
    if isinstance(field, ConfigDict):
        path = ".".join(("config", *names))
        one = "name" if "name" in field else next(iter(field))
        raise UserError(f"{path} is a group of fields: set one of them, as in --{path}.{one}=VALUE")


def _place(error, path):
    """Return "FILE:LINE: ", the last line of the file that an exception came through."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == path]
    return f"{path}:{lines[-1]}: " if lines else f"{path}: "


def _explained(error):
    """Return what went wrong in one line, with the nearest field where one does not exist."""
    message = first_line(error)
    missing = re.search(r"Key [\"'](\w+)[\"'] does not exist", message)
    if isinstance(error, AttributeError) and not missing:  # one that is read, not set
        missing = re.fullmatch(r"[\"'\\]+(\w+)[\"'\\]+(nDid you mean.*)?", message)
    if missing:
        return _no_field(missing[1], {name for path in _declared() for name in path.split(".")})
    if match := re.search(r"Could not override field '(\w+)' .*?original type <class '(\w+)'>.* "
                          r"type <class '([\w.]+)'>", message):
        return f"config.{match[1]} must be of type {match[3].split('.')[-1]}, not {match[2]}"
    return f"{type(error).__name__}: {message}"
