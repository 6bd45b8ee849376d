"""Pictures of a run: predicted against true values, and learning curves."""

import json
import pathlib

import numpy as np


def read_json(file: pathlib.Path):
    return json.loads(file.read_text())


def _figure(columns: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, columns, figsize=(5.2 * columns, 4.6), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def plot_parity(file: pathlib.Path, outcome) -> None:
    """Predicted against true value of every molecule of a split, a panel per target."""
    targets = outcome.dataset.targets
    figure, axes = _figure(len(targets))
    true_gxT = outcome.dataset.arrays.target[outcome.graphs]
    for k, (target, axis) in enumerate(zip(targets, axes, strict=True)):
        true, predicted = true_gxT[:, k], outcome.prediction[:, k]
        axis.hexbin(true, predicted, gridsize=80, bins="log", cmap="viridis", mincnt=1)
        ends = np.array([true.min(), true.max()])
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set_xlabel(f"true {target.symbol} [{target.unit}]")
        axis.set_ylabel(f"predicted {target.symbol} [{target.unit}]")
        axis.set_title(f"MAE {outcome.mae[k]:.4g} {target.unit}, {outcome.count} molecules")
    figure.savefig(file, dpi=130)


def plot_learning_curves(file: pathlib.Path, workdir: pathlib.Path, outcome) -> None:
    """Training and validation MAE against the step, a panel per target."""
    from demetar.writers import read_metrics

    lines = read_metrics(workdir / "metrics.jsonl")
    targets = outcome.dataset.targets
    figure, axes = _figure(len(targets))
    for k, (target, axis) in enumerate(zip(targets, axes, strict=True)):
        for split, style in (("train", "-"), ("validation", "o-")):
            points = [(x["step"], x[f"{target.name}_mae"]) for x in lines if x["split"] == split]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=split, markersize=3, linewidth=1)
        axis.axhline(outcome.mae[k], color="grey", linestyle=":", label="test, best weights")
        axis.set_xlabel("step")
        axis.set_ylabel(f"MAE of {target.symbol} [{target.unit}]")
        axis.set_yscale("log")
        axis.legend()
    figure.savefig(file, dpi=130)
