"""Ten predictions of a hundred charges, each from the last: errors, energy, momentum, a picture.

    python benchmarks/many.py --rows=rollout        trains the model
    python benchmarks/rollout.py                    benchmarks/results/many/rollout.json, a picture

What is true is simulated on from the same input.
"""

import dataclasses
import pathlib

import numpy as np
from many import STUDY
from study import ROOT

from data_pipelines.nbody import preparation
from data_pipelines.nbody.draws import Start
from data_pipelines.nbody.protocols import get_protocol
from data_pipelines.nbody.simulation import State, simulate
from demetar.inference import runs
from demetar.inference.particles import ParticleModel

PICTURE = ROOT / "docs" / "results" / "many_bodies.png"
PREDICTIONS = 10


def measure_rollout() -> dict:
    """Error, energy and momentum over ten predictions, each from the last, and one system to draw.

    The systems are of the test part; what is true is simulated on from the same input.
    """
    workdir = STUDY.runs / "rollout-100"
    package, _ = runs.package_of_run(workdir)
    model, config = ParticleModel(package), package.config
    task = get_protocol(config.data.protocol, config.data.general)
    systems, _ = preparation.load(task, target_velocity=True)
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
    draw_bodies(PICTURE, true, predicted, start.charge)
    return {
        "command": "python benchmarks/rollout.py",
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


if __name__ == "__main__":
    STUDY.keep("rollout", measure_rollout())
