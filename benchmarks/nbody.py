"""The N-body study: trains every row of docs/results/nbody.md and writes that page.

    python benchmarks/nbody.py --rows=official [--cores=0]   train (or go on with) a group of rows
    python benchmarks/nbody.py --floor                       the least error of an equivariant model
    python benchmarks/nbody.py --page                        the page and its picture, from the JSON

Groups: official, seed, growth; or rows by name, comma-separated. Every row is one run of
`python -m demetar.main`, so it resumes where it stopped; runs live in runs/study. Numbers go
to benchmarks/results/nbody/*.json, and only from there to the page.
"""

import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
from absl import app, flags

from demetar.records.files import read_jsonl
from demetar.training.evaluator import interval_95

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "nbody"
RUNS = ROOT / "runs" / "study"
PAGE = ROOT / "docs" / "results" / "nbody.md"

_ROWS = flags.DEFINE_list("rows", [], "Groups or rows to train.")
_CORES = flags.DEFINE_string("cores", "", "CPU cores to pin each run to, such as 0 or 0,1.")
_FLOOR = flags.DEFINE_bool("floor", False, "Measure the floor of equivariant models.")
_PAGE = flags.DEFINE_bool("page", False, "Write the page.")


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


# The seed's budget is 40 epochs of 6 batches of 500.
_SEED_BUDGET = (*_steps(240, 500), "--config.optim.warmup_steps=20")
_LARGER_BUDGET = _steps(3_000)
_SEED_ROWS = {
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
_GROWTH = (5, 10, 20, 50, 100)


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
        Row("official", f"official-e3-{s}", _SEED_ROWS["e3"], "", (f"--config.seed={s}",))
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
        Row("official", f"official-{model}-0", _SEED_ROWS[model], model, _LARGER_BUDGET)
        for model in ("velocity", "linear", "deep_set", "set_transformer")
    ),
    *(
        Row("seed", f"{budget}-{model}", title, f"blog,{model}", options)
        for budget, options in (("seed240", _SEED_BUDGET), ("seed3000", _LARGER_BUDGET))
        for model, title in _SEED_ROWS.items()
    ),
    *(
        _growth_row(model, title, n)
        for model, title in (("e3", "edge-space E(3) transformer"), ("egnn", "EGNN (ours)"))
        for n in _GROWTH
    ),
]


