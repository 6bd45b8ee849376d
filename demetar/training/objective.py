"""What a model is trained for: normalised labels, a weighted sum of losses, errors.

A model predicts standardised targets. The statistics come from the training labels alone:

    intensive:  y = mean + std * z
    extensive:  y = mean_per_node * n + std * z     (n nodes; least squares over training)

where y is in reported units. `Target.normalization` says where neither or only a scale is used. A
missing label weighs nothing: not in the statistics, not in the loss, not in the errors.
"""

import dataclasses

import flax.struct
import jax.numpy as jnp
import numpy as np
from clu import metrics

from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import Dataset
from data_pipelines.errors import UserError, suggest
from data_pipelines.graph import Array, Graph, has_label
from data_pipelines.targets import Target
from demetar.training.measures import MEASURES, check_measure


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Between the labels of one target, in reported units, and what a model predicts; float64."""

    offset: float = 0.0
    slope: float = 0.0  # per node of the graph
    scale: float = 1.0

    @classmethod
    def fit(cls, target: Target, label: np.ndarray, num_nodes: np.ndarray) -> "Normalization":
        """Statistics of training labels.

        Args:
          target: how it is normalised.
          label: [g], or [nodes] or [nodes, 3]; NaN is left out.
          num_nodes: [g] of each graph; looked at for extensive targets.
        """
        if target.normalization == "none":
            return cls()
        known = ~np.isnan(label)
        y = label[known][:, None]
        if target.normalization == "scale":
            return cls(scale=_scale_of(y, y))
        if target.extensive and not target.per_node:
            n = num_nodes[known].astype(np.float64)
            slope = float((n @ y / (n @ n))[0])
            residual = y - n[:, None] * slope
            return cls(slope=slope, scale=_scale_of(residual, y))
        offset = float(y.mean(axis=0)[0])
        return cls(offset=offset, scale=_scale_of(y - offset, y))

    def standardize(self, label: np.ndarray, num_nodes) -> np.ndarray:
        """Reported units -> what the model predicts, float64, before any cast."""
        return (label - self.offset - num_nodes * self.slope) / self.scale

    def restore(self, standardized: np.ndarray, num_nodes) -> np.ndarray:
        """The inverse of `standardize`."""
        return standardized * self.scale + self.offset + num_nodes * self.slope


def _scale_of(residual: np.ndarray, label: np.ndarray) -> float:
    """Root mean square; 1 of labels that are all alike, where only rounding is left."""
    scale = float(np.sqrt((residual**2).mean()))
    return scale if scale > 1e-12 * np.abs(label).max() else 1.0


def standardize(dataset: Dataset, dtype) -> tuple[GraphArrays, dict[str, Normalization]]:
    """The data set's graphs with standardised labels in `dtype`, and how each was normalised."""
    train, arrays = dataset.split["train"], dataset.arrays
    num_nodes_G = arrays.sizes.num_nodes
    normalizations, graph_labels, node_labels = {}, {}, {}
    for target in dataset.targets:
        normalization = Normalization.fit(
            target, dataset.labels_of(target, train), num_nodes_G[train]
        )
        normalizations[target.name] = normalization
        label = dataset.labels(target)
        own = node_labels if target.per_node else graph_labels
        own[target.name] = normalization.standardize(
            label, 0 if target.per_node else num_nodes_G
        ).astype(dtype)
    return dataclasses.replace(
        arrays, graph_labels=graph_labels, node_labels=node_labels, dtype=np.dtype(dtype)
    ), normalizations


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which measure of which target is differentiated, with which weight, and which is reported.

    Attributes:
      targets: T of them, each with the metric to report.
      losses: of each, of `MEASURES`.
      weights: of each; the loss of a graph is the weighted sum over its labels.
    """

    targets: tuple[Target, ...]
    losses: tuple[str, ...]
    weights: tuple[float, ...]

    def loss_B(self, predictions: dict[str, Array], batch: Graph) -> Array:
        """[B] weighted sum over targets, standardised; 0 for a graph that only fills up."""
        error_BxT, _ = self._graph_errors(self.losses, predictions, batch)
        return (error_BxT * jnp.asarray(self.weights, error_BxT.dtype)).sum(axis=1)

    def errors_BxT(self, predictions: dict[str, Array], batch: Graph) -> tuple[Array, Array]:
        """The reported measure of each graph before `finish`, and whether it has a label."""
        return self._graph_errors([t.metric for t in self.targets], predictions, batch)

    def _graph_errors(self, measures, predictions, batch: Graph) -> tuple[Array, Array]:
        """Of a graph with labels per node: the mean over those nodes and their coordinates."""
        errors, labelled = [], []
        for target, measure in zip(self.targets, measures, strict=True):
            mask = has_label(batch, target.name, target.per_node)
            error = predictions[target.name] - batch.labels[target.name]
            error = MEASURES[measure].of_error(error)
            if target.per_node:
                width = error.shape[-1] if error.ndim > mask.ndim else 1
                error = error.reshape(*mask.shape, width)
                total_B = jnp.where(mask[..., None], error, 0.0).sum(axis=(1, 2))
                errors.append(total_B / (jnp.maximum(mask.sum(axis=1), 1) * width))
                labelled.append(mask.any(axis=1))
            else:
                errors.append(jnp.where(mask, error, 0.0))
                labelled.append(mask)
        return jnp.stack(errors, axis=1), jnp.stack(labelled, axis=1)


def make_objective(targets: tuple[Target, ...], loss: str, losses, weights, metrics) -> Objective:
    """Of the group `config.train`: one loss for all, and what single targets have instead.

    Args:
      targets: of the data set.
      loss: of `MEASURES`, for every target that `losses` does not name.
      losses: name of a target -> its own loss.
      weights: name of a target -> its weight; 1 for the others. They are divided by T.
      metrics: name of a target -> what is reported and chooses the best weights.
    """
    names = [target.name for target in targets]
    for key, given in (("losses", losses), ("weights", weights), ("metrics", metrics)):
        for name in given:
            if name not in names:
                raise UserError(
                    f"config.train.{key} names {name!r}, which is no target of this run."
                    f"{suggest(name, names)} Targets: {', '.join(names)}."
                )
    check_measure("config.train.loss", loss, as_loss=True)
    targets = tuple(dataclasses.replace(t, metric=metrics.get(t.name, t.metric)) for t in targets)
    for target in targets:
        name = target.name
        check_measure(f"config.train.losses.{name}", losses.get(name, loss), as_loss=True)
        check_measure(f"config.train.metrics.{name}", target.metric)
        if not 0 <= (weight := weights.get(name, 1.0)) < float("inf"):
            raise UserError(f"config.train.weights.{name} ({weight}) must be 0 or more.")
    if not any(weights.get(name, 1.0) for name in names):
        raise UserError("config.train.weights is 0 for every target: nothing would be learned.")
    return Objective(
        targets,
        tuple(losses.get(name, loss) for name in names),
        tuple(weights.get(name, 1.0) / len(names) for name in names),
    )


@flax.struct.dataclass
class TargetErrors(metrics.Metric):
    """Sum of errors and count of graphs with a label, per target; padding weighs nothing.

    Sums leave the step and are added and divided on the host in float64, so the metric is
    exact whatever the batching. `compute` is in standardised units.
    """

    total: Array  # [T]
    count: Array  # [T]

    @classmethod
    def from_model_output(cls, errors: Array, labelled: Array, **_):
        """Args: `errors` and `labelled` [B, T] of `Objective.errors_BxT`."""
        errors = jnp.where(labelled, errors, 0.0)
        return cls(total=errors.sum(axis=0), count=labelled.sum(axis=0, dtype=errors.dtype))

    @classmethod
    def empty(cls):
        return cls(total=np.float64(0), count=np.float64(0))

    def merge(self, other: "TargetErrors") -> "TargetErrors":
        return type(self)(total=self.total + other.total, count=self.count + other.count)

    def compute(self):
        return self.total / np.maximum(self.count, 1)
