"""The study of many particles: trains every row of docs/results/many.md.

    python benchmarks/many.py --rows=ours           train (or go on with) a group of rows
    python benchmarks/many.py --floor=glad_20       the least error of an equivariant model
    python benchmarks/many.py --cost                seconds of a training step against particles
    python benchmarks/many.py --rollout             ten predictions, each from the last

Groups: ours, near, egnn, rollout; or rows by name, comma-separated. Every row is one run of
`python -m demetar.main`, so it resumes where it stopped; runs live in runs/many. Numbers go to
benchmarks/results/many/*.json; `many_page.py` writes the page from them alone.

Rows of `near` and `egnn` say what the parts are worth: each trains for the minutes that the row of
`ours` of the same systems took.
"""

import dataclasses
import os
import pathlib
import tempfile

import jax
import numpy as np
from growth import exponent, median_seconds
from study import ROOT, Row, Study, measure_floor

from data_pipelines.batch_plan import Bucket
from data_pipelines.batching import GraphArrays, gather
from data_pipelines.nbody import POSITION, preparation
from data_pipelines.nbody.draws import Start, draw, stack
from data_pipelines.nbody.pairs import edges_of
from data_pipelines.nbody.protocols import PROTOCOLS, general_protocol, get_protocol
from data_pipelines.nbody.simulation import State, simulate
from demetar.inference import runs
from demetar.inference.particles import ParticleModel
from demetar.models import create_model
from demetar.speed.machine import processor

SIZES = (5, 20, 50, 100)
ROLLOUT_STEPS = (50, 100, 200)  # of the simulator, to each horizon of one model
TITLES = {
    "ours": "edge-space transformer",
    "near": "the same without the field",
    "egnn": "EGNN (ours)",
}


def _row(group: str, protocol: str, seed: int, *flags: str) -> Row:
    variant = protocol + (",egnn" if group == "egnn" else "")
    name = f"{protocol}-{group}-{seed}"
    return Row(group, name, TITLES[group], variant, (*flags, f"--config.seed={seed}"))


