"""What a run tells: the card at its start, progress lines, metrics.jsonl, event files.

`metrics.jsonl` is a public interface: one JSON object a line with `step`, `split` and named
values. After a resume, lines of steps that will be run again are dropped first, so that each
step stands there once.
"""

import json
import os
import pathlib
import sys
import time

import tensorboardX


def write_json(file: pathlib.Path, content) -> None:
    """Writes a JSON file whole or not at all."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, file)


def read_metrics(file: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Writers:
    """Writes metrics to `metrics.jsonl`, event files and the screen.

    Args:
      workdir: of the run.
      step: from which the run goes on.
      last_eval_step: evaluations up to this step are kept.
    """

    def __init__(self, workdir: pathlib.Path, step: int, last_eval_step: int):
        self._file = workdir / "metrics.jsonl"
        keep = [
            line
            for line in read_metrics(self._file)
            if line["step"] <= (step if line["split"] == "train" else last_eval_step)
        ]
        unfinished = self._file.with_name(".metrics.jsonl.tmp")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in keep))
        os.replace(unfinished, self._file)
        self._stream = self._file.open("a")
        self._events = tensorboardX.SummaryWriter(str(workdir / "events"), purge_step=step + 1)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point of each curve."""
        self._stream.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._stream.close()
        self._events.close()


def say(text: str) -> None:
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`3:07` or `2:03:07`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Pace:
    """Molecules per second since the last line, and the time that is left."""

    def __init__(self, step: int, num_steps: int):
        self._num_steps = num_steps
        self._first_step, self._start = step, time.perf_counter()
        self._graphs, self._since = 0, self._start

    def add(self, graphs: int) -> None:
        self._graphs += graphs

    def lap(self, step: int) -> tuple[float, float]:
        """(molecules per second since the last lap, seconds left at the average so far)."""
        now = time.perf_counter()
        rate = self._graphs / max(now - self._since, 1e-9)
        self._graphs, self._since = 0, now
        done = max(1, step - self._first_step)
        return rate, (now - self._start) / done * (self._num_steps - step)
