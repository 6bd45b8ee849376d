"""The N-body study: trains every row of docs/results/nbody.md.

    python benchmarks/nbody.py --rows=official [--cores=0]   train (or go on with) a group of rows
    python benchmarks/nbody.py --floor                       the least error of an equivariant model

Groups: official, post (the DEMETAr post's budget), growth; or rows by name, comma-separated. Every
row is one run of `python -m demetar.main`, so it resumes where it stopped; runs live in runs/study.
Numbers go to benchmarks/results/nbody/*.json; `nbody_page.py` writes the page from them alone.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import numpy as np

from data_pipelines.json_text import json_text
from demetar.records.files import read_jsonl

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "nbody"
RUNS = ROOT / "runs" / "study"


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


def _steps(number: int, batch_size: int = 100) -> tuple[str, ...]:
    return (
        f"--config.train.num_steps={number}",
        f"--config.train.eval_every={max(1, number // 10)}",
        f"--config.data.batch_size={batch_size}",
    )


# The DEMETAr post's budget is 40 epochs of 6 batches of 500.
_POST_BUDGET = (*_steps(240, 500), "--config.optim.warmup_steps=20")
_LARGER_BUDGET = _steps(3_000)
POST_ROWS = {
    "not_equivariant": "standard transformer (not equivariant)",
    "translation": "translation equivariant",
    "com": "roto-translation, centre of mass",
    "velocity": "roto-translation, velocity = double encoder",
    "node_only": "node only, 4 blocks",
    "edge_cross": "edge cross-attention",
    "egnn": "EGNN (ours)",
    "e3": "edge-space E(3) transformer",
    "linear": "linear: x + c v",
    "deep_set": "DeepSet",
    "set_transformer": "Set Transformer",
}
GROWTH = (5, 10, 20, 50, 100)


def _growth_row(model: str, title: str, n: int) -> Row:
    batch = max(2, 200 // n)
    num_train = 600 if n < 100 else 150  # simulating 100 particles takes a second a system
    return Row(
        "growth",
        f"growth-{model}-{n}",
        title,
        f"general,{model}",
        (
            f"--config.data.general.num_particles={n}",
            *_steps(300, batch),
            "--config.train.eval_every=300",
            f"--config.data.eval_batch_size={batch}",
            f"--config.data.general.num_train={num_train}",
            f"--config.data.general.num_validation={num_train // 10}",
            f"--config.data.general.num_test={num_train // 10}",
            "--config.optim.warmup_steps=30",
        ),
    )


ROWS = [
    *(
        Row("official", f"official-e3-{s}", POST_ROWS["e3"], "", (f"--config.seed={s}",))
        for s in range(3)
    ),
    Row(
        "official",
        "official-egnn-0",
        "EGNN (ours)",
        "egnn",
        (*_steps(8_000), "--config.optim.learning_rate=2e-3", "--config.train.eval_every=400"),
    ),
    *(
        Row("official", f"official-{model}-0", POST_ROWS[model], model, _LARGER_BUDGET)
        for model in ("velocity", "linear", "deep_set", "set_transformer")
    ),
    *(
        Row("post", f"{budget}-{model}", title, f"blog,{model}", options)
        for budget, options in (("seed240", _POST_BUDGET), ("seed3000", _LARGER_BUDGET))
        for model, title in POST_ROWS.items()
    ),
    *(
        _growth_row(model, title, n)
        for model, title in (("e3", "edge-space E(3) transformer"), ("egnn", "EGNN (ours)"))
        for n in GROWTH
    ),
]


def train(row: Row, cores: str) -> None:
    """Trains a row on these CPU cores ("": all), if it is not finished, and writes its JSON."""
    workdir = RUNS / row.name
    command = row.command(str(workdir.relative_to(ROOT)))
    pinned = ["taskset", "-c", cores] if cores else []
    # One pinned core computes fastest as one device.
    devices = ["--config.mesh.cpu_devices=1"] if cores and "," not in cores else []
    log = workdir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    if (workdir / "result.json").exists():
        collect(row, [*command, *devices])
        return
    print(f"{row.name}: see {log}", flush=True)
    with log.open("a") as stream:
        done = subprocess.run(
            [*pinned, sys.executable, *command, *devices], cwd=ROOT, stdout=stream, stderr=stream
        )
    if done.returncode:
        sys.exit(f"{row.name} ended with {done.returncode}; see {log}")
    collect(row, [*command, *devices])


def collect(row: Row, command: list[str]) -> None:
    """The JSON of a finished row."""
    workdir = RUNS / row.name
    result = json.loads((workdir / "result.json").read_text())
    lines = read_jsonl(workdir / "metrics.jsonl")
    curve = [(x["step"], x["position_mse"]) for x in lines if x["split"] == "validation"]
    config = result["config"]
    content = {
        "row": row.name,
        "title": row.title,
        "group": row.group,
        "command": "python " + " ".join(command),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no accelerator",
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
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{row.name}.json").write_text(json_text(content, indent=1) + "\n")


def _num_parameters(log: pathlib.Path) -> int:
    (line, *_) = [x for x in log.read_text().splitlines() if x.startswith("Total: ")]
    return int(float(line.split()[1].replace(",", "")))


def _rate(log: pathlib.Path) -> float:
    """Median over progress lines; the first, which waits for compiling, is left out."""
    rates = [int(x) for x in re.findall(r"(\d+) systems/s", log.read_text())]
    return float(np.median(rates[1:])) if len(rates) > 1 else 0.0


def measure_floor(orientations: int = 6) -> None:
    """How well any equivariant model could do: the variance of the target over rotations.

    The official simulator clips each *component* of a force at 100, so in close encounters
    its dynamics depends on the axes. A model whose prediction turns with the input can at best
    predict the mean over orientations; the mean squared error that remains is the variance.
    Rotations that only exchange axes commute with the clipping: the variance over those is
    what rounding alone does, the control.
    """
    from scipy.spatial.transform import Rotation

    from data_pipelines.nbody import preparation, simulation
    from data_pipelines.nbody.protocols import PROTOCOLS

    protocol = PROTOCOLS["egnn"]
    systems, _ = preparation.load(protocol)
    axes = Rotation.create_group("O").as_matrix().round()
    axes = axes[[not np.array_equal(matrix, np.eye(3)) for matrix in axes]]
    kinds = {
        "any": Rotation.random(orientations - 1, random_state=0).as_matrix(),
        "axes": axes[: orientations - 1],
    }
    content = {
        "command": "python benchmarks/nbody.py --floor",
        "protocol": "egnn",
        "orientations": orientations,
    }
    for kind, rotations in kinds.items():
        content[kind] = {}
        for part, graphs in preparation.split_of(protocol).items():
            targets = [systems.target[graphs]]
            for rotation in rotations:
                x, v = (a[graphs] @ rotation.T for a in (systems.position, systems.velocity))
                steps = (1, protocol.horizon_steps - 1)  # the state after one step is not used
                _, _, y = simulation.simulate(x, v, systems.coupling[graphs], *steps)
                targets.append(y @ rotation)
            variance = np.stack(targets).var(axis=0, ddof=1).mean(axis=(1, 2))
            content[kind][part] = {
                "mse": float(variance.mean()),
                "interval_95": _interval_95(variance),
                "above_0.01": int((variance > 0.01).sum()),
            }
            print(kind, part, content[kind][part], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "floor.json").write_text(json_text(content, indent=1) + "\n")


def _interval_95(values: np.ndarray) -> list[float]:
    """Bootstrap interval of the mean: percentiles of 2,000 resamples."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(2_000)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: text.split(",")
    parser.add_argument("--rows", type=names, default=[], help="groups or rows to train")
    parser.add_argument("--cores", default="", help="to pin each run to, such as 0 or 0,1")
    parser.add_argument("--floor", action="store_true", help="measure the floor")
    options = parser.parse_args()
    known = {row.group for row in ROWS} | {row.name for row in ROWS}
    unknown = [name for name in options.rows if name not in known]
    if unknown:
        sys.exit(f"No rows {unknown}; known: {', '.join(sorted(known))}")
    for row in ROWS:
        if row.group in options.rows or row.name in options.rows:
            train(row, options.cores)
    if options.floor:
        measure_floor()


if __name__ == "__main__":
    main()
