"""`metrics.jsonl` and event files: the named numbers of a run.

`metrics.jsonl` is a public interface: one JSON object a line with `step`, `split` and named
values. After a resume, lines of steps that will be run again are dropped first, so that each
step stands there once.
"""

import json
import os
import pathlib

import tensorboardX

from demetar.records.files import read_jsonl


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
