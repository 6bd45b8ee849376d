"""A long prediction: many rows, some bad, in bounded memory; its rate beside the forward pass.

    python benchmarks/predict.py --model=DIR --rows=1000000 --bad=1000
    SMOKE=1 python benchmarks/predict.py --model=DIR

Writes an SDF of QM9's molecules with their bonds, again and again until there are `--rows` of them,
`--bad` of which are broken, element by element as a person might break them. Then it runs `demetar
predict` as a process of its own and looks at the output: every row there, in order, each bad one
with a status. Memory is the most that the process and its workers had at one time. The forward
pass is that of `benchmarks/throughput.py`, of the model's own config, before and after: batches of
its training data, already prepared, and nothing else. At last it prepares such a file for training.
"""

import argparse
import csv
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from ours import Run, keep

from data_pipelines.molecules import preparation
from data_pipelines.molecules.making import chemistry
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.record import Molecule, Row
from data_pipelines.molecules.units import Column
from data_pipelines.qm9.sources import read_qm9pack
from demetar.inference.model import load_model
from demetar.speed.machine import processor
from demetar.training.provenance import git_commit

SMOKE = bool(os.environ.get("SMOKE"))
BLOCKS = 200 if SMOKE else 4_000  # different molecules
_PREPARED = 2_000 if SMOKE else 100_000  # rows that are prepared
_SECONDS = 0.2 if SMOKE else 4.0  # of a turn of the forward pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, default=3_000 if SMOKE else 1_000_000)
    parser.add_argument("--bad", type=int, default=30 if SMOKE else 1_000)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    molecules = _molecules()
    forward = [_forward_rate(options.model)]
    with tempfile.TemporaryDirectory() as folder:
        path, out = pathlib.Path(folder) / "many.sdf", pathlib.Path(folder) / "out.csv"
        bad = _write(path, molecules, options.rows, options.bad)
        command = [sys.executable, "-m", "demetar.predict", str(path)]
        seconds, memory = _run([*command, f"--model={options.model}", f"--out={out}"])
        found = _look_at(out, bad)
        prepared = _preparing_rate(molecules, pathlib.Path(folder))
    forward.append(_forward_rate(options.model))
    result = found | {
        "rows": options.rows,
        "seconds": round(seconds, 1),
        "rows_per_second": round(options.rows / seconds, 1),
        "most_memory_gib": round(memory / 2**30, 2),
        "forward_molecules_per_second": round(statistics.mean(forward), 1),
        "forward_before_and_after": [round(rate, 1) for rate in forward],
        "prepared_rows_per_second": round(prepared, 1),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "commit": git_commit(),
    }
    result["share_of_forward"] = round(
        result["rows_per_second"] / result["forward_molecules_per_second"], 3
    )
    keep(result, options.json)


def _molecules() -> list[Molecule]:
    """Of QM9, every 32nd, with bonds that RDKit takes."""
    found = []
    for molecule in read_qm9pack():
        if molecule.index % 32:
            continue
        numbers = molecule.atomic_numbers.astype(int)
        row = Row(
            molecule.index,
            {},
            molecule.smiles,
            atomic_numbers=numbers,
            positions=molecule.positions,
        )
        made = make_molecule(row, "file")
        has_carbon = 6 in numbers  # what `_write` breaks
        if has_carbon and isinstance(made, Molecule) and chemistry.graph_of(made) is not None:
            found.append(made)
        if len(found) == BLOCKS:
            break
    return found


def _write(path: pathlib.Path, molecules: list[Molecule], rows: int, bad: int) -> set[int]:
    """Writes the file; numbers of its bad rows, from 1."""
    from rdkit import Chem

    blocks = [Chem.MolToMolBlock(chemistry.graph_of(m)).replace("M  END\n", "") for m in molecules]
    chosen = np.random.default_rng(0).choice(rows, bad, replace=False)
    broken = {int(k) + 1 for k in chosen}
    with path.open("w") as file:
        for number in range(1, rows + 1):
            block = blocks[number % len(blocks)]
            if number in broken:
                block = block.replace(" C ", " Br", 1) if number % 2 else block[: len(block) // 2]
            file.write(f"{block}M  END\n> <name>\nm{number}\n\n> <number>\n{number}\n\n$$$$\n")
    return broken


def _run(command: list[str]) -> tuple[float, int]:
    """(Seconds, most bytes of resident memory of the process and its workers)."""
    start, most = time.monotonic(), 0
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        # Seldom: the process stands still while its pages are counted.
        most = max(most, _memory(process.pid))
        time.sleep(0.5 if SMOKE else 5.0)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - start, most


def _memory(pid: int) -> int:
    total = 0
    try:
        status = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = 1024 * int(status.split("Pss:")[1].split()[0])
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            children = (task / "children").read_text().split()
            total += sum(_memory(int(child)) for child in children)
    except (OSError, IndexError, ValueError):
        pass  # it has ended
    return total


def _look_at(out: pathlib.Path, bad: set[int]) -> dict:
    """Refuses an output with a row that is missing, moved, or of the wrong status."""
    statuses: dict[str, int] = {}
    number = 0
    with out.open(newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), 1):
            assert row["name"] == f"m{number}", (number, row)
            assert (row["status"] != "ok") == (number in bad), (number, row)
            assert bool(row["homo_pred"]) == (row["status"] == "ok"), (number, row)
            statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    return {"written": number, "statuses": statuses}


def _forward_rate(model: str) -> float:
    """Molecules a second, the median of five turns."""
    return statistics.median(_run_of(model).forward(_SECONDS) for _ in range(5))


def _preparing_rate(molecules: list[Molecule], folder: pathlib.Path) -> float:
    """Rows of an SDF a second that become molecules with a label and a key, on all cores."""
    path = folder / "train.sdf"
    _write(path, molecules, _PREPARED, 0)
    request = preparation.Request((str(path),), (Column("number", "1"),))
    start = time.monotonic()
    preparation.load(request, str(folder))
    return _PREPARED / (time.monotonic() - start)


@functools.cache
def _run_of(model: str) -> Run:
    run = Run(load_model(model).package.config)
    run.warm_up()
    return run


if __name__ == "__main__":
    main()