ROWS = [
    *(
        _row("ours", f"glad_{n}", seed)
        for n in SIZES
        for seed in (range(3) if n in (5, 100) else range(1))
    ),
    _row("ours", "gravity_100", 0),
    *(_row("near", f"glad_{n}", 0, "--config.model.field_kernels=0") for n in SIZES[1:]),
    *(_row("egnn", f"glad_{n}", 0) for n in SIZES),
    _row("egnn", "gravity_100", 0),
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
            "--config.data.batch_size=50",
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
    offset, edges = edges_of(start.position, None, neighbors)
    flat = lambda x: x.reshape(size * n, *x.shape[2:])
    arrays = GraphArrays(
        index=np.arange(1, size + 1, dtype=np.int32),
        node_offset=np.arange(size + 1) * n,
        atomic_number=np.ones(size * n, np.uint8),
        position=flat(start.position),
        edge_offset=offset,
        edges=edges,
        velocity=flat(start.velocity),
        charge=flat(start.charge),
        dtype=np.dtype(np.float32),
    )
    return gather(arrays, np.arange(size), Bucket(n, int(np.diff(offset).max())))


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


# --- predictions from predictions ----------------------------------------------------------------

PREDICTIONS = 10


def measure_rollout() -> dict:
    """Error, energy and momentum over ten predictions, each from the last, and one system to draw.

    The systems are of the test part; what is true is simulated on from the same input.
    """
    workdir = STUDY.runs / "rollout-100"
    with tempfile.TemporaryDirectory() as folder:
        package = runs.save(workdir, pathlib.Path(folder) / "model")
    model, config = ParticleModel(package), package.config
    task = get_protocol(config.data.protocol, config.data.general)
    systems, _ = preparation.load(task)
    test = preparation.split_of(task)["test"][:100]
    start = Start(*(a[test] for a in (systems.position, systems.velocity, systems.charge)))
    steps = task.horizon_steps[-1]
    onward = dataclasses.replace(
        task,
        input_step=1,
        horizon_steps=tuple(steps * k - 1 for k in range(1, PREDICTIONS + 1)),
    )
    true = [State(start.position, start.velocity), *simulate(start, onward)[1:]]
    x, v = model.rollout(
        position=start.position, velocity=start.velocity, charge=start.charge, steps=PREDICTIONS
    )
    predicted = [State(x[:, k], v[:, k]) for k in range(PREDICTIONS + 1)]
    error = [
        np.square(a.position - b.position).mean() for a, b in zip(predicted, true, strict=True)
    ]
    first = true[0]
    drift = lambda states: [
        float(np.median(np.abs(energy_of(s, start.charge) - energy_of(first, start.charge))))
        for s in states
    ]
    moved = [np.abs(s.velocity.mean(axis=1) - first.velocity.mean(axis=1)).max() for s in predicted]
    draw_bodies(PAGE_PICTURE, true, predicted, start.charge)
    return {
        "command": "python benchmarks/many.py --rollout",
        "systems": len(test),
        "time_of_a_prediction": task.horizons[-1],
        "mse": [float(e) for e in error],
        "median_energy": float(np.median(np.abs(energy_of(first, start.charge)))),
        "energy_drift": {"predicted": drift(predicted), "simulated": drift(true)},
        "largest_change_of_mean_velocity": [float(m) for m in moved],
    }


def energy_of(state: State, charge_GxN: np.ndarray) -> np.ndarray:
    """Kinetic energy and that of the charges, of each system `[G]`."""
    i, j = np.triu_indices(charge_GxN.shape[1], 1)
    distance_GxP = np.linalg.norm(state.position[:, i] - state.position[:, j], axis=-1)
    potential_G = (charge_GxN[:, i] * charge_GxN[:, j] / distance_GxP).sum(axis=1)
    return np.square(state.velocity).sum(axis=(1, 2)) / 2 + potential_G


PAGE_PICTURE = ROOT / "docs" / "results" / "many_bodies.png"


def draw_bodies(file: pathlib.Path, true: list[State], predicted: list[State], charge) -> None:
    """The system of median error at the start, halfway and at the end: true and predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    last = np.square(true[-1].position - predicted[-1].position).mean(axis=(1, 2))
    g = int(np.argsort(last)[len(last) // 2])
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    for panel, k in zip(panels, (0, len(true) // 2, len(true) - 1), strict=True):
        for sign, colour in ((1, "tab:red"), (-1, "tab:blue")):
            chosen = charge[g] == sign
            x, y, _ = true[k].position[g, chosen].T
            panel.scatter(x, y, s=30, facecolors="none", edgecolors=colour, label=f"{sign:+}, true")
            x, y, _ = predicted[k].position[g, chosen].T
            panel.scatter(x, y, s=12, marker="x", color=colour, label=f"{sign:+}, predicted")
        panel.set(title=f"after {k} predictions", xlabel="x", aspect="equal")
    panels[0].set(ylabel="y")
    panels[-1].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = STUDY.parser(__doc__)
    choices = [name for name in PROTOCOLS if name.startswith("glad_")]
    parser.add_argument("--floor", choices=choices, help="measure the floor of its systems")
    parser.add_argument("--systems", type=int, default=200, help="of each part, for the floor")
    parser.add_argument("--cost", action="store_true", help="measure the cost of a step")
    parser.add_argument("--rollout", action="store_true", help="predict from predictions")
    options = parser.parse_args()
    STUDY.train_rows(options.rows, options.cores)
    if options.floor:
        command = f"python benchmarks/many.py --floor={options.floor} --systems={options.systems}"
        floor = measure_floor(options.floor, options.systems)
        STUDY.keep(f"floor-{options.floor}", {"command": command} | floor)
    if options.cost:
        STUDY.keep("cost", measure_cost())
    if options.rollout:
        STUDY.keep("rollout", measure_rollout())


if __name__ == "__main__":
    main()
