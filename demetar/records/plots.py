"""Pictures of a run: predicted against true values, and learning curves."""

import pathlib

import numpy as np


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
        axis.set_title(f"MAE {outcome.error[k]:.4g} {target.unit}, {outcome.count} molecules")
    figure.savefig(file, dpi=130)


def plot_trajectories(file: pathlib.Path, outcome) -> None:
    """Input, true and predicted positions of four systems, from the median error to the worst."""
    arrays = outcome.dataset.arrays
    error_g = outcome.graph_errors[:, 0]
    ranked = np.argsort(error_g)
    ends = np.cumsum(arrays.sizes.num_nodes[outcome.graphs])
    figure, axes = _figure(4)
    for quantile, axis in zip((0.5, 0.9, 0.99, 1.0), axes, strict=True):
        place = ranked[min(len(ranked) - 1, int(quantile * len(ranked)))]
        graph = outcome.graphs[place]
        node = slice(arrays.node_offset[graph], arrays.node_offset[graph + 1])
        start, true = arrays.position[node], arrays.target[node]
        predicted = outcome.prediction[ends[place] - len(start) : ends[place]]
        for a, b in zip(start, true, strict=True):
            axis.plot(*zip(a[:2], b[:2], strict=True), color="lightgrey", linewidth=1, zorder=0)
        axis.scatter(*start[:, :2].T, s=16, color="grey", label="input")
        axis.scatter(*true[:, :2].T, s=70, facecolors="none", edgecolors="black", label="true")
        axis.scatter(*predicted[:, :2].T, s=22, color="tab:red", marker="x", label="predicted")
        axis.set_title(f"{quantile:.0%} quantile: MSE {error_g[place]:.2g}")
        axis.set_xlabel("x")
        axis.set_ylabel("y")
        axis.set_aspect("equal", "datalim")
    axes[0].legend()
    figure.savefig(file, dpi=130)


def plot_learning_curves(file: pathlib.Path, workdir: pathlib.Path, outcome) -> None:
    """Training and validation error against the step, a panel per target."""
    from demetar.records.files import read_jsonl

    lines = read_jsonl(workdir / "metrics.jsonl")
    targets = outcome.dataset.targets
    figure, axes = _figure(len(targets))
    for k, (target, axis) in enumerate(zip(targets, axes, strict=True)):
        for split, style in (("train", "-"), ("validation", "o-")):
            key = f"{target.name}_{target.metric}"
            points = [(x["step"], x[key]) for x in lines if x["split"] == split]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=split, markersize=3, linewidth=1)
        axis.axhline(outcome.error[k], color="grey", linestyle=":", label="test, best weights")
        axis.set_xlabel("step")
        power = "²" if target.metric == "mse" else ""
        axis.set_ylabel(f"{target.metric.upper()} of {target.symbol} [{target.unit}{power}]")
        axis.set_yscale("log")
        axis.legend()
    figure.savefig(file, dpi=130)
