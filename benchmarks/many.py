"""The study of many particles: trains every row of docs/results/many.md.

    python benchmarks/many.py --rows=ours           train (or go on with) a group of rows
    python benchmarks/many.py --floor=glad_20       the least error of an equivariant model
    python benchmarks/many.py --cost                time of forward and backward against particles
    python benchmarks/many.py --exact               gravity's own law in the model's steps
    python benchmarks/many.py --before=0c2ec6f      training a hundred, beside an older commit's
    python benchmarks/rollout.py                    ten predictions, each from the last

Groups: ours, egnn, short-far, short-near, short-pairs, short-egnn, rollout; or rows by name,
comma-separated. Every row is one run of `python -m demetar.main`, so it resumes where it stopped;
runs live in runs/many. Numbers go to benchmarks/results/many/*.json; `many_page.py` writes the
page from them alone.

Rows of `egnn` take as many steps of as many systems as the row of `ours`. All short rows take a
quarter of them: what a part of the model does is seen there, and the slow models are done.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import numpy as np
from growth import exponent, median_seconds
from study import ROOT, Row, Study, measure_floor

from data_pipelines.batch_plan import Bucket
from data_pipelines.batching import gather
from data_pipelines.nbody import POSITION, arrays_of, preparation
from data_pipelines.nbody.draws import draw, stack
from data_pipelines.nbody.pairs import edges_of
from data_pipelines.nbody.protocols import PROTOCOLS, general_protocol
from demetar.config.command_line import load_config
from demetar.models import create_model
from demetar.speed.machine import processor

SIZES = (5, 20, 50, 100)
ROLLOUT_STEPS = (50, 100, 200)  # of the simulator, to each horizon of one model
TITLES = {
    "ours": "edge-space transformer",
    "egnn": "EGNN (ours)",
    "short-far": "edge-space transformer, a quarter of the steps",
    "short-near": "the same without the field",
    "short-pairs": "the same with edges of all pairs, without the field",
    "short-egnn": "EGNN (ours), a quarter of the steps",
}
SHORT_STEPS = {"glad_20": 4_000, "glad_50": 8_000, "glad_100": 8_000, "gravity_100": 1_000}


def _row(group: str, protocol: str, seed: int, *flags: str) -> Row:
    variant = protocol + (",egnn" if group.endswith("egnn") else "")
    name = f"{protocol}-{group}-{seed}"
    return Row(group, name, TITLES[group], variant, (*flags, f"--config.seed={seed}"))


def _short(group: str, protocol: str, *flags: str) -> Row:
    steps = SHORT_STEPS[protocol]
    length = (f"--config.train.num_steps={steps}", f"--config.train.eval_every={steps // 20}")
    return _row(group, protocol, 0, *flags, *length)


ROWS = [
    *(
        _row("ours", f"glad_{n}", seed)
        for n in SIZES
        for seed in (range(3) if n in (5, 100) else range(1))
    ),
    _row("ours", "gravity_100", 0),
    *(_row("egnn", f"glad_{n}", 0) for n in SIZES[:2]),
    *(_short("short-far", f"glad_{n}") for n in SIZES[1:]),
    *(_short("short-near", f"glad_{n}", "--config.model.field_kernels=0") for n in SIZES[1:]),
    # At 50 all pairs take four times as long, at 100 ten times: see the table of cost.
    _short("short-pairs", "glad_20", "--config.model.field_kernels=0", "--config.data.neighbors=0"),
    *(_short("short-egnn", protocol) for protocol in SHORT_STEPS),
    # Positions and velocities of a hundred charges after three times, one model.
    Row(
        "rollout",
        "rollout-100",
        "one model of three horizons",
        "general,e3",
        (
            "--config.data.targets=('position', 'velocity')",
            "--config.data.neighbors=8",
            "--config.data.general.num_particles=100",
            f"--config.data.general.horizon_steps={ROLLOUT_STEPS}",
            "--config.model.field_kernels=4",
            "--config.data.batch_size=10",
            "--config.train.num_steps=8_000",
            "--config.train.eval_every=800",
        ),
    ),
]
STUDY = Study(ROWS, ROOT / "runs" / "many", ROOT / "benchmarks" / "results" / "many")

# --- cost ----------------------------------------------------------------------------------------

COST_SIZES = (5, 20, 50, 100, 200)
# Name -> neighbors, options.
COSTS = {
    "nearest 8 and field": (8, {"field_kernels": 4}),
    "nearest 8": (8, {}),
    "all pairs": (0, {}),
}


def batch_of(n: int, size: int, neighbors: int):
    """Systems drawn as those of the study are, before they move."""
    protocol = general_protocol(
        num_particles=n, interaction="charged", horizon_steps=(1,), num_train=size,
        num_validation=1, num_test=1, seed=0,
    )  # fmt: skip
    rng = np.random.RandomState(0)
    start = stack([draw(rng, protocol) for _ in range(size)])
    edges = edges_of(start.position, None, neighbors)
    arrays = arrays_of(
        start.position, start.velocity, start.charge, edges, dtype=np.dtype(np.float32)
    )
    return gather(arrays, np.arange(size), Bucket(n, int(np.diff(edges[0]).max())))


def seconds_of(n: int, neighbors: int, options: dict, seconds: float = 3.0) -> float:
    """Median time of forward and backward of one system, on all cores."""
    size = max(2, 200 // n)
    model = create_model(name="demetar_e3", targets=(POSITION,), facts={"horizon": 1.0}, **options)
    batch = batch_of(n, size, neighbors)
    params = model.init(jax.random.key(0), jax.tree.map(lambda x: x[0], batch))["params"]

    def loss(params, batch):
        predict = lambda graph: model.apply({"params": params}, graph)["position"]
        return (jax.vmap(predict)(batch) ** 2).sum()

    return median_seconds(jax.jit(jax.grad(loss)), params, batch, seconds) / size


def measure_cost() -> dict:
    """Seconds of a system against its particles, and the exponent over the three largest."""
    found = {}
    for name, (neighbors, options) in COSTS.items():
        times = []
        for n in COST_SIZES:
            times.append(seconds_of(n, neighbors, options))
            print(f"{name}: {n} particles, {1e3 * times[-1]:.3f} ms a system", flush=True)
        found[name] = {"seconds_a_system": times, "exponent": exponent(COST_SIZES, times)}
    return {
        "command": "python benchmarks/many.py --cost",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "particles": COST_SIZES,
        "rows": found,
    }


# --- gravity's own law ----------------------------------------------------------------------------


def measure_exact() -> dict:
    """Error of the simulator's own law in as many steps of leapfrog as the model takes."""
    config = load_config("nbody:gravity_100")
    steps = config.model.rounds * config.model.field_steps
    task = PROTOCOLS["gravity_100"]
    systems, _ = preparation.load(task)
    test = preparation.split_of(task)["test"]
    time = task.horizons[-1] / steps

    def ahead(x, v):
        def step(state, _):
            x, v = state
            x = x + time / 2 * v
            apart = x[:, None] - x
            square = (apart**2).sum(axis=-1) + 0.1**2  # softened as the simulator's
            v = v - time * (apart / square[..., None] ** 1.5).sum(axis=1)
            return (x + time / 2 * v, v), None

        return jax.lax.scan(step, (x, v), length=steps)[0][0]

    found = jax.lax.map(
        lambda start: ahead(*start), (systems.position[test], systems.velocity[test]), batch_size=20
    )
    error = np.square(np.asarray(found) - systems.target[test, 0])
    return {
        "command": "python benchmarks/many.py --exact",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "steps": steps,
        "systems": len(test),
        "mse": float(error.mean()),
    }


