"""Evaluation, exact over padding: every graph of a part once, on any number of devices."""

import dataclasses
import functools
import math

import jax
import numpy as np

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan
from data_pipelines.dataset import Dataset
from data_pipelines.graph import Array
from data_pipelines.targets import Target
from demetar.exits import NonFiniteLoss
from demetar.job.job import Job
from demetar.training import sharding
from demetar.training.experiment import Experiment
from demetar.training.measures import MEASURES, value_text
from demetar.training.objective import Normalization, TargetErrors
from demetar.training.step import CompiledPerBucket, make_eval_step


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Errors and predictions of one part of a data set.

    Attributes:
      dataset: what was evaluated.
      targets: T of them, each with the metric that is reported.
      errors: sums and counts over the part, standardised.
      graphs: [g] positions of the graphs.
      graph_errors: [g, T] float64, of each graph the measure before `finish`, in reported units;
        NaN where it has no label.
      predictions: name of a target -> reported units, float64: [g], or [nodes] or [nodes, 3] of
        the graphs in their order.
      normalizations: name of a target -> between standardised and reported units.
    """

    dataset: Dataset
    targets: tuple[Target, ...]
    errors: TargetErrors
    graphs: np.ndarray
    graph_errors: np.ndarray
    predictions: dict[str, np.ndarray]
    normalizations: dict[str, Normalization]

    @property
    def count(self) -> int:
        return len(self.graphs)

    @property
    def score(self) -> float:
        """Mean over targets of the standardised error: what `best` means."""
        return float(np.mean(self.errors.compute()))

    def labels(self, target: Target) -> np.ndarray:
        """In reported units, in the order of `predictions`."""
        return self.dataset.labels_of(target, self.graphs)

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """Name of a target -> value of its metric, reported units."""
        return reported_metrics(
            self.errors.compute(), self.dataset, self.targets, self.normalizations, self.graphs
        )

    def values(self) -> dict[str, float]:
        """As a line of `metrics.jsonl` names them: `homo_mae`."""
        return {f"{t.name}_{t.metric}": self.metrics[t.name] for t in self.targets}

    def text(self) -> str:
        return metrics_text(self.targets, self.metrics)


def reported_metrics(
    mean_T: np.ndarray,
    dataset: Dataset,
    targets: tuple[Target, ...],
    normalizations: dict[str, Normalization],
    graphs: np.ndarray,
) -> dict[str, float]:
    """Means of standardised measures over `graphs` -> values in reported units."""
    found = {}
    for target, mean in zip(targets, mean_T, strict=True):
        measure = MEASURES[target.metric]
        mean = mean * normalizations[target.name].scale ** measure.power
        # Of many labels it takes a while, and progress lines ask again and again.
        variance = label_variance(dataset, target, graphs) if measure.of_variance else math.nan
        found[target.name] = float(measure.finish(mean, variance))
    return found


def label_variance(dataset: Dataset, target: Target, graphs: np.ndarray) -> float:
    """Of the labels of some graphs, reported units squared."""
    return float(np.nanvar(dataset.labels_of(target, graphs)))


def metrics_text(targets: tuple[Target, ...], values: dict[str, float]) -> str:
    """`MAE homo 103.8 meV, lumo ...`, for a person."""
    words, last = [], None
    for target in targets:
        name = "" if target.metric == last else f"{target.metric.upper()} "
        words.append(name + value_text(target, values[target.name]))
        last = target.metric
    return ", ".join(words)


class Evaluator:
    """Evaluates weights on a part of the data: every graph exactly once, on any mesh.

    Args:
      experiment: what the weights are for.
      job: that may be asked to stop meanwhile; None where nobody asks.
    """

    def __init__(self, experiment: Experiment, job: Job | None = None):
        self._experiment, self._job = experiment, job or Job.alone()
        self._compiled = _compiled_eval_step(experiment, self._job.watch)

    def compile_ahead(self, executor) -> None:
        """See `CompiledPerBucket`."""
        self._compiled.compile_ahead(executor)

    def program(self, bucket: int):
        """The compiled step of a bucket."""
        return self._compiled.program(bucket)

    def step(self, params, bucket: int, batch, stop: bool = False):
        """`((errors, stop), errors [B, T], predictions)` of a placed batch."""
        return self._compiled(
            bucket, params, batch, sharding.stop_flags(self._experiment.mesh, stop)
        )

    def run(self, params, part: str) -> Outcome | None:
        """Errors and predictions of `part`; None if a signal cut it short, on all processes.

        Raises:
          NonFiniteLoss: a prediction is not finite; names its graphs.
        """
        experiment = self._experiment
        dataset, arrays, mesh = experiment.dataset, experiment.arrays, experiment.mesh
        data = experiment.config.data
        batch_size = data.eval_batch_size
        plan = BatchPlan(arrays.sizes, dataset.split[part], dataset.buckets, batch_size, seed=None)
        rows = sharding.process_rows(mesh, batch_size)
        steps = range(plan.steps_per_epoch)
        ahead = data.prefetch_threads, data.prefetch_batches
        batches = batching.batches(arrays, plan, rows, steps, *ahead)
        outputs = []  # fetched after the loop: it never waits for a device that has work to do
        for number, (bucket, batch) in enumerate(batches):
            self._job.watch.phase(f"evaluation of {part}, batch {number}")
            if len(outputs) > 2 and outputs[-3][0][1] > 0:  # computed by now: two are under way
                return None
            batch = sharding.to_devices(batch, mesh, batch_size)
            asked = bool(self._job.interruption.requested)
            outputs.append(self.step(params, bucket, batch, asked))
        return self._outcome(plan, outputs, part)

    def _outcome(self, plan: BatchPlan, outputs: list, part: str) -> Outcome:
        """Joins what the batches gave, in float64 and reported units."""
        experiment = self._experiment
        targets, normalizations = experiment.objective.targets, experiment.normalizations
        num_nodes_G = experiment.arrays.sizes.num_nodes
        order, graph_errors = [], []
        predictions = {target.name: [] for target in targets}
        for number, (_, error_BxT, of_batch) in enumerate(outputs):
            graphs_B = plan[number][1]
            real_B = graphs_B >= 0
            graphs = graphs_B[real_B]
            order.append(graphs)
            graph_errors.append(_float64(error_BxT)[real_B])
            for target in targets:
                prediction = _float64(of_batch[target.name])[real_B]
                if target.per_node:  # [g, N, ...]: without padding
                    nodes = np.arange(prediction.shape[1]) < num_nodes_G[graphs][:, None]
                    prediction = prediction[nodes]
                predictions[target.name].append(prediction)
        order = np.concatenate(order)
        sums = [jax.tree.map(_float64, errors) for (errors, _), *_ in outputs]
        scale_T = np.array(
            [normalizations[t.name].scale ** MEASURES[t.metric].power for t in targets]
        )
        restored = {}
        for target in targets:
            n = 0 if target.per_node else num_nodes_G[order]
            prediction = np.concatenate(predictions[target.name])
            restored[target.name] = normalizations[target.name].restore(prediction, n)
        outcome = Outcome(
            dataset=experiment.dataset,
            targets=targets,
            errors=functools.reduce(TargetErrors.merge, sums),
            graphs=order,
            graph_errors=np.concatenate(graph_errors) * scale_T,
            predictions=restored,
            normalizations=normalizations,
        )
        labelled_gxT = np.stack([_labelled(outcome, target) for target in targets], axis=1)
        outcome.graph_errors[~labelled_gxT] = 0  # may be anything, and is none
        _check_finite(outcome, part)
        outcome.graph_errors[~labelled_gxT] = np.nan
        return outcome


def _check_finite(outcome: Outcome, part: str) -> None:
    bad_g = ~np.isfinite(outcome.graph_errors).all(axis=1)
    if bad_g.any():
        dataset, count = outcome.dataset, int(bad_g.sum())
        named = ", ".join(map(str, dataset.arrays.index[outcome.graphs[bad_g][:16]]))
        raise NonFiniteLoss(
            f"Evaluation of {part}: predictions of {count} of {outcome.count} {dataset.items} are "
            f"not finite: {named}{' ...' if count > 16 else ''}. Look at these "
            f"{dataset.items}; in training, lower config.optim.learning_rate."
        )


def _labelled(outcome: Outcome, target: Target) -> np.ndarray:
    """[g] whether a graph has a label, or one of its nodes."""
    known = ~np.isnan(outcome.labels(target))
    if not target.per_node:
        return known
    known = known.reshape(len(known), -1).all(axis=1)
    ends = np.cumsum(outcome.dataset.arrays.sizes.num_nodes[outcome.graphs])
    return np.logical_or.reduceat(known, np.concatenate([[0], ends[:-1]]))


def _compiled_eval_step(experiment: Experiment, watch) -> CompiledPerBucket:
    mesh, specs = experiment.mesh, experiment.state_specs.params
    jitted = jax.jit(
        make_eval_step(experiment.model, mesh, specs, experiment.objective),
        in_shardings=(
            sharding.named(mesh, specs),
            sharding.over_batch(mesh),
            sharding.over_all(mesh),
        ),
        out_shardings=sharding.replicated(mesh),
    )
    buckets = experiment.dataset.buckets

    def arguments(bucket: int) -> tuple:
        batch = experiment.abstract_batch(buckets[bucket], experiment.config.data.eval_batch_size)
        return experiment.abstract_state().ema, batch, sharding.abstract_stop_flags(mesh)

    return CompiledPerBucket(jitted, len(buckets), arguments, watch)


def _float64(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64)
