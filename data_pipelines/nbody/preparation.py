"""N-body systems simulated once: memory-mapped arrays to train from, a passport."""

import dataclasses
import hashlib
import pathlib

import numpy as np

from data_pipelines.dataset import PARTS
from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from data_pipelines.nbody.protocols import Protocol
from data_pipelines.nbody.simulation import draw_all, simulate_all
from data_pipelines.prepared import default_cache_dir, prepare, write

_PREPARATION_VERSION = 1  # raise it when prepared folders of before must not be used


@dataclasses.dataclass(frozen=True)
class SystemArrays:
    """All systems of a task, train, validation and test one after the other.

    Attributes:
      position: [G, N, 3] float64, at the input.
      velocity: [G, N, 3] float64, at the input.
      charge: [G, N] float64, +1 or -1; 1 where springs act.
      target: [G, N, 3] float64, positions at the target.
      coupling: [G, pairs] float64, q_i q_j or whether a spring joins i and j; pairs in the
        order of `np.triu_indices(N, 1)`.
      target_velocity: [G, N, 3] float64, velocities at the target, or None.
    """

    position: np.ndarray
    velocity: np.ndarray
    charge: np.ndarray
    target: np.ndarray
    coupling: np.ndarray
    target_velocity: np.ndarray | None = None


def load(
    protocol: Protocol, cache_dir: str = "", target_velocity: bool = False
) -> tuple[SystemArrays, dict]:
    """The simulated systems and their passport, simulating them first where needed.

    Args:
      protocol: which.
      cache_dir: of prepared folders; "": the user's.
      target_velocity: whether velocities at the target are kept too, in a folder of its own.
    """
    text = f"{_PREPARATION_VERSION}:{json_text(protocol.to_json())}"
    text += ":target_velocity" if target_velocity else ""
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = pathlib.Path(cache_dir or default_cache_dir()) / "nbody" / key
    arrays, passport = prepare(
        folder, lambda building: _build(protocol, building, target_velocity), "100 MB"
    )
    return SystemArrays(**arrays), passport


def split_of(protocol: Protocol) -> dict[str, np.ndarray]:
    """Positions of the systems of each part."""
    ends = np.cumsum(protocol.uses)
    return {
        part: np.arange(end - used, end)
        for part, end, used in zip(PARTS, ends, protocol.uses, strict=True)
    }


# --- preparing ---------------------------------------------------------------------------------


def _build(protocol: Protocol, folder: pathlib.Path, with_velocity: bool) -> None:
    start = draw_all(protocol)
    position, velocity, target, target_velocity = simulate_all(
        start["position"],
        start["velocity"],
        start["coupling"],
        protocol.input_step,
        protocol.horizon_steps,
        protocol.interaction,
        protocol.box,
    )
    arrays = {
        "position": position,
        "velocity": velocity,
        "charge": start["charge"],
        "target": target,
        "coupling": start["coupling"],
    }
    observed = ["position", "velocity", "charge", "target"]
    if with_velocity:
        arrays["target_velocity"] = target_velocity
        observed.append("target_velocity")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"The simulation gave a {name} that is not finite: {protocol}.")
    digest = hashlib.sha256()
    for name in observed:
        # Rounded: sums in another order differ in the last bits. (Systems whose encounters
        # amplify those differ all the same, and then the data are others: see `simulation._run`.)
        digest.update(np.round(arrays[name], 3).astype("<f4").tobytes())
    passport = {
        "dataset": "nbody",
        "preparation_version": _PREPARATION_VERSION,
        "protocol": protocol.to_json(),
        "systems": dict(zip(PARTS, protocol.uses, strict=True)),
        "units": "of the simulator: unit mass, unit interaction strength",
        "content_sha256": digest.hexdigest(),
    }
    write(folder, arrays, passport)
