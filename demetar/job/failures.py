"""`failures.jsonl` in the workdir: what a run failed of by itself, and that it does so no more.

Being killed, lost or preempted never counts: a process that is killed writes nothing. Neither does
what the machine or the user is to blame for, such as a full disk.
"""

import pathlib

from data_pipelines.json_text import json_text
from demetar.exits import EXIT_FAILED, EXIT_NO_PROGRESS, NoProgress
from demetar.records import files

_MOST = 3  # failures at one step


def check_progress(workdir: pathlib.Path, step: int) -> None:
    """Refuses to go on from `step` to one at which the run has failed three times."""
    failures = _read(workdir)
    for failed_at in {line["step"] for line in failures if line["step"] >= step}:
        errors = {x["attempt"]: x["error"] for x in failures if x["step"] == failed_at}
        if len(errors) >= _MOST:
            raise NoProgress(
                f"This run has failed {len(errors)} times at step {failed_at}, at last with: "
                f"{list(errors.values())[-1]} To try again nevertheless, delete "
                f"{workdir / 'failures.jsonl'}."
            )


def count_failure(
    workdir: pathlib.Path, attempt: str, process: int, step: int, error: BaseException
) -> int:
    """Adds a line; returns the exit code: *failed*, or *no progress* if it was once too often.

    Args:
      workdir: of the run.
      attempt: name of this start. Processes that fail in one start count once.
      process: number of this one.
      step: at which it failed.
      error: of what.
    """
    line = {"attempt": attempt, "process": process, "step": step}
    line |= {"error": f"{type(error).__name__}: {error}"[:500]}
    try:
        with (workdir / "failures.jsonl").open("a") as stream:
            stream.write(json_text(line) + "\n")
    except OSError:
        return EXIT_FAILED
    attempts = {x["attempt"] for x in _read(workdir) if x["step"] == step}
    return EXIT_FAILED if len(attempts) < _MOST else EXIT_NO_PROGRESS


def _read(workdir: pathlib.Path) -> list[dict]:
    return files.read_jsonl(workdir / "failures.jsonl")
