"""Models of particles as functions of NumPy arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.graph import Graph
from data_pipelines.nbody.pairs import edges_of
from demetar.config.stored import real_dtype
from demetar.inference.package import Package, read
from demetar.models import predict as predict_batch


def load_pretrained(name: str) -> "ParticleModel":
    """A model of positions, one that ships or a file, as a function of NumPy arrays."""
    model = read(name)
    if reason := _why_not(model):
        raise UserError(
            f"load_pretrained cannot give {name}: {reason}. It gives a model only positions, "
            "velocities and charges of particles; for molecules use demetar.load_model."
        )
    return ParticleModel(model)


class ParticleModel:
    """Where particles are after a time, and how fast if the model has learned that.

    Arrays are in the units of the model's data: `position` and `velocity` `[B, N, 3]`, `charge`
    `[B, N]`; any B, and any N, though it has only seen the N of its training. Edges go to as many
    nearest particles as in training.

    Attributes:
      package: the model and its card.
      horizon: the time it was trained for, the longest of several.
    """

    def __init__(self, package: Package):
        self.package = package
        self.horizon: float = package.facts["horizon"]
        self._network = package.network()
        self._neighbors = package.config.data.neighbors
        self._dtype = real_dtype(package.config)
        self._apply = jax.jit(self._predict_batch)

    @property
    def several_horizons(self) -> bool:
        """Whether it can be asked for shorter times than `horizon`."""
        return "graph_feature" in self.package.card["inputs"]

    def __call__(self, *, position, velocity, charge, horizon: float | None = None) -> np.ndarray:
        """Positions `[B, N, 3]` after `horizon`, its longest if None."""
        return self._predict(position, velocity, charge, horizon)[self._network.position]

    def rollout(
        self, *, position, velocity, charge, steps: int, horizon: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predictions from predictions: positions and velocities `[B, steps + 1, N, 3]`.

        The first is what is given; each next one is `horizon` later.
        """
        if self._network.velocity is None:
            raise UserError(
                f"{self.package.name} predicts no velocities, so nothing follows from its "
                "predictions: train a model with config.data.targets=('position', 'velocity')."
            )
        states = [(np.asarray(position, self._dtype), np.asarray(velocity, self._dtype))]
        for _ in range(steps):
            found = self._predict(*states[-1], charge, horizon)
            states.append((found[self._network.position], found[self._network.velocity]))
        return tuple(np.stack(column, axis=1) for column in zip(*states, strict=True))

    def _predict(self, position, velocity, charge, horizon) -> dict[str, np.ndarray]:
        arrays = {"position": position, "velocity": velocity, "charge": charge}
        arrays = {key: np.asarray(value, self._dtype) for key, value in arrays.items()}
        shape = arrays["position"].shape
        if len(shape) != 3 or shape[2] != 3 or shape[1] < 1:
            raise ValueError(f"position has shape {shape}; it must be [B, N, 3].")
        for key, wanted in (("velocity", shape), ("charge", shape[:2])):
            if arrays[key].shape != wanted:
                raise ValueError(f"{key} has shape {arrays[key].shape}; it must be {wanted}.")
        time = self._time(horizon)
        edges = _edges(arrays["position"], self._neighbors)
        with jax.enable_x64(self._dtype == np.float64):
            found = self._apply(**arrays, **edges, time=time)
        return {name: np.asarray(value) for name, value in found.items()}

    def _time(self, horizon: float | None) -> np.floating:
        """The time to predict for, refused if the model has not learned it."""
        if horizon is None:
            return self._dtype.type(self.horizon)
        if not self.several_horizons and not np.isclose(horizon, self.horizon):
            raise ValueError(
                f"horizon is {horizon}, but {self.package.name} has learned {self.horizon} alone."
            )
        if not 0 < horizon <= self.horizon * (1 + 1e-6):
            raise ValueError(
                f"horizon is {horizon}, but must be above 0 and at most {self.horizon}, the "
                f"longest that {self.package.name} has learned."
            )
        return self._dtype.type(horizon)

    def _predict_batch(self, position, velocity, charge, edges, edge_mask, time) -> dict:
        number, n = position.shape[:2]
        (element,) = self.package.elements
        batch = Graph(
            position=position,
            velocity=velocity,
            charge=charge,
            atomic_number=jnp.full((number, n), element, jnp.int32),
            node_mask=jnp.ones((number, n), bool),
            senders=edges[..., 0],
            receivers=edges[..., 1],
            edge_type=edges[..., 2],
            edge_mask=edge_mask,
            graph_mask=jnp.ones(number, bool),
            index=jnp.arange(number),
            graph_feature=jnp.full((number, 1), time) if self.several_horizons else None,
        )
        return predict_batch(self._network, self.package.params, batch)


def _edges(position_BxNx3: np.ndarray, neighbors: int) -> dict[str, np.ndarray]:
    """Edges of each system, as many places for all as bound what they can have."""
    number, n, _ = position_BxNx3.shape
    offset, rows = edges_of(position_BxNx3, None, neighbors)
    most = min(n * (neighbors or n), n * (n - 1) // 2)
    mask_BxE = np.arange(most) < np.diff(offset)[:, None]
    edges_BxEx3 = np.zeros((number, most, 3), np.int32)
    edges_BxEx3[mask_BxE] = rows
    return {"edges": edges_BxEx3, "edge_mask": mask_BxE}


def _why_not(model: Package) -> str:
    """Why positions, velocities and charges are not what a model needs; "" if they are."""
    readouts = {target.readout for target in model.targets}
    if not {"position"} <= readouts <= {"position", "velocity"}:
        return f"its targets are read out as {', '.join(sorted(readouts))}, not as positions"
    of_particles = set(model.card["inputs"]) - {"graph_feature"} == {"velocity", "charge"}
    if not of_particles or model.card["passport"].get("dataset") != "nbody":
        return "its nodes are no particles of the data set nbody, with a velocity and a charge"
    if model.card["passport"]["protocol"]["interaction"] == "springs":
        return "its particles act on each other along springs that are not known here"
    return ""
