"""Errors a person can mend, and the exit codes of every demetar command.

A `UserError` is printed as its message alone, without a traceback: it names the
thing, both values, and the remedy. Anything else is a bug and keeps its traceback.
"""

import functools
import sys

from data_pipelines.errors import UserError

EXIT_DONE = 0
EXIT_FAILED = 1  # a bug or a broken machine: traceback printed. Do not requeue
EXIT_USER_ERROR = 2  # bad input: message printed, nothing lost. Do not requeue
EXIT_NOTHING = 3  # a prediction of which no row succeeded; its output says why
EXIT_PREEMPTED = 75  # asked to stop, and saved; the same command goes on (EX_TEMPFAIL). Requeue
EXIT_LOST = 76  # another process was lost, or hangs; as if this one had been killed
EXIT_NO_PROGRESS = 78  # failed at the same step three times. Do not requeue


class NonFiniteLoss(UserError):
    """Training diverged or met bad numbers; names the step and the molecules."""

    exit_code = EXIT_FAILED


class FilesGone(UserError):
    """Somebody deleted the folder of a run that was under way."""

    exit_code = EXIT_FAILED


class NoProgress(UserError):
    """The run failed at one step too often to try again."""

    exit_code = EXIT_NO_PROGRESS


class Preempted(Exception):
    """Asked to stop; what had to be saved is saved, and the message says where."""


def exits_cleanly(main):
    """Wraps a command: a `UserError` is a message and an exit code, not a traceback."""

    @functools.wraps(main)
    def wrapped(argv):
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    return wrapped
