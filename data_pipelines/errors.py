"""Errors that a person can mend: the message names the thing, both values and the remedy."""

import difflib


class UserError(Exception):
    """Bad input or a refused request; the message says what to do about it."""

    exit_code = 2


def suggest(name: str, known) -> str:
    """`" did you mean 'homo'?"` when something known is close to `name`, else `""`."""
    lowered = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def check_known(what: str, value, known) -> None:
    """Refuses a name that is not among `known`; `what` says where it was given."""
    if value not in known:
        raise UserError(
            f"Unknown {what} {value!r}.{suggest(value, known)} Known: {', '.join(map(str, known))}."
        )
