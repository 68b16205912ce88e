"""The flag --config=FILE and the fields that --config.FIELD=VALUE overrides."""

import pathlib
import re

from ml_collections import ConfigDict, config_flags

from jaxcifar import config as config_lib
from jaxcifar.errors import UserError, nearest, unknown


def define(help_text, **options):
    """Define the flag --config, whose fields can be overridden; return its holder.

    An option of the model may be given that the configuration file leaves at its default. options:
    of config_flags.DEFINE_config_file. The parsed value is not locked.
    """
    return config_flags.DEFINE_config_file(
        "config", None, help_text, lock_config=False, accept_new_attributes=True, **options)


def files():
    """Return the paths of the configuration files in configs/, sorted."""
    return sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))


def check_file(specification):
    """Raise UserError where FILE of FILE[:VARIANT] is not there."""
    path = specification.partition(":")[0]
    if not pathlib.Path(path).is_file():
        raise UserError(unknown("configuration file", path, files()))


def check(argv):
    """Raise UserError for the first word of argv that overrides a field that there is not."""
    for word in argv:
        if match := re.match(r"--?(?:no)?config\.([\w.]+)", word):
            _check_path(match[1].split("."))


def _check_path(names):
    field = config_lib.default()
    for i, name in enumerate(names):
        path = ".".join(("config", *names[:i]))
        if not isinstance(field, ConfigDict):
            raise UserError(f"{path} has no fields of its own: set it as --{path}=VALUE")
        if name not in field:
            if names[0] == "model" and i == 1:
                return  # an option, which the model knows
            raise UserError(f"there is no config field {name!r}{nearest(name, field)}; "
                            "jaxcifar/config.py lists them")
        field = field[name]
    if isinstance(field, ConfigDict):
        path = ".".join(("config", *names))
        one = "name" if "name" in field else next(iter(field))
        raise UserError(f"{path} is a group of fields: set one of them, as in --{path}.{one}=VALUE")
