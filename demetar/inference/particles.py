"""Models of particles as functions of NumPy arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.graph import Graph
from demetar.inference.package import Package, read
from demetar.models import predict as predict_batch


def load_pretrained(name: str) -> Callable[..., np.ndarray]:
    """A model of positions as a function of NumPy arrays.

    Returns:
      `f(position=[B, N, 3], velocity=[B, N, 3], charge=[B, N]) -> position [B, N, 3]` after the
      horizon it was trained for, in the units of its data; any B, and any N, though it has
      only seen the N of its training.
    """
    model = read(name)
    if reason := _why_not(model):
        raise UserError(
            f"load_pretrained cannot give {name}: {reason}. It gives a model only positions, "
            "velocities and charges of particles; for molecules use demetar.load_model."
        )
    network = model.network()
    (element,) = model.elements

    @jax.jit
    def apply(position, velocity, charge):
        number, n = position.shape[:2]
        senders, receivers = np.triu_indices(n, 1)
        every = lambda x: jnp.broadcast_to(jnp.asarray(x), (number, len(x)))
        batch = Graph(
            position=position,
            velocity=velocity,
            charge=charge,
            atomic_number=every(np.full(n, element, np.int32)),
            node_mask=every(np.ones(n, bool)),
            senders=every(senders.astype(np.int32)),
            receivers=every(receivers.astype(np.int32)),
            edge_type=every(np.zeros(len(senders), np.int32)),
            edge_mask=every(np.ones(len(senders), bool)),
            graph_mask=jnp.ones(number, bool),
            index=jnp.arange(number),
        )
        return predict_batch(network, model.params, batch)[network.position]

    def predict(*, position, velocity, charge) -> np.ndarray:
        arrays = {"position": position, "velocity": velocity, "charge": charge}
        arrays = {key: np.asarray(value, np.float32) for key, value in arrays.items()}
        shape = arrays["position"].shape
        if len(shape) != 3 or shape[2] != 3 or shape[1] < 1:
            raise ValueError(f"position has shape {shape}; it must be [B, N, 3].")
        for key, wanted in (("velocity", shape), ("charge", shape[:2])):
            if arrays[key].shape != wanted:
                raise ValueError(f"{key} has shape {arrays[key].shape}; it must be {wanted}.")
        return np.asarray(apply(**arrays))

    return predict


def _why_not(model: Package) -> str:
    """Why positions, velocities and charges are not what a model needs; "" if they are."""
    readouts = [target.readout for target in model.targets]
    if readouts != ["position"]:
        return f"its targets are read out as {', '.join(readouts)}, not as one of positions"
    if model.card["inputs"] != ["velocity", "charge"] or len(model.elements) > 1:
        return "its nodes are no particles with a velocity and a charge"
    if not model.card["all_pairs"]:
        return "not all pairs of its particles are edges"
    return ""
