"""Which graphs each process computed in which step: proof that a resume repeats none."""

import pathlib

import numpy as np

from data_pipelines.graph import Graph
from data_pipelines.json_text import json_text
from demetar.records.files import read_jsonl


class GraphLog:
    """Which graphs this process computed in which step: proof that a resume repeats none.

    Lines `{"step", "rows", "index"}` in `graph_log/<process>.jsonl`; rows of the global batch.
    """

    def __init__(self, workdir: pathlib.Path, process: int):
        folder = workdir / "graph_log"
        folder.mkdir(exist_ok=True)
        self._stream = (folder / f"{process}.jsonl").open("a")
        self._stream.write("\n")  # after a line that a kill cut off

    def write_step(self, step: int, rows_B: np.ndarray, graphs: Graph) -> None:
        """The graphs of this process in a step, at `rows_B` of the global batch."""
        real_B = graphs.graph_mask
        line = {"rows": rows_B[real_B].tolist(), "index": graphs.index[real_B].tolist()}
        self._stream.write(json_text({"step": step, **line}) + "\n")
        self._stream.flush()


def read_graph_log(workdir: pathlib.Path) -> dict[int, list[int]]:
    """Step -> numbers of its graphs in the order of the rows, over all processes and attempts.

    A step that ran again must have had the same graphs in the same rows.
    """
    steps: dict[int, dict[int, int]] = {}
    for file in (workdir / "graph_log").glob("*.jsonl"):
        for line in read_jsonl(file):
            step = steps.setdefault(line["step"], {})
            for row, index in zip(line["rows"], line["index"], strict=True):
                if step.setdefault(row, index) != index:
                    raise ValueError(
                        f"{workdir}: step {line['step']}, row {row} was graph {step[row]} in one "
                        f"attempt and {index} in another."
                    )
    return {step: [rows[r] for r in sorted(rows)] for step, rows in sorted(steps.items())}