# --- before and after ----------------------------------------------------------------------------

_HUNDRED = [
    "--config.data.general.num_particles=100",
    "--config.data.general.num_train=200",
    "--config.data.general.num_validation=10",
    "--config.data.general.num_test=10",
    "--config.data.batch_size=10",
    "--config.data.eval_batch_size=10",
    "--config.log.every_steps=1",
    "--config.train.eval_every=1000000",
    "--config.optim.warmup_steps=1",
]
# All pairs then, for there was nothing else; near and far now. Of a hundred systems, the batch of
# that config, the old code takes more than 24 GB.
_OLD = ["--config.data.general.horizon_steps=100", "--config.train.num_steps=6"]
_NEW = [
    "--config.data.general.horizon_steps=(100,)",
    "--config.train.num_steps=60",
    "--config.data.neighbors=8",
    "--config.model.field_kernels=4",
]


def measure_before_and_after(commit: str) -> dict:
    """Systems a second of training a hundred charges on all cores, here and in an older commit."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        old = pathlib.Path(folder) / "old"
        subprocess.run(["git", "worktree", "add", "-q", old, commit], cwd=ROOT, check=True)
        try:
            for name, root, flags in (("after", ROOT, _NEW), ("before", old, _OLD)):
                command = ["-m", "demetar.main", "--config=configs/nbody.py:general,e3"]
                command += [*_HUNDRED, *flags, f"--workdir={folder}/{name}"]
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=True,
                    capture_output=True, text=True,
                )  # fmt: skip
                found = [float(x) for x in re.findall(r"([\d.]+) systems/s,", done.stderr)]
                rates[name] = float(np.median(found[1:]))  # the first waits for the compiler
                print(f"{name}: {rates[name]:g} systems/s", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)
    return {
        "command": f"python benchmarks/many.py --before={commit}",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "before_commit": commit,
        "systems_per_second": rates,
        "ratio": rates["after"] / rates["before"],
    }


def main() -> None:
    parser = STUDY.parser(__doc__)
    choices = [name for name in PROTOCOLS if name.startswith("glad_")]
    parser.add_argument("--floor", choices=choices, help="measure the floor of its systems")
    parser.add_argument("--systems", type=int, default=200, help="of each part, for the floor")
    parser.add_argument("--cost", action="store_true", help="measure the cost of a step")
    parser.add_argument("--exact", action="store_true", help="measure gravity's own law")
    parser.add_argument("--before", metavar="COMMIT", help="beside which training is timed")
    options = parser.parse_args()
    STUDY.train_rows(options.rows, options.cores)
    if options.floor:
        command = f"python benchmarks/many.py --floor={options.floor} --systems={options.systems}"
        floor = measure_floor(options.floor, options.systems)
        STUDY.keep(f"floor-{options.floor}", {"command": command} | floor)
    if options.cost:
        STUDY.keep("cost", measure_cost())
    if options.exact:
        STUDY.keep("exact", measure_exact())
    if options.before:
        STUDY.keep("before", measure_before_and_after(options.before))


if __name__ == "__main__":
    main()
