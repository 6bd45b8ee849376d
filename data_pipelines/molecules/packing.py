"""Many molecules as a few arrays: to send them between processes, and to store them.

A molecule is a dozen objects to Python, and each costs more to send than all its numbers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.molecules.record import Molecule

# Without the notes, which are for whoever prepares data.
_FIELDS = tuple(f.name for f in dataclasses.fields(Molecule) if f.name != "notes")
_ARRAYS = ("atomic_numbers", "positions", "bonds")


def pack_molecules(molecules: Sequence[Molecule | None]) -> dict[str, np.ndarray]:
    """One array for each field, `None`s left out; and `kept`, which says where they were."""
    there = [m for m in molecules if m is not None]
    arrays = {"kept": np.array([m is not None for m in molecules], bool)}
    if not there:
        return arrays
    for name in _FIELDS:
        values = [getattr(m, name) for m in there]
        if name in _ARRAYS:
            arrays[f"{name}.sizes"] = np.array([len(value) for value in values], np.int64)
            arrays[name] = np.concatenate(values)
        else:
            arrays[name] = np.array(values)
    return arrays


def unpack_molecules(arrays: dict[str, np.ndarray]) -> list[Molecule | None]:
    """What `pack_molecules` was given, without its notes; their arrays are views of these."""
    if not arrays["kept"].any():
        return [None] * len(arrays["kept"])
    columns = []
    for name in _FIELDS:
        if name in _ARRAYS:
            ends = np.cumsum(arrays[f"{name}.sizes"]).tolist()
            starts = [0, *ends[:-1]]
            whole = arrays[name]
            columns.append([whole[a:b] for a, b in zip(starts, ends, strict=True)])
        else:
            columns.append(arrays[name].tolist())
    molecules = map(Molecule, *columns)  # the fields in their order
    return [next(molecules) if kept else None for kept in arrays["kept"].tolist()]
