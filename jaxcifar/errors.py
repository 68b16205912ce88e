"""The one exception type that a user's mistake or environment raises."""


class UserError(Exception):
    """Report a mistake that the user can mend, in one line.

    `jaxcifar.main` prints the message without a traceback and exits with `exit_code`.
    The message says what was wrong, what was expected and what to do.
    """

    exit_code = 2
