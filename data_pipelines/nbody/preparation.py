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
    parts = folder.with_name(f"{key}.parts")
    arrays, passport = prepare(
        folder, lambda building: _build(protocol, building, parts, target_velocity), "200 MB"
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
    simulated = [np.load(file) for file in files]
    arrays = {name: np.concatenate([part[name] for part in simulated]) for name in _SIMULATED}
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


_FIELDS = ("position", "velocity")
_SIMULATED = ("position", "velocity", "target", "target_velocity")


def _systems(start: Start, protocol: Protocol, done: int):
    """The arrays `_SIMULATED` of one system after the other, from number `done` on."""
    rest = Start(
        **{
            field.name: None if (rows := getattr(start, field.name)) is None else rows[done:]
            for field in dataclasses.fields(Start)
        }
    )
    for at_input, *at_targets in simulate_in_parts(rest, protocol):
        targets = (np.stack([getattr(s, name) for s in at_targets], 1) for name in _FIELDS)
        yield from zip(at_input.position, at_input.velocity, *targets, strict=True)