def train(row: Row) -> None:
    """Trains a row, if it is not finished, and writes its JSON."""
    workdir = RUNS / row.name
    command = row.command(str(workdir.relative_to(ROOT)))
    cores = ["taskset", "-c", _CORES.value] if _CORES.value else []
    # One pinned core computes fastest as one device.
    devices = ["--config.mesh.cpu_devices=1"] if _CORES.value and "," not in _CORES.value else []
    log = workdir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    if (workdir / "result.json").exists():
        collect(row, [*command, *devices])
        return
    print(f"{row.name}: see {log}", flush=True)
    with log.open("a") as stream:
        done = subprocess.run(
            [*cores, sys.executable, *command, *devices], cwd=ROOT, stdout=stream, stderr=stream
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
    (RESULTS / f"{row.name}.json").write_text(json.dumps(content, indent=1) + "\n")


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

    from data_pipelines.nbody import simulation

    protocol = simulation.PROTOCOLS["egnn"]
    systems, _ = simulation.load(protocol)
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
        for part, graphs in simulation.split_of(protocol).items():
            targets = [systems.target[graphs]]
            for rotation in rotations:
                x, v = (a[graphs] @ rotation.T for a in (systems.position, systems.velocity))
                steps = (1, protocol.horizon_steps - 1)  # the state after one step is not used
                _, _, y = simulation.simulate(x, v, systems.coupling[graphs], *steps)
                targets.append(y @ rotation)
            variance = np.stack(targets).var(axis=0, ddof=1).mean(axis=(1, 2))
            content[kind][part] = {
                "mse": float(variance.mean()),
                "interval_95": interval_95(variance),
                "above_0.01": int((variance > 0.01).sum()),
            }
            print(kind, part, content[kind][part], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "floor.json").write_text(json.dumps(content, indent=1) + "\n")


# --- the page ----------------------------------------------------------------------------------

# Printed in the named papers; see docs/results/nbody.md for what differs.
_PUBLISHED = (
    ("Multivector Neurons (2024)", 0.0035),
    ("SEGNN (2021), PONITA (2023)", 0.0043),
    ("EGNN (2021), 300,000 updates", 0.0071),
    ("Radial Field (2021)", 0.0104),
    ("GNN (2021)", 0.0107),
    ("TFN (2021)", 0.0155),
    ("SE(3)-Transformer (2021)", 0.0244),
    ("Linear (2021)", 0.0819),
)


def _read(name: str) -> dict | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _line(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _mse(found: dict | None, key: str = "mse") -> str:
    return f"{found['test'][key]:.5f}" if found else ""


def _interval(found: dict | None) -> str:
    return "{:.5f} to {:.5f}".format(*found["test"]["interval_95"]) if found else ""


def _table_official() -> list[str]:
    lines = [
        _line("model", "parameters", "steps", "seed", "test MSE", "95 % interval", "median",
              "validation MSE", "minutes"),
        _line(*["---"] * 9),
    ]  # fmt: skip
    for row in ROWS:
        if row.group != "official":
            continue
        found = _read(row.name)
        cells = [row.title]
        if found:
            cells += [
                f"{found['parameters']:,}",
                f"{found['steps']:,}",
                found["seed"],
                _mse(found),
                _interval(found),
                f"{found['test']['median']:.1e}",
                f"{found['validation_mse']:.5f}",
                f"{found['train_seconds'] / 60:.0f}",
            ]
        lines.append(_line(*cells, *[""] * (9 - len(cells))))
    return lines


def _trivial(found: dict | None) -> list[str]:
    names = {
        "mse_of_no_motion": "no motion: x",
        "mse_of_free_flight": "free flight: x + v T",
        "mse_of_linear": "best linear in x and v, least squares",
    }
    lines = [_line("predictor", "test MSE"), _line("---", "---")]
    return lines + [_line(title, _mse(found, key)) for key, title in names.items()]


def _headline() -> str:
    found = [_read(f"official-e3-{seed}") for seed in range(3)]
    errors = [x["test"]["mse"] for x in found if x]
    if len(errors) < 3:
        return f"Only {len(errors)} of 3 seeds have been run."
    floor = _read("floor")
    text = (
        f"**{np.mean(errors):.5f}** is the mean test MSE of the edge-space transformer over three "
        f"seeds (standard deviation {np.std(errors, ddof=1):.5f}), weights chosen by validation; "
        "the best published that we know is 0.0035."
    )
    if floor:
        text += (
            " A model whose prediction turns with its input can reach about "
            f"{floor['any']['test']['mse']:.4f} on this test set at best: see *The floor*."
        )
    return text


def _table_seed() -> list[str]:
    lines = [
        _line("model", "parameters", "test MSE, 240 updates of 500",
              "test MSE, 3,000 updates of 100", "95 % interval", "minutes"),
        _line(*["---"] * 6),
    ]  # fmt: skip
    for model, title in _SEED_ROWS.items():
        short, long = _read(f"seed240-{model}"), _read(f"seed3000-{model}")
        any_ = long or short
        lines.append(
            _line(
                title,
                f"{any_['parameters']:,}" if any_ else "",
                _mse(short),
                _mse(long),
                _interval(long),
                f"{long['train_seconds'] / 60:.1f}" if long else "",
            )
        )
    return lines


def _verdict() -> str:
    """What the double encoder adds, in numbers and with their intervals."""
    rows = {
        model: _read(f"seed3000-{model}")
        for model in ("velocity", "edge_cross", "node_only", "egnn", "e3")
    }
    if not all(rows.values()):
        return "Not all of its rows have been run."
    say = {model: f"{_mse(found)} ({_interval(found)})" for model, found in rows.items()}
    mse = {model: found["test"]["mse"] for model, found in rows.items()}
    return (
        f"At 3,000 updates the double encoder has a test MSE of {say['velocity']}, the same model "
        f"whose edges are only embedded {say['edge_cross']}, and without edges "
        f"{say['node_only']}. Edges change the error by a factor of "
        f"{mse['edge_cross'] / mse['node_only']:.2f}, an encoder of their own between embedding "
        f"and cross-attention by another {mse['velocity'] / mse['edge_cross']:.2f} (one seed "
        "each). Their read-out x + v phi cannot point anywhere but along the velocity; EGNN, "
        f"which can, reaches {say['egnn']}. The edge-space transformer, another "
        "model with a node and an edge encoder, whose edges' outputs weight relative vectors, "
        f"reaches {say['e3']}."
    )


def _table_growth() -> list[str]:
    lines = [
        _line("particles", "model", "test MSE", "free flight", "systems a second, training"),
        _line(*["---"] * 5),
    ]
    for n in _GROWTH:
        for model in ("e3", "egnn"):
            found = _read(f"growth-{model}-{n}")
            title = next(r.title for r in ROWS if r.name == f"growth-{model}-{n}")
            rate = f"{found['systems_per_second']:.0f}" if found else ""
            lines.append(_line(n, title, _mse(found), _mse(found, "mse_of_free_flight"), rate))
    return lines


def _plots() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for row in ROWS:
        found = _read(row.name)
        if found and row.group == "official":
            left.plot(*zip(*found["validation_curve"], strict=True), ".-", label=row.name[9:])
    lines = {"best published": 0.0035, "EGNN published": 0.0071}
    floor = _read("floor")
    if floor:
        lines["floor of equivariant models"] = floor["any"]["validation"]["mse"]
    for text, value in lines.items():
        left.axhline(value, color="grey", linestyle=":")
        left.annotate(text, (0.01, value), xycoords=("axes fraction", "data"), va="bottom")
    left.set(xscale="log", yscale="log", xlabel="step", ylabel="validation MSE",
             title="egnn protocol")  # fmt: skip
    left.legend(fontsize=7)
    for model in ("e3", "egnn"):
        points = [
            (n, found["test"]["mse"] / found["test"]["mse_of_free_flight"])
            for n in _GROWTH
            if (found := _read(f"growth-{model}-{n}"))
        ]
        if points:
            right.plot(*zip(*points, strict=True), "o-", label=model)
    right.set(xscale="log", ylim=(0, None), xlabel="particles", ylabel="test MSE / free flight",
              title="general protocol, 300 steps of training")  # fmt: skip
    right.legend()
    right.set_xticks(_GROWTH, _GROWTH)
    left.set_xticks((500, 1_000, 2_000, 4_000, 8_000), ("500", "1,000", "2,000", "4,000", "8,000"))
    for axis in (left.xaxis, right.xaxis):
        axis.set_minor_locator(ticker.NullLocator())
    figure.savefig(PAGE.with_name("nbody.png"), dpi=120)


def write_page() -> None:
    """docs/results/nbody.md and simulation.png, from the JSON files alone."""
    floor = _read("floor")
    floors = [
        _line("part", "any rotation: MSE", "95 % interval", "systems above 0.01",
              "axes exchanged: MSE", "systems above 0.01"),
        _line(*["---"] * 6),
    ]  # fmt: skip
    for part in ("train", "validation", "test"):
        cells = [""] * 5
        if floor:
            any_, axes = floor["any"][part], floor["axes"][part]
            low, high = any_["interval_95"]
            cells = [f"{any_['mse']:.5f}", f"{low:.5f} to {high:.5f}", any_["above_0.01"],
                     f"{axes['mse']:.5f}", axes["above_0.01"]]  # fmt: skip
        floors.append(_line(part, *cells))
    text = (ROOT / "benchmarks" / "nbody_page.md").read_text()
    for key, lines in {
        "headline": [_headline()],
        "official": _table_official(),
        "trivial_official": _trivial(_read("official-e3-0")),
        "published": [
            _line("published", "test MSE"),
            _line("---", "---"),
            *(_line(name, value) for name, value in _PUBLISHED),
        ],
        "floor": floors,
        "seed": _table_seed(),
        "trivial_blog": _trivial(_read("seed3000-velocity")),
        "verdict": [_verdict()],
        "growth": _table_growth(),
        "commands": ["```"] + [x["command"] for row in ROWS if (x := _read(row.name))] + ["```"],
    }.items():
        text = text.replace("{{" + key + "}}", "\n".join(lines))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
    _plots()
    trajectories = RUNS / "official-e3-0" / "trajectories.png"
    if trajectories.exists():
        shutil.copy(trajectories, PAGE.with_name("nbody_trajectories.png"))


def main(argv) -> None:
    del argv
    known = {row.group for row in ROWS} | {row.name for row in ROWS}
    unknown = [name for name in _ROWS.value if name not in known]
    if unknown:
        sys.exit(f"No rows {unknown}; known: {', '.join(sorted(known))}")
    for row in ROWS:
        if row.group in _ROWS.value or row.name in _ROWS.value:
            train(row)
    if _FLOOR.value:
        measure_floor()
    if _PAGE.value:
        write_page()


if __name__ == "__main__":
    app.run(main)
