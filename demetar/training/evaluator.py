"""Evaluation, exact over padding: every graph of a split once, and what a result says."""

import dataclasses
import functools
import pathlib
import subprocess

import jax
import numpy as np

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan
from data_pipelines.dataset import Dataset
from data_pipelines.graph import Array
from demetar.job.job import Job
from demetar.job.watch import Watch
from demetar.records import files, plots
from demetar.training import sharding
from demetar.training.experiment import Experiment
from demetar.training.objective import TargetErrors, error_scale, trivial_errors
from demetar.training.state import TrainState, params_sha256, state_sha256
from demetar.training.step import CompiledPerBucket, make_eval_step


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


def compiled_eval_step(experiment: Experiment, watch: Watch | None = None) -> CompiledPerBucket:
    """The evaluation step, compiled once per bucket."""
    mesh, specs = experiment.mesh, experiment.state_specs.params
    everywhere, split = sharding.replicated(mesh), sharding.over_batch(mesh)
    jitted = jax.jit(
        make_eval_step(experiment.model, mesh, specs, experiment.dataset.metric),
        in_shardings=(sharding.named(mesh, specs), split, sharding.over_all(mesh)),
        out_shardings=everywhere,
    )
    buckets = experiment.dataset.buckets

    def arguments(bucket: int) -> tuple:
        batch = experiment.abstract_batch(buckets[bucket], experiment.config.data.eval_batch_size)
        return experiment.abstract_state().ema, batch, sharding.abstract_flags(mesh)

    return CompiledPerBucket(jitted, len(buckets), watch, arguments)


class Evaluator:
    """Evaluates weights on a split: every graph exactly once, on any number of devices.

    Args:
      experiment: what the weights are for.
      job: that may be asked to stop meanwhile; None where nobody asks.
    """

    def __init__(self, experiment: Experiment, job: Job | None = None):
        self._experiment, self._job = experiment, job
        self._step = compiled_eval_step(experiment, None if job is None else job.watch)

    def compile_ahead(self, executor) -> None:
        """See `CompiledPerBucket`."""
        self._step.compile_ahead(executor)

    def run(self, params, split: str) -> Outcome | None:
        """Errors and predictions of `split`; None if a signal cut it short, on all processes."""
        dataset, arrays, mesh = (
            self._experiment.dataset,
            self._experiment.arrays,
            self._experiment.mesh,
        )
        batch_size = self._experiment.config.data.eval_batch_size
        plan = BatchPlan(arrays.sizes, dataset.split[split], dataset.buckets, batch_size, seed=None)
        rows = sharding.process_rows(mesh, batch_size)
        batches = batching.batches(arrays, plan, rows, range(plan.steps_per_epoch))
        outputs = []  # fetched after the loop: it never waits for a device that has work to do
        for step, (bucket, batch) in enumerate(batches):
            if self._job is not None:
                self._job.watch.phase(f"evaluation of {split}, batch {step}")
            if len(outputs) > 2 and outputs[-3][0][1] > 0:  # computed by now: two are under way
                return None
            batch = sharding.to_devices(batch, mesh, batch_size)
            asked = self._job is not None and bool(self._job.interruption.requested)
            outputs.append(self._step(bucket, params, batch, sharding.flags(mesh, asked)))
        graph_errors, predictions, order = [], [], []
        for step, (_, error_BxT, prediction) in enumerate(outputs):
            bucket, graphs_B = plan[step]
            real_B = graphs_B >= 0
            graphs = graphs_B[real_B]
            order.append(graphs)
            graph_errors.append(_float64(error_BxT)[real_B])
            # Rows are graphs or, where each node has its own target, graphs x nodes.
            prediction = _float64(prediction)[real_B]
            if arrays.target_per_node:
                nodes = arrays.sizes.num_nodes[graphs][:, None]
                prediction = prediction[np.arange(prediction.shape[1]) < nodes]
            predictions.append(prediction)
        order = np.concatenate(order)
        sums = [errors for (errors, _), *_ in outputs]
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
    workdir: pathlib.Path,
    evaluator: Evaluator,
    *,
    ema,
    step: int,
    state: TrainState,
    identity: dict,
    progress: dict,
) -> dict:
    """Evaluates the best weights once on test; writes `result.json` and the plots.

    Args:
      ema: the best weights.
      step: of them.
      state: the last one, for its hashes.
      identity: config and passport.
      progress: of the run.
    """
    outcome = evaluator.run(ema, "test")
    if outcome is None:
        return {}
    state = sharding.to_host(state)
    result = result_of(outcome, "test", step, identity) | {
        "validation_score": progress["best_score"],
        "train_seconds": progress["train_seconds"],
        "seed": identity["config"]["seed"],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "git_commit": _git_commit(),
        "params_sha256": params_sha256(state.params),
        "state_sha256": state_sha256(state, progress),
    }
    if jax.process_index() == 0:
        if outcome.dataset.arrays.target_per_node:
            plots.plot_trajectories(workdir / "trajectories.png", outcome)
        else:
            plots.plot_parity(workdir / "parity.png", outcome)
        plots.plot_learning_curves(workdir / "learning_curves.png", workdir, outcome)
        files.write_json(workdir / "result.json", result)
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
