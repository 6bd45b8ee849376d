"""`metrics.jsonl` and other writers: the named numbers of a run.

`metrics.jsonl` is a public interface: one JSON object a line with `step`, `split` and named
values. After a resume, lines of steps that will be run again are dropped first, so that each
step stands there once. What else is written, `config.log.writers` says: rows of
`demetar/records/writers.py`.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from data_pipelines.json_text import json_text
from demetar.records.files import read_jsonl
from demetar.records.writers import Background, Run, check_writers, close_all


class Writers:
    """Writes metrics to `metrics.jsonl` and to the writers, on process 0; elsewhere nothing.

    Args:
      workdir: of the run.
      step: from which the run goes on.
      last_eval_step: evaluations up to this step are kept.
      config_json: the resolved config as JSON values.
      names: `config.log.writers`.
      project: `config.log.project`.
      is_main: whether this is process 0.

    Raises:
      UserError: on every process, if a writer does not exist or its package is not installed.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        last_eval_step: int,
        config_json: dict[str, Any],
        names: Sequence[str],
        project: str,
        is_main: bool,
    ):
        check_writers(names)
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
        unfinished.write_text("".join(json_text(line) + "\n" for line in keep))
        os.replace(unfinished, self._file)
        self._stream = self._file.open("a")
        run = Run(workdir, step, config_json, project)
        self._writers = [Background(name, run) for name in dict.fromkeys(names)]

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point of each curve."""
        if not self._is_main:
            return
        self._stream.write(json_text({"step": step, "split": split, **values}) + "\n")
        self._stream.flush()
        self._scalars(step, split, values)

    def write_speed(self, step: int, values: dict[str, float]) -> None:
        """Points of curves only: what depends on the clock has no place in metrics.jsonl."""
        if self._is_main:
            self._scalars(step, "speed", values)

    def _scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        named = {f"{group}/{name}": value for name, value in values.items()}
        for writer in self._writers:
            writer.scalars(step, named)

    def close(self) -> None:
        if self._is_main:
            self._stream.close()
            close_all(self._writers)
