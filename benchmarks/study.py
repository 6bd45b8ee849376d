"""A study: rows that are runs of `demetar.main`, their numbers as JSON, one file a row.

A row resumes where it stopped. Pages are written from the JSON alone.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy as np

from data_pipelines.json_text import json_text
from demetar.records.files import read_jsonl
from demetar.training.provenance import git_commit

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One run: `name` of its files, `title` in the table, variant of configs/nbody.py, flags."""

    group: str
    name: str
    title: str
    variant: str
    flags: tuple[str, ...] = ()

    def command(self, workdir: str) -> list[str]:
        config = "configs/nbody.py" + (f":{self.variant}" if self.variant else "")
        return ["-m", "demetar.main", f"--config={config}", *self.flags, f"--workdir={workdir}"]


@dataclasses.dataclass(frozen=True)
class Study:
    """Rows, where their runs live, and where their numbers go."""

    rows: list[Row]
    runs: pathlib.Path
    results: pathlib.Path

    def train(self, row: Row, cores: str) -> None:
        """Trains a row on these CPU cores ("": all), if it is not finished, and writes its JSON."""
        workdir = self.runs / row.name
        command = row.command(str(workdir.relative_to(ROOT)))
        pinned = ["taskset", "-c", cores] if cores else []
        # One pinned core computes fastest as one device.
        devices = ["--config.mesh.cpu_devices=1"] if cores and "," not in cores else []
        log = workdir.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        if (workdir / "result.json").exists():
            self.collect(row)
            return
        print(f"{row.name}: see {log}", flush=True)
        with log.open("a") as stream:
            done = subprocess.run(
                [*pinned, sys.executable, *command, *devices],
                cwd=ROOT,
                stdout=stream,
                stderr=stream,
            )
        if done.returncode:
            sys.exit(f"{row.name} ended with {done.returncode}; see {log}")
        self.collect(row)

    def collect(self, row: Row) -> None:
        """The JSON of a finished row."""
        workdir = self.runs / row.name
        result = json.loads((workdir / "result.json").read_text())
        lines = read_jsonl(workdir / "metrics.jsonl")
        curve = [(x["step"], x["position_mse"]) for x in lines if x["split"] == "validation"]
        config = result["config"]
        command = row.command(str(workdir.relative_to(ROOT)))
        command.append(f"--config.mesh.cpu_devices={config['mesh']['cpu_devices']}")
        content = {
            "row": row.name,
            "title": row.title,
            "group": row.group,
            "command": "python " + " ".join(command),
            "machine": f"{result['processor']}, {result['devices']}",
            "parameters": _num_parameters(workdir.with_suffix(".log")),
            "seed": config["seed"],
            "protocol": config["data"]["protocol"],
            "num_particles": result["data_passport"]["protocol"]["num_particles"],
            "steps": config["train"]["num_steps"],
            "batch_size": config["data"]["batch_size"],
            "best_step": result["step"],
            "validation_mse": result["validation_score"],
            "test": result["targets"]["position"],
            "count": result["count"],
            "train_seconds": result["train_seconds"],
            "systems_per_second": _rate(workdir.with_suffix(".log")),
            "devices": result["devices"],
            "git_commit": result["git_commit"],
            "validation_curve": curve,
        }
        self.keep(row.name, content)

    def keep(self, name: str, content: dict) -> None:
        """Writes the numbers of one row, or of what is no run."""
        self.results.mkdir(parents=True, exist_ok=True)
        content = {"git_commit": git_commit()} | content
        (self.results / f"{name}.json").write_text(json_text(content, indent=1) + "\n")

    def read(self, name: str) -> dict | None:
        """The numbers of one row; None where it has not been run."""
        file = self.results / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def parser(self, about: str) -> argparse.ArgumentParser:
        """Of a command that trains the rows."""
        parser = argparse.ArgumentParser(
            description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        names = lambda text: text.split(",")
        parser.add_argument("--rows", type=names, default=[], help="groups or rows to train")
        parser.add_argument("--cores", default="", help="to pin each run to, such as 0 or 0,1")
        return parser

    def train_rows(self, names: list[str], cores: str) -> None:
        """Trains the rows of these names or groups that are not finished."""
        known = {row.group for row in self.rows} | {row.name for row in self.rows}
        if unknown := [name for name in names if name not in known]:
            sys.exit(f"No rows {unknown}; known: {', '.join(sorted(known))}")
        for row in self.rows:
            if row.group in names or row.name in names:
                self.train(row, cores)


def _num_parameters(log: pathlib.Path) -> int:
    (line, *_) = [x for x in log.read_text().splitlines() if x.startswith("Total: ")]
    return int(float(line.split()[1].replace(",", "")))


def _rate(log: pathlib.Path) -> float:
    """Median over progress lines; the first, which waits for compiling, is left out."""
    rates = [int(x) for x in re.findall(r"(\d+) systems/s", log.read_text())]
    return float(np.median(rates[1:])) if len(rates) > 1 else 0.0


def measure_floor(name: str, most: int = 5_000, orientations: int = 6) -> dict:
    """How well any equivariant model could do: the variance of the target over rotations.

    The official simulator clips each *component* of a force at 100, so in close encounters
    its dynamics depends on the axes. A model whose prediction turns with the input can at best
    predict the mean over orientations; the mean squared error that remains is the variance.
    Rotations that only exchange axes commute with the clipping: the variance over those is
    what rounding alone does, the control.

    Args:
      name: of the protocol.
      most: systems of each part, from its first.
      orientations: of each system.
    """
    from scipy.spatial.transform import Rotation

    from data_pipelines.nbody import preparation, simulation
    from data_pipelines.nbody.draws import Start
    from data_pipelines.nbody.protocols import PROTOCOLS

    protocol = PROTOCOLS[name]
    systems, _ = preparation.load(protocol)
    # The state after one step is not used.
    onward = dataclasses.replace(
        protocol, input_step=1, horizon_steps=(protocol.horizon_steps[0] - 1,)
    )
    axes = Rotation.create_group("O").as_matrix().round()
    axes = axes[[not np.array_equal(matrix, np.eye(3)) for matrix in axes]]
    kinds = {
        "any": Rotation.random(orientations - 1, random_state=0).as_matrix(),
        "axes": axes[: orientations - 1],
    }
    content = {"protocol": name, "orientations": orientations}
    for kind, rotations in kinds.items():
        content[kind] = {}
        for part, graphs in preparation.split_of(protocol).items():
            graphs = graphs[:most]
            targets = [systems.target[graphs, 0]]
            for rotation in rotations:
                x, v = (a[graphs] @ rotation.T for a in (systems.position, systems.velocity))
                _, after = simulation.simulate(Start(x, v, systems.charge[graphs]), onward)
                targets.append(after.position @ rotation)
            variance = np.stack(targets).var(axis=0, ddof=1).mean(axis=(1, 2))
            content[kind][part] = {
                "mse": float(variance.mean()),
                "interval_95": _interval_95(variance),
                "above_0.01": int((variance > 0.01).sum()),
                "systems": len(graphs),
            }
            print(kind, part, content[kind][part], flush=True)
    return content


def _interval_95(values: np.ndarray) -> list[float]:
    """Bootstrap interval of the mean: percentiles of 2,000 resamples."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(2_000)]
    return np.percentile(means, [2.5, 97.5]).tolist()
