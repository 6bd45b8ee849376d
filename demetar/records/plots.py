"""Pictures of a run: predicted against true values, trajectories, learning curves.

An `outcome` is that of an evaluation, see `demetar.training.evaluator.Outcome`.
"""

import pathlib

import numpy as np

from demetar.records.files import read_jsonl


def plot_outcome(workdir: pathlib.Path, outcome) -> None:
    """All pictures of a finished run, each kind of target with what suits it."""
    numbers = [target for target in outcome.targets if target.readout != "position"]
    if numbers:
        plot_parity(workdir / "parity.png", outcome, numbers)
    for target in outcome.targets:
        if target.readout == "position":
            plot_trajectories(workdir / "trajectories.png", outcome, target)
    plot_learning_curves(workdir / "learning_curves.png", workdir, outcome)


def _figure(columns: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, columns, figsize=(5.2 * columns, 4.6), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def plot_parity(file: pathlib.Path, outcome, targets) -> None:
    """Predicted against true value of every label, a panel per target."""
    figure, axes = _figure(len(targets))
    for target, axis in zip(targets, axes, strict=True):
        true, predicted = (
            np.ravel(outcome.labels(target)),
            np.ravel(outcome.predictions[target.name]),
        )
        known = ~np.isnan(true)
        true, predicted = true[known], predicted[known]
        axis.hexbin(true, predicted, gridsize=80, bins="log", cmap="viridis", mincnt=1)
        ends = np.array([true.min(), true.max()])
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set_xlabel(f"true {target.symbol or target.name} [{target.unit}]")
        axis.set_ylabel(f"predicted {target.symbol or target.name} [{target.unit}]")
        value = f"{target.metric.upper()} {outcome.metrics[target.name]:.4g}"
        axis.set_title(f"{value}, {outcome.count} {outcome.dataset.items}")
    figure.savefig(file, dpi=130)


def plot_trajectories(file: pathlib.Path, outcome, target) -> None:
    """Input, true and predicted positions of four graphs, from the median error to the worst."""
    arrays = outcome.dataset.arrays
    error_g = outcome.graph_errors[:, outcome.targets.index(target)]
    ranked = np.argsort(error_g)[: np.count_nonzero(~np.isnan(error_g))]
    ends = np.cumsum(arrays.sizes.num_nodes[outcome.graphs])
    labels, predictions = outcome.labels(target), outcome.predictions[target.name]
    figure, axes = _figure(4)
    for quantile, axis in zip((0.5, 0.9, 0.99, 1.0), axes, strict=True):
        place = ranked[min(len(ranked) - 1, int(quantile * len(ranked)))]
        graph = outcome.graphs[place]
        start = arrays.position[arrays.node_offset[graph] : arrays.node_offset[graph + 1]]
        rows = slice(ends[place] - len(start), ends[place])
        true, predicted = labels[rows], predictions[rows]
        for a, b in zip(start, true, strict=True):
            axis.plot(*zip(a[:2], b[:2], strict=True), color="lightgrey", linewidth=1, zorder=0)
        axis.scatter(*start[:, :2].T, s=16, color="grey", label="input")
        axis.scatter(*true[:, :2].T, s=70, facecolors="none", edgecolors="black", label="true")
        axis.scatter(*predicted[:, :2].T, s=22, color="tab:red", marker="x", label="predicted")
        axis.set_title(f"{quantile:.0%} quantile: {target.metric.upper()} {error_g[place]:.2g}")
        axis.set_xlabel("x")
        axis.set_ylabel("y")
        axis.set_aspect("equal", "datalim")
    axes[0].legend()
    figure.savefig(file, dpi=130)


def plot_learning_curves(file: pathlib.Path, workdir: pathlib.Path, outcome) -> None:
    """Training and validation error against the step, a panel per target."""
    lines = read_jsonl(workdir / "metrics.jsonl")
    targets = outcome.targets
    figure, axes = _figure(len(targets))
    for target, axis in zip(targets, axes, strict=True):
        for split, style in (("train", "-"), ("validation", "o-")):
            key = f"{target.name}_{target.metric}"
            points = [(x["step"], x[key]) for x in lines if x["split"] == split]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=split, markersize=3, linewidth=1)
        value = outcome.metrics[target.name]
        axis.axhline(value, color="grey", linestyle=":", label="test, best weights")
        axis.set_xlabel("step")
        axis.set_ylabel(f"{target.metric.upper()} of {target.symbol or target.name}")
        axis.set_yscale("log")
        axis.legend()
    figure.savefig(file, dpi=130)
