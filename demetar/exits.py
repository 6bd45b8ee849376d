"""Errors a person can mend, and the exit codes of every demetar command.

A `UserError` is printed as its message alone, without a traceback: it names the
thing, both values, and the remedy. Anything else is a bug and keeps its traceback.
"""

import functools
import io
import os
import stat
import sys
import warnings

from data_pipelines.errors import UserError, machine_fault

EXIT_DONE = 0
EXIT_FAILED = 1  # a bug or a broken machine: traceback printed. Do not requeue
EXIT_USER_ERROR = 2  # bad input, or a machine that refuses: message printed. Do not requeue
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


class NotRestorable(UserError):
    """What a run has saved first cannot be restored: it must not go on as if it could."""

    exit_code = EXIT_FAILED


class NoProgress(UserError):
    """The run failed at one step too often to try again."""

    exit_code = EXIT_NO_PROGRESS


class Preempted(Exception):
    """Asked to stop; what had to be saved is saved, and the message says where."""


def exits_cleanly(main):
    """Wraps a command: what a person can mend is a message and an exit code, not a traceback."""

    @functools.wraps(main)
    def wrapped(argv):
        _outlive_readers()
        # For a person: without the place in our code.
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except Exception as error:
            message = machine_fault(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)

    return wrapped


class _Pipe(io.FileIO):
    """What is written after the reader has gone, as `head` does, is lost; nothing else changes."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _outlive_readers() -> None:
    """A command does its work and ends with its own code, whether or not anyone reads on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            number = stream.fileno()
            piped = stat.S_ISFIFO(os.fstat(number).st_mode)
        except (AttributeError, OSError, ValueError):  # none, closed, or of a test
            continue
        if not piped or isinstance(getattr(stream.buffer, "raw", stream.buffer), _Pipe):
            continue
        pipe = _Pipe(number, "w", closefd=False)
        if not isinstance(stream.buffer, io.RawIOBase):  # as PYTHONUNBUFFERED wants it
            pipe = io.BufferedWriter(pipe)
        modes = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        stream.flush()
        setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, stream.errors, **modes))
