"""What a model is trained for: targets, their normalisation, loss and metrics.

A model predicts standardised targets. The statistics come from the training split alone:

    intensive:  y = mean + std * z
    extensive:  y = mean_per_atom * n + std * z     (n atoms; least squares over training)

where y is in reported units, atom references already subtracted in float64.
"""

import dataclasses

import flax.struct
import jax.numpy as jnp
import numpy as np
from clu import metrics

from data_pipelines.dataset import Dataset
from data_pipelines.pipeline import GraphArrays
from demetar.graph import Array


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
    num_atoms_G = arrays.sizes.num_nodes
    normalization = Normalization.fit(
        arrays.target[train], num_atoms_G[train], [t.extensive for t in dataset.targets]
    )
    target = normalization.standardize(arrays.target, num_atoms_G).astype(dtype)
    return dataclasses.replace(arrays, target=target), normalization


LOSSES = {"mae": jnp.abs, "mse": jnp.square}


@flax.struct.dataclass
class TargetErrors(metrics.Metric):
    """Sum of absolute errors and count of graphs, per target; padding graphs weigh nothing.

    Sums leave the step and are added and divided on the host in float64, so the metric is
    exact whatever the batching. `compute` is in standardised units.
    """

    total: Array  # [T]
    count: Array  # []

    @classmethod
    def from_model_output(cls, prediction: Array, target: Array, mask: Array, **_):
        """Args: `prediction` and `target` [B, T], `mask` [B] bool."""
        error_BxT = jnp.where(mask[:, None], jnp.abs(prediction - target), 0.0)
        return cls(total=error_BxT.sum(axis=0), count=mask.sum(dtype=error_BxT.dtype))

    @classmethod
    def empty(cls):
        return cls(total=np.float64(0), count=np.float64(0))

    def merge(self, other: "TargetErrors") -> "TargetErrors":
        return type(self)(total=self.total + other.total, count=self.count + other.count)

    def compute(self):
        return self.total / np.maximum(self.count, 1)
