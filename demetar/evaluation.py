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
from demetar.task import TargetErrors


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Errors of one split.

    Attributes:
      dataset: what was evaluated.
      scale: [T] standard deviations that turn standardised errors into reported units.
      errors: sums and count over the split.
      graphs: [g] positions of the graphs.
      prediction: [g, T] float64, reported units.
    """

    dataset: Dataset
    scale: np.ndarray
    errors: TargetErrors
    graphs: np.ndarray
    prediction: np.ndarray

    @property
    def count(self) -> int:
        return round(float(self.errors.count))

    @property
    def score(self) -> float:
        """Mean over targets of the standardised MAE: what `best` means."""
        return float(np.mean(self.errors.compute()))

    @property
    def mae(self) -> np.ndarray:
        """[T] mean absolute errors, reported units."""
        return self.errors.compute() * self.scale

    def values(self) -> dict[str, float]:
        return {
            f"{t.name}_mae": float(m) for t, m in zip(self.dataset.targets, self.mae, strict=True)
        }

    def text(self) -> str:
        pairs = zip(self.dataset.targets, self.mae, strict=True)
        return ", ".join(f"{t.name} {m:.4g} {t.unit}" for t, m in pairs)


class Evaluator:
    """Evaluates weights on a split: every graph exactly once, on any number of devices."""

    def __init__(self, experiment: Experiment, interruption: Interruption | None = None):
        self._experiment, self._interruption = experiment, interruption
        mesh = experiment.mesh
        everywhere, split = sharding.replicated(mesh), sharding.over_batch(mesh)
        jitted = jax.jit(
            make_eval_step(experiment.model),
            in_shardings=(everywhere, split),
            out_shardings=(everywhere, split),
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
        sums, order, outputs = [], [], []
        for step, (bucket, batch) in enumerate(batches):
            if self._interruption is not None and self._interruption.requested:
                return None
            batch = sharding.to_devices(batch, mesh, batch_size)
            errors, prediction_BxT = self._step(bucket, params, batch)
            sums.append(errors)
            order.append(plan[step][1])
            outputs.append(prediction_BxT)
        order = np.concatenate(order)
        prediction = np.concatenate([_on_host(x) for x in outputs]).astype(np.float64)
        real = order >= 0
        order, prediction = order[real], prediction[real]
        return Outcome(
            dataset,
            self._experiment.normalization.scale,
            functools.reduce(TargetErrors.merge, (jax.tree.map(_float64, s) for s in sums)),
            order,
            self._experiment.normalization.restore(prediction, arrays.sizes.num_nodes[order]),
        )


def _float64(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def _on_host(x: jax.Array) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def result_of(outcome: Outcome, split: str, step: int, identity: dict) -> dict:
    """The part of `result.json` that an evaluation alone can say."""
    passport = identity["passport"]
    part = outcome.dataset.arrays.target[outcome.dataset.split["train"]]
    mean_T = part.mean(axis=0)
    true = outcome.dataset.arrays.target[outcome.graphs]
    return {
        "dataset": passport["dataset"],
        "split": split,
        "split_name": identity["config"]["data"]["split"],
        "step": step,
        "count": outcome.count,
        "targets": {
            t.name: {
                "mae": float(mae),
                "unit": t.unit,
                "mae_of_training_mean": float(np.abs(true[:, k] - mean_T[k]).mean()),
            }
            for k, (t, mae) in enumerate(zip(outcome.dataset.targets, outcome.mae, strict=True))
        },
        "data_passport": passport,
        "config": identity["config"],
    }


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
        report.plot_parity(workdir / "parity.png", outcome)
        report.plot_learning_curves(workdir / "learning_curves.png", workdir, outcome)
        writers.write_json(workdir / "result.json", result)
    print(f"Test MAE {outcome.text()} over {outcome.count} molecules; see {workdir}/result.json")
    return result


def _git_commit() -> str | None:
    """Of the checkout this code runs from; None outside of one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
