"""Errors a person can mend, and the exit codes of every demetar command.

A `UserError` is printed as its message alone, without a traceback: it names the
thing, both values, and the remedy. Anything else is a bug and keeps its traceback.
"""

import functools
import sys

EXIT_DONE = 0
EXIT_FAILED = 1  # a bug or a broken machine: traceback printed
EXIT_USER_ERROR = 2  # bad input: message printed, nothing lost
EXIT_INTERRUPTED = 75  # saved on SIGINT or SIGTERM; the same command goes on (EX_TEMPFAIL)


class UserError(Exception):
    """Bad input or a refused request; the message says what to do about it."""

    exit_code = EXIT_USER_ERROR


class NonFiniteLoss(UserError):
    """Training diverged or met bad numbers; names the step and the molecules."""

    exit_code = EXIT_FAILED


def suggest(name: str, known) -> str:
    """`" did you mean 'homo'?"` when something known is close to `name`, else `""`."""
    import difflib

    lowered = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


class Interrupted(Exception):
    """Asked to stop by a signal; what had to be saved is saved, and the message says where."""


def exits_cleanly(main):
    """Wraps a command: what a person can mend is a message and an exit code, not a traceback."""

    @functools.wraps(main)
    def wrapped(argv):
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except Interrupted as stop:
            print(f"{stop} The same command goes on from there.", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)

    return wrapped
