"""Which graphs each process computed in which step: proof that a resume repeats none."""

import json
import pathlib

import numpy as np

from data_pipelines.graph import Graph
from demetar.records.files import read_jsonl


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
