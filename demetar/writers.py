"""What a run tells: the card at its start, progress lines, metrics.jsonl, event files.

`metrics.jsonl` is a public interface: one JSON object a line with `step`, `split` and named
values. After a resume, lines of steps that will be run again are dropped first, so that each
step stands there once.
"""

import dataclasses
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np
import tensorboardX

from demetar.graph import Graph


def write_json(file: pathlib.Path, content) -> None:
    """Writes a JSON file whole or not at all."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, file)


def read_jsonl(file: pathlib.Path) -> list[dict]:
    """The lines of a file of JSON lines; a line cut off by a kill is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


class Writers:
    """Writes metrics to `metrics.jsonl` and event files, on process 0; elsewhere nothing.

    Args:
      workdir: of the run.
      step: from which the run goes on.
      last_eval_step: evaluations up to this step are kept.
      is_main: whether this is process 0.
    """

    def __init__(self, workdir: pathlib.Path, step: int, last_eval_step: int, is_main: bool):
        self._is_main = is_main
        if not is_main:
            return
        self._file = workdir / "metrics.jsonl"
        keep = [
            line
            for line in read_jsonl(self._file)
            if line["step"] <= (step if line["split"] == "train" else last_eval_step)
        ]
        unfinished = self._file.with_name(".metrics.jsonl.tmp")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in keep))
        os.replace(unfinished, self._file)
        self._stream = self._file.open("a")
        self._events = tensorboardX.SummaryWriter(str(workdir / "events"), purge_step=step + 1)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point of each curve."""
        if not self._is_main:
            return
        self._stream.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def write_speed(self, step: int, values: dict[str, float]) -> None:
        """Points of curves only: what depends on the clock has no place in metrics.jsonl."""
        if self._is_main:
            for name, value in values.items():
                self._events.add_scalar(f"speed/{name}", value, step)

    def close(self) -> None:
        if self._is_main:
            self._stream.close()
            self._events.close()


class IdentityLog:
    """Which graphs this process computed in which step: proof that a resume repeats none.

    Lines `{"step", "rows", "index"}` in `identity/<process>.jsonl`; rows of the global batch.
    """

    def __init__(self, workdir: pathlib.Path, process: int):
        folder = workdir / "identity"
        folder.mkdir(exist_ok=True)
        self._stream = (folder / f"{process}.jsonl").open("a")
        self._stream.write("\n")  # after a line that a kill cut off

    def write_steps(self, first_step: int, rows_B: np.ndarray, graphs: Graph) -> None:
        """One step, or several stacked ones, whose rows of the global batch are `rows_B`."""
        masks, indices = np.atleast_2d(graphs.graph_mask), np.atleast_2d(graphs.index)
        for k, (mask_B, index_B) in enumerate(zip(masks, indices, strict=True)):
            line = {"rows": rows_B[mask_B].tolist(), "index": index_B[mask_B].tolist()}
            self._stream.write(json.dumps({"step": first_step + k, **line}) + "\n")
        self._stream.flush()


def read_identity(workdir: pathlib.Path) -> dict[int, list[int]]:
    """Step -> numbers of its graphs in the order of the rows, over all processes and attempts.

    A step that ran again must have had the same graphs in the same rows.
    """
    steps: dict[int, dict[int, int]] = {}
    for file in (workdir / "identity").glob("*.jsonl"):
        for line in read_jsonl(file):
            step = steps.setdefault(line["step"], {})
            for row, index in zip(line["rows"], line["index"], strict=True):
                if step.setdefault(row, index) != index:
                    raise ValueError(
                        f"{workdir}: step {line['step']}, row {row} was graph {step[row]} in one "
                        f"attempt and {index} in another."
                    )
    return {step: [rows[r] for r in sorted(rows)] for step, rows in sorted(steps.items())}


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


@dataclasses.dataclass(frozen=True)
class Lap:
    """What was done since the line before.

    Attributes:
      rate: graphs a second.
      flops: operations/s that the model asks for, real nodes and edges alone; None: not counted.
      fill: share of node slots that hold nodes.
      wait: share of the time in which the devices had nothing to do, for want of a batch.
      left: seconds to the end, at the average so far.
    """

    rate: float
    flops: float | None
    fill: float
    wait: float
    left: float


class Pace:
    """Counts the work of steps and the time it takes.

    Args:
      step: from which the run goes on.
      num_steps: of the run.
      work: numbers of steps -> (graphs, operations or None, nodes, slots for nodes) of them all.
    """

    def __init__(self, step: int, num_steps: int, work: Callable[[list[int]], tuple]):
        self._num_steps, self._work = num_steps, work
        self._first_step, self._start = step, time.perf_counter()
        self._steps, self._wait, self._since = [], 0.0, self._start

    def add(self, step: int) -> None:
        """A step whose sums have arrived; they count from 1."""
        self._steps.append(step)

    def waited(self, seconds: float) -> None:
        """The devices had nothing to do, for want of a batch, for so long."""
        self._wait += seconds

    def lap(self, step: int) -> Lap:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        graphs, flops, nodes, slots = self._work(self._steps)
        left = (now - self._start) / max(1, step - self._first_step) * (self._num_steps - step)
        lap = Lap(
            rate=graphs / seconds,
            flops=None if flops is None else flops / seconds,
            fill=nodes / max(slots, 1),
            wait=self._wait / seconds,
            left=left,
        )
        self._steps, self._wait, self._since = [], 0.0, now
        return lap
