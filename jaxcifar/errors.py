"""The one exception type that a user's mistake or environment raises."""

import difflib
import re


class UserError(Exception):
    """Report a mistake that the user can mend, in one line.

    `jaxcifar.main` prints the message without a traceback and exits with `exit_code`.
    The message says what was wrong, what was expected and what to do.
    """

    exit_code = 2


def unknown(what, name, known, hint=""):
    """Return the message for a name that does not exist: "unknown WHAT 'NAME' (did you mean ...?)".

    what: str, the kind of thing. name: what the user wrote. known: the names there are; the nearest is
    suggested, or `hint` in its place, and all are listed.
    """
    known = [str(k) for k in known]
    hint = hint or nearest(name, known)
    return f"unknown {what} {name!r}{hint}; there are: {', '.join(known) or 'none'}"


def plain(name):
    """Return a name without what makes no difference: capitals, hyphens, underscores, blanks."""
    return re.sub("[-_ ]", "", str(name).lower())


def nearest(name, known):
    """Return " (did you mean 'NAME'?)" with the nearest of the known names, or "".

    Capitals, hyphens and underscores make no difference.
    """
    found = {plain(k): k for k in reversed(list(known))}
    close = difflib.get_close_matches(plain(name), found, n=1, cutoff=0.5)
    return f" (did you mean {found[close[0]]!r}?)" if close else ""


def first_line(error):
    """Return the first line of an exception's message, cut after 300 characters, or its type's name
    where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
