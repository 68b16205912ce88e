"""Commands of argparse: a mistake is one line on stderr, and so is what Ctrl-C leaves."""

import argparse
import math
import os
import sys

from jaxcifar.errors import UserError


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors, in place of a usage text of many lines."""

    def __init__(self, description, prog=None):
        """Take the description of --help as it is; prog: the command, else the script's name."""
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, and put the home folder for a "~", which the shell leaves after "="."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, str) and value.startswith("~"):
                setattr(found, name, os.path.expanduser(value))
        return found, rest

    def error(self, message):
        """Raise UserError."""
        raise UserError(f"{message}; {self.prog} --help shows the arguments")


def at_least(lowest, number=int):
    """Return argparse's `type` of a finite number (an int, or a float) that is `lowest` or more."""
    def convert(text):
        try:
            value = number(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value < math.inf:
            what = "whole number" if number is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {lowest} up")
        return value

    return convert


def run(act, stopped="nothing was written", traceback=False):
    """Return the exit code of act(): what it returns (0 for None), 2 after a UserError, 130 after Ctrl-C.

    stopped: what Ctrl-C leaves, for the line "stopped; STOPPED". traceback: let both through.
    """
    if traceback:
        return act() or 0
    try:
        return act() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return 130
