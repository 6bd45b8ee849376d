"""What a model is trained for: targets, their normalisation, loss and metrics.

A model predicts standardised targets. The statistics come from the training split alone:

    intensive:  y = mean + std * z
    extensive:  y = mean_per_atom * n + std * z     (n atoms; least squares over training)

where y is in reported units, atom references already subtracted in float64. Positions of
particles are left as they are: a shift or a scale of their own would break the symmetries.
"""

import dataclasses

import flax.struct
import jax.numpy as jnp
import numpy as np
from clu import metrics

from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import Dataset
from data_pipelines.graph import Array, Graph


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Per-target statistics, float64 [T]: `offset`, `slope` per atom, `scale`."""

    offset: np.ndarray
    slope: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, target_gxT: np.ndarray, num_atoms_g: np.ndarray, extensive_T) -> "Normalization":
        """Statistics of the training graphs."""
        n_g = num_atoms_g.astype(np.float64)
        extensive_T = np.asarray(extensive_T, bool)
        per_atom_T = n_g @ target_gxT / (n_g @ n_g)
        slope_T = np.where(extensive_T, per_atom_T, 0.0)
        offset_T = np.where(extensive_T, 0.0, target_gxT.mean(axis=0))
        residual = target_gxT - offset_T - n_g[:, None] * slope_T
        scale_T = np.sqrt((residual**2).mean(axis=0))
        return cls(offset_T, slope_T, np.where(scale_T > 0, scale_T, 1.0))

    def standardize(self, target_GxT: np.ndarray, num_atoms_G: np.ndarray) -> np.ndarray:
        """Reported units -> what the model predicts, float64, before any cast."""
        return (target_GxT - self.offset - num_atoms_G[:, None] * self.slope) / self.scale

    def restore(self, standardized_GxT: np.ndarray, num_atoms_G: np.ndarray) -> np.ndarray:
        """The inverse of `standardize`."""
        return standardized_GxT * self.scale + self.offset + num_atoms_G[:, None] * self.slope


def standardize(dataset: Dataset, dtype) -> tuple[GraphArrays, Normalization]:
    """The data set's graphs with standardised targets in `dtype`, and what was subtracted."""
    arrays, train = dataset.arrays, dataset.split["train"]
    if arrays.target_per_node:
        unchanged = Normalization(np.zeros(1), np.zeros(1), np.ones(1))
        return dataclasses.replace(arrays, target=arrays.target.astype(dtype)), unchanged
    num_atoms_G = arrays.sizes.num_nodes
    normalization = Normalization.fit(
        arrays.target[train], num_atoms_G[train], [t.extensive for t in dataset.targets]
    )
    target = normalization.standardize(arrays.target, num_atoms_G).astype(dtype)
    return dataclasses.replace(arrays, target=target), normalization


# Of single numbers; both losses and the metrics of `Target.metric`.
ERRORS = {"mae": jnp.abs, "mse": jnp.square}


def graph_errors(name: str, prediction: Array, batch: Graph) -> Array:
    """The error `name` of `ERRORS` of each graph and target, `[B, T]`.

    Where the target is per node, the mean over a graph's nodes and coordinates, `[B, 1]`.
    """
    error = ERRORS[name](prediction - batch.target)
    if error.ndim == 2:
        return error
    total_B = jnp.where(batch.node_mask[..., None], error, 0.0).sum(axis=(1, 2))
    count_B = jnp.maximum(batch.node_mask.sum(axis=1), 1) * error.shape[-1]
    return (total_B / count_B)[:, None]


@flax.struct.dataclass
class TargetErrors(metrics.Metric):
    """Sum of errors and count of graphs, per target; padding graphs weigh nothing.

    Sums leave the step and are added and divided on the host in float64, so the metric is
    exact whatever the batching. `compute` is in standardised units.
    """

    total: Array  # [T]
    count: Array  # []

    @classmethod
    def from_model_output(cls, errors: Array, mask: Array, **_):
        """Args: `errors` [B, T] of `graph_errors`, `mask` [B] bool."""
        errors = jnp.where(mask[:, None], errors, 0.0)
        return cls(total=errors.sum(axis=0), count=mask.sum(dtype=errors.dtype))

    @classmethod
    def empty(cls):
        return cls(total=np.float64(0), count=np.float64(0))

    def merge(self, other: "TargetErrors") -> "TargetErrors":
        return type(self)(total=self.total + other.total, count=self.count + other.count)

    def compute(self):
        return self.total / np.maximum(self.count, 1)


def error_scale(normalization: Normalization, metric: str) -> np.ndarray:
    """[T] factors from standardised to reported errors."""
    return normalization.scale ** {"mae": 1, "mse": 2}[metric]


def trivial_errors(dataset: Dataset, graphs: np.ndarray) -> dict[str, np.ndarray]:
    """Errors [T] of predictors that any model must beat, in reported units.

    Graph targets: the mean over training. Positions: no motion, free flight, and the best
    linear map of x and v (about the centre of mass; least squares over training).
    """
    train, arrays = dataset.split["train"], dataset.arrays
    if not arrays.target_per_node:
        mean_T = arrays.target[train].mean(axis=0)
        return {"training_mean": np.abs(arrays.target[graphs] - mean_T).mean(axis=0)}

    def parts(graphs):
        """Target, position, velocity relative to the moving centre of mass; and its velocity."""
        node = arrays.node_offset[graphs][:, None] + np.arange(arrays.sizes.num_nodes[0])
        x, v, y = arrays.position[node], arrays.velocity[node], arrays.target[node]
        x_com, v_com = x.mean(axis=1, keepdims=True), v.mean(axis=1, keepdims=True)
        return y - x_com - dataset.horizon * v_com, x - x_com, v - v_com, v_com

    y, x, v, _ = parts(train)
    columns = np.stack([x.ravel(), v.ravel()], axis=1)
    weights, *_ = np.linalg.lstsq(columns, y.ravel(), rcond=None)
    y, x, v, v_com = parts(graphs)
    predictions = {
        "no_motion": x - dataset.horizon * v_com,
        "free_flight": x + dataset.horizon * v,
        "linear": weights[0] * x + weights[1] * v,
    }
    return {
        name: np.square(p - y).mean(keepdims=True).reshape(1) for name, p in predictions.items()
    }
