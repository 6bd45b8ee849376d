"""What a run says to the person who watches: on the screen and in `logs/`."""

import logging
import pathlib
import sys

_logger = logging.getLogger("demetar")


def open_log(workdir: pathlib.Path, process: int, count: int) -> None:
    """From now on `say` and `complain` also write this process's `logs/process-<n>.log`.

    Process 0 speaks on the screen too; the others only complain there, with their number.
    """
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
    _logger.propagate = False
    _logger.setLevel(logging.INFO)
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.INFO if process == 0 else logging.ERROR)
    who = f"[process {process} of {count}] " if process else ""
    screen.setFormatter(logging.Formatter(f"{who}%(message)s"))
    file = logging.FileHandler(workdir / "logs" / f"process-{process}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _logger.addHandler(screen)
    _logger.addHandler(file)


def say(text: str) -> None:
    """A line for the person who watches."""
    if _logger.handlers:
        _logger.info(text)
    else:
        print(text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """A line that a person must see, whatever process it comes from."""
    if _logger.handlers:
        _logger.error(text)
    else:
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`3:07` or `2:03:07`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size_text(size: float) -> str:
    """Bytes, for a person."""
    if size >= 2**30 / 10:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"
