"""How far a molecule is from what a model was trained on, by its embedding.

With a model go the embeddings of some training molecules, and how far each of some validation
molecules is from the nearest of them: validation is drawn as training is, and was not learned. The
distance of a new molecule is said as a percentile of those: 99 is further than 99 % of validation.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

KEPT = 2_000  # molecules of each part, at most: more change a percentile little


@dataclasses.dataclass(frozen=True)
class Domain:
    """What a model's training looks like to it.

    Attributes:
      training: [m, D] float32, embeddings in units of `scale`.
      scale: [D] float32, of each feature over training; 1 where it never differs.
      distance: [v] float32, ascending: from validation molecules to the nearest of `training`.
    """

    training: np.ndarray
    scale: np.ndarray
    distance: np.ndarray

    @classmethod
    def fit(cls, training_gxD: np.ndarray, validation_gxD: np.ndarray) -> "Domain":
        """Of embeddings of both parts."""
        scale_D = training_gxD.std(axis=0)
        scale_D = np.where(scale_D > 1e-6 * np.abs(training_gxD).max(), scale_D, 1)
        scale_D = scale_D.astype(np.float32)
        training = (training_gxD / scale_D).astype(np.float32)
        distance = np.sort(_to_nearest(validation_gxD / scale_D, training))
        return cls(training, scale_D, distance.astype(np.float32))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Domain | None":
        """As `arrays` gave them; None where there are none."""
        return cls(**arrays) if arrays else None

    def arrays(self) -> dict[str, np.ndarray]:
        """To keep with the weights."""
        return dataclasses.asdict(self)

    def percentile(self, embedding_gxD: np.ndarray) -> np.ndarray:
        """[g] from 0 to 100: how many of the validation molecules are nearer to training."""
        distance_g = _to_nearest(embedding_gxD / self.scale, self.training)
        nearer_g = np.searchsorted(self.distance, distance_g.astype(np.float32), "left")
        return 100.0 * nearer_g / len(self.distance)


def _to_nearest(point_gxD: np.ndarray, training_mxD: np.ndarray, chunk: int = 1_024) -> np.ndarray:
    """[g] float64: Euclidean distance of each point to the nearest of the others."""
    training = training_mxD.astype(np.float64)
    square_m = np.square(training).sum(axis=1)
    nearest = [np.zeros(0)]
    for start in range(0, len(point_gxD), chunk):
        part = point_gxD[start : start + chunk].astype(np.float64)
        square_gxm = np.square(part).sum(axis=1)[:, None] + square_m - 2 * part @ training.T
        nearest.append(np.sqrt(np.maximum(square_gxm.min(axis=1), 0)))
    return np.concatenate(nearest)
