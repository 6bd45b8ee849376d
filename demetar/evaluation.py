"""Evaluation, exact over padding: every graph of a split once, and what a result says."""

import dataclasses
import functools
import pathlib
import subprocess

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines import pipeline
from data_pipelines.dataset import Dataset
from data_pipelines.plan import BatchPlan
from demetar import report, sharding, writers
from demetar.experiment import Experiment
from demetar.graph import Array
from demetar.interrupt import Interruption
from demetar.state import params_sha256
from demetar.step import CompiledPerBucket, make_eval_step
from demetar.task import TargetErrors, error_scale, trivial_errors


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Errors of one split.

    Attributes:
      dataset: what was evaluated.
      scale: [T] from standardised to reported errors.
      errors: sums and count over the split.
      graphs: [g] positions of the graphs.
      graph_errors: [g, T] float64, reported units.
      prediction: reported units, float64: [g, T], or [nodes, 3] of the graphs in their order.
    """

    dataset: Dataset
    scale: np.ndarray
    errors: TargetErrors
    graphs: np.ndarray
    graph_errors: np.ndarray
    prediction: np.ndarray

    @property
    def count(self) -> int:
        return round(float(self.errors.count))

    @property
    def score(self) -> float:
        """Mean over targets of the standardised error: what `best` means."""
        return float(np.mean(self.errors.compute()))

    @property
    def error(self) -> np.ndarray:
        """[T] of the data set's metric, reported units."""
        return self.errors.compute() * self.scale

    def values(self) -> dict[str, float]:
        return {
            f"{t.name}_{t.metric}": float(e)
            for t, e in zip(self.dataset.targets, self.error, strict=True)
        }

    def text(self) -> str:
        return error_text(self.dataset, self.error)


def error_text(dataset: Dataset, error_T) -> str:
    """`MAE homo 103.8 meV, lumo ...`, for a person."""
    pairs = zip(dataset.targets, error_T, strict=True)
    power = "^2" if dataset.metric == "mse" else ""
    values = ", ".join(f"{t.name} {e:.4g} {t.unit}{power}" for t, e in pairs)
    return f"{dataset.metric.upper()} {values}"


class Evaluator:
    """Evaluates weights on a split: every graph exactly once, on any number of devices."""

    def __init__(self, experiment: Experiment, interruption: Interruption | None = None):
        self._experiment, self._interruption = experiment, interruption
        mesh = experiment.mesh
        everywhere, split = sharding.replicated(mesh), sharding.over_batch(mesh)
        jitted = jax.jit(
            make_eval_step(experiment.model, experiment.dataset.metric),
            in_shardings=(everywhere, split),
            out_shardings=(everywhere, split, split),
        )
        self._step = CompiledPerBucket(jitted, len(experiment.dataset.buckets))

    def run(self, params, split: str) -> Outcome | None:
        """Errors and predictions of `split`; None if a signal cut it short."""
        dataset, arrays, mesh = (
            self._experiment.dataset,
            self._experiment.arrays,
            self._experiment.mesh,
        )
        batch_size = self._experiment.config.data.eval_batch_size
        plan = BatchPlan(arrays.sizes, dataset.split[split], dataset.buckets, batch_size, seed=None)
        rows = sharding.process_rows(mesh, batch_size)
        batches = pipeline.batches(arrays, plan, rows, range(plan.steps_per_epoch))
        sums, order, outputs = [], [], []  # fetched after the loop: it never waits for a device
        for step, (bucket, batch) in enumerate(batches):
            if self._interruption is not None and self._interruption.requested:
                return None
            batch = sharding.to_devices(batch, mesh, batch_size)
            errors, error_BxT, prediction = self._step(bucket, params, batch)
            sums.append(errors)
            order.append(plan[step][1])
            # Which of the predicted rows are real: of nodes, or of graphs.
            mask = batch.node_mask if arrays.target_per_node else batch.graph_mask
            outputs.append((error_BxT, batch.graph_mask, prediction, mask))
        order = np.concatenate(order)
        order = order[order >= 0]
        graph_errors, predictions = [], []
        for error_BxT, graph_mask_B, prediction, mask in outputs:
            graph_errors.append(_float64(_on_host(error_BxT))[_on_host(graph_mask_B)])
            predictions.append(_float64(_on_host(prediction))[_on_host(mask)])
        prediction = np.concatenate(predictions)
        normalization = self._experiment.normalization
        scale = error_scale(normalization, dataset.metric)
        if not arrays.target_per_node:
            prediction = normalization.restore(prediction, arrays.sizes.num_nodes[order])
        return Outcome(
            dataset,
            scale,
            functools.reduce(TargetErrors.merge, (jax.tree.map(_float64, s) for s in sums)),
            order,
            np.concatenate(graph_errors) * scale,
            prediction,
        )


def _float64(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def _on_host(x: jax.Array) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def result_of(outcome: Outcome, split: str, step: int, identity: dict) -> dict:
    """The part of `result.json` that an evaluation alone can say."""
    passport, dataset = identity["passport"], outcome.dataset
    metric = dataset.metric
    trivial = trivial_errors(dataset, outcome.graphs)
    targets = {}
    for k, (target, error) in enumerate(zip(dataset.targets, outcome.error, strict=True)):
        row = {metric: float(error), "unit": target.unit}
        row |= {f"{metric}_of_{name}": float(error_T[k]) for name, error_T in trivial.items()}
        if metric == "mse":  # a few close encounters make most of a mean: say so
            error_g = outcome.graph_errors[:, k]
            row |= {"median": float(np.median(error_g)), "interval_95": interval_95(error_g)}
        targets[target.name] = row
    return {
        "dataset": passport["dataset"],
        "split": split,
        "split_name": dataset.split_name,
        "step": step,
        "count": outcome.count,
        "targets": targets,
        "data_passport": passport,
        "config": identity["config"],
    }


def interval_95(error_g: np.ndarray) -> list[float]:
    """Bootstrap interval of the mean over graphs: percentiles of 2,000 resamples."""
    rng = np.random.default_rng(0)
    means = [rng.choice(error_g, len(error_g)).mean() for _ in range(2_000)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def save_result(
    workdir: pathlib.Path, evaluator: Evaluator, *, ema, step, final_params, identity, progress
) -> dict:
    """Evaluates the best weights once on test; writes `result.json` and the plots."""
    outcome = evaluator.run(ema, "test")
    if outcome is None:
        return {}
    result = result_of(outcome, "test", step, identity) | {
        "validation_score": progress["best_score"],
        "train_seconds": progress["train_seconds"],
        "seed": identity["config"]["seed"],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git_commit": _git_commit(),
        "params_sha256": params_sha256(jax.device_get(final_params)),
    }
    if jax.process_index() == 0:
        if outcome.dataset.arrays.target_per_node:
            report.plot_trajectories(workdir / "trajectories.png", outcome)
        else:
            report.plot_parity(workdir / "parity.png", outcome)
        report.plot_learning_curves(workdir / "learning_curves.png", workdir, outcome)
        writers.write_json(workdir / "result.json", result)
    items = outcome.dataset.items
    print(f"Test {outcome.text()} over {outcome.count} {items}; see {workdir}/result.json")
    return result


def _git_commit() -> str | None:
    """Of the checkout this code runs from; None outside of one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
