"""N-body systems simulated once: memory-mapped arrays to train from, a passport."""

import dataclasses
import hashlib
import pathlib
import shutil

import numpy as np

from data_pipelines.dataset import PARTS
from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from data_pipelines.nbody.draws import Start, draw_all
from data_pipelines.nbody.protocols import Protocol
from data_pipelines.nbody.simulation import simulate_in_parts
from data_pipelines.prepared import default_cache_dir, prepare, write, write_parts

_PREPARATION_VERSION = 2  # raise it when prepared folders of before must not be used
_PART = 200  # systems; a killed preparation goes on after its last whole part


@dataclasses.dataclass(frozen=True)
class SystemArrays:
    """All systems of a task, train, validation and test one after the other.

    Attributes:
      position: [G, N, 3] float64, at the input.
      velocity: [G, N, 3] float64, at the input.
      charge: [G, N] float64, +1 or -1; 1 where springs or gravity act.
      target: [G, T, N, 3] float64, positions at each of the T targets.
      spring: [G, pairs] bool, whether a spring joins a pair, in the order of
        `np.triu_indices(N, 1)`; None where there are none.
      target_velocity: [G, T, N, 3] float64, velocities then, or None.
    """

    position: np.ndarray
    velocity: np.ndarray
    charge: np.ndarray
    target: np.ndarray
    spring: np.ndarray | None = None
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
    parts = folder.with_name(f"{key}.parts-of-{_PART}")
    arrays, passport = prepare(
        folder,
        lambda building: _build(protocol, building, parts, target_velocity),
        # Parts and the whole: four arrays of three numbers a particle, and what is smaller.
        f"{1 + sum(protocol.uses) * protocol.num_particles // 4_000} MB",
    )
    shutil.rmtree(parts, ignore_errors=True)
    return SystemArrays(**arrays), passport


def split_of(protocol: Protocol) -> dict[str, np.ndarray]:
    """Numbers of the systems of each part."""
    ends = np.cumsum(protocol.uses)
    return {
        part: np.arange(end - used, end)
        for part, end, used in zip(PARTS, ends, protocol.uses, strict=True)
    }


# --- preparing ---------------------------------------------------------------------------------


def _build(
    protocol: Protocol, folder: pathlib.Path, parts: pathlib.Path, with_velocity: bool
) -> None:
    start = draw_all(protocol)
    files = write_parts(
        parts,
        lambda done: _systems(start, protocol, done),
        _PART,
        lambda _, rows: {
            name: np.stack(column)
            for name, column in zip(_SIMULATED, zip(*rows, strict=True), strict=True)
        },
        {"desc": "Simulating", "unit": " systems", "total": len(start.charge)},
    )
    arrays = {name: np.concatenate(columns) for name, columns in _read(files).items()}
    arrays["charge"] = start.charge
    observed = ["position", "velocity", "charge", "target"]
    if with_velocity:
        observed.append("target_velocity")
    else:
        del arrays["target_velocity"]
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"The simulation gave a {name} that is not finite: {protocol}.")
    digest = hashlib.sha256()
    for name in observed:
        # Rounded: sums in another order differ in the last bits. (Systems whose encounters
        # amplify those differ all the same, and then the data are others: see `simulation`.)
        digest.update(np.round(arrays[name], 3).astype("<f4").tobytes())
    if start.spring is not None:
        arrays["spring"] = start.spring
    passport = {
        "dataset": "nbody",
        "preparation_version": _PREPARATION_VERSION,
        "protocol": protocol.to_json(),
        "systems": dict(zip(PARTS, protocol.uses, strict=True)),
        "units": "of the simulator: unit mass, unit interaction strength",
        "content_sha256": digest.hexdigest(),
    }
    write(folder, arrays, passport)


_SIMULATED = ("position", "velocity", "target", "target_velocity")


def _read(files: list[pathlib.Path]) -> dict[str, list[np.ndarray]]:
    """The arrays of all parts, each file closed again: there may be many."""
    columns = {name: [] for name in _SIMULATED}
    for file in files:
        with np.load(file) as part:
            for name, column in columns.items():
                column.append(part[name])
    return columns


def _systems(start: Start, protocol: Protocol, done: int):
    """The arrays `_SIMULATED` of one system after the other, from number `done` on."""
    for at_input, *at_targets in simulate_in_parts(start[done:], protocol):
        target = np.stack([state.position for state in at_targets], axis=1)
        target_velocity = np.stack([state.velocity for state in at_targets], axis=1)
        yield from zip(at_input.position, at_input.velocity, target, target_velocity, strict=True)
