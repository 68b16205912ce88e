"""The one exception type that a user's mistake or environment raises."""

import difflib
import re


class UserError(Exception):
    """Report a mistake that the user can mend, in one line.

    `jaxcifar.main` prints the message without a traceback and exits with `exit_code`.
    The message says what was wrong, what was expected and what to do.
    """

    exit_code = 2


def unknown(what, name, known):
    """Return the message for a name that does not exist: "unknown WHAT 'NAME' (did you mean ...?)".

    what: str, the kind of thing. name: what the user wrote. known: the names there are; the nearest is
    suggested and all are listed.
    """
    known = [str(k) for k in known]
    return f"unknown {what} {name!r}{nearest(name, known)}; there are: {', '.join(known) or 'none'}"


def nearest(name, known):
    """Return " (did you mean 'NAME'?)" with the nearest of the known names, or "".

    Capitals, hyphens and underscores make no difference.
    """
    plain = {re.sub("[-_ ]", "", str(k).lower()): k for k in reversed(list(known))}
    close = difflib.get_close_matches(re.sub("[-_ ]", "", str(name).lower()), plain, n=1, cutoff=0.5)
    return f" (did you mean {plain[close[0]]!r}?)" if close else ""


def first_line(error):
    """Return the first line of an exception's message, cut after 300 characters, or its type's name
    where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
