"""Checks of model options: a wrong one is a UserError of one line, not a shape that misfits."""

from jaxcifar.errors import UserError


def check_positive(model, **options):
    """Raise UserError unless every option is an integer of at least 1; model: its name."""
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{model}: {option} is {value!r}: give an integer of at least 1")


def check_counts(model, **options):
    """Raise UserError unless every option is a non-empty sequence of integers of at least 1."""
    for option, values in options.items():
        if not isinstance(values, tuple) or not values:
            raise UserError(f"{model}: {option} is {values!r}: give a list of integers")
        check_positive(model, **{f"{option}[{i}]": value for i, value in enumerate(values)})


def check_rate(model, **options):
    """Raise UserError unless every option is a probability below 1."""
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise UserError(f"{model}: {option} is {value!r}: give a number from 0 to below 1")


def check_per_stage(model, **options):
    """Raise UserError unless all options give one integer of at least 1 for every stage."""
    check_counts(model, **options)
    if len({len(values) for values in options.values()}) > 1:
        given = ", ".join(f"{option} ({len(values)})" for option, values in options.items())
        raise UserError(f"{model}: its options name different numbers of stages: {given}: "
                        "give each of them one number per stage")


def check_groups(model, what, channels, groups):
    """Raise UserError unless `groups` equal groups can be made of so many channels.

    what: which channels they are, in the message.
    """
    if groups < 1 or channels < groups or channels % groups:
        raise UserError(f"{model}: {channels} {what} cannot be split into {groups} groups: "
                        "choose a multiple of the number of groups")
