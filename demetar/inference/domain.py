"""How far a molecule is from what a model was trained on, by its embedding.

With a model go the embeddings of some training molecules, and how far each of some validation
molecules is from the nearest of them: validation is drawn as training is, and was not learned. The
distance of a new molecule is said as a percentile of those: 99 is further than 99 % of validation.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

MOST_MOLECULES = 2_000  # molecules of each part, at most: more change a percentile little


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
    """[g] float64: Euclidean distance of each point to the nearest of the others.

    Which one is nearest is found in float32, about the centre of training, where the squares are
    small; how far it is, in float64.
    """
    centre_D = training_mxD.mean(axis=0)
    training = (training_mxD - centre_D).astype(np.float32)
    half_square_m = np.square(training).sum(axis=1) / 2
    distance_g = np.zeros(len(point_gxD))
    for start in range(0, len(point_gxD), chunk):
        points = point_gxD[start : start + chunk]
        part = (points - centre_D).astype(np.float32)
        nearest = (half_square_m - part @ training.T).argmin(axis=1)
        apart = points.astype(np.float64) - training_mxD[nearest]
        distance_g[start : start + chunk] = np.linalg.norm(apart, axis=1)
    return distance_g
