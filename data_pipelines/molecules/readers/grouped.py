"""HDF5: groups of molecules of one size or one formula, as ANI, SPICE, AIMNet2 and torchmd-net.

Every group with positions holds molecules, in whatever depth; they come in the order of the names
of the groups. What is in a group is told in `members`, with its padded layout.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.molecules.readers import members
from data_pipelines.molecules.readers.fields import Damaged, plain, union
from data_pipelines.molecules.record import Row
from data_pipelines.molecules.units import factor


def read(path: pathlib.Path, smiles_column: str) -> Iterator[Row]:
    """Rows of all groups."""
    del smiles_column
    with _open(path) as file:
        first = 1
        for group in _groups(file, path):
            where, found = f"{path}, group {group.name}", _members(group)
            unit = plain(group[members.find(found, members.POSITIONS)].attrs.get("units"))
            scale = factor(str(unit).lower(), "angstrom") if unit else 1.0
            yield from members.rows(found, first, where, scale)
            first += members.count(found)


def columns(path: pathlib.Path) -> tuple[str, ...]:
    """Names of all datasets with one value for each molecule."""
    with _open(path) as file:
        return union(
            members.columns(_members(group), f"{path}, group {group.name}")
            for group in _groups(file, path)
        )


def count(path: pathlib.Path) -> int:
    """Molecules, by the shapes of the datasets."""
    with _open(path) as file:
        return sum(members.count(_members(group)) for group in _groups(file, path))


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator:
    try:
        import h5py
    except ImportError as error:
        raise UserError("HDF5 needs the package h5py: pip install 'demetar[hdf5]'.") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (UserError, Damaged):
        raise
    except Exception as error:  # of damaged bytes h5py raises almost anything
        raise Damaged(repr(error)) from error


def _groups(file, path: pathlib.Path) -> Iterator:
    """All groups with positions, each once."""
    waiting, found, seen = [file], False, set()
    while waiting:
        group = waiting.pop()
        if group in seen:  # links may lead in a circle
            continue
        seen.add(group)
        if any(name in group for name in members.POSITIONS):
            found = True
            yield group
        waiting += [
            child for name in sorted(group, reverse=True) if _is_group(child := group[name])
        ]
    if not found:
        raise UserError(
            f"{path} has no group with positions: call them one of "
            f"{', '.join(members.POSITIONS)}. Its groups: {', '.join(list(file)[:10]) or 'none'}."
        )


def _is_group(item) -> bool:
    return hasattr(item, "keys")


def _members(group) -> dict[str, members.Member]:
    found = dict(group.items())
    if lost := [name for name, item in found.items() if item is None]:
        raise Damaged(f"{group.name}: {lost[0]} leads nowhere")
    return {name: _Slices(item) for name, item in found.items() if not _is_group(item)}


class _Slices(members.Member):
    """A dataset of an HDF5 file."""

    def __init__(self, dataset):
        self._dataset, self._taken = dataset, 0
        self.shape, self.dtype = dataset.shape, dataset.dtype
        if self.shape and dataset.chunks:  # that are compressed, so read whole
            members.check_size(f"{dataset.name}, a chunk", dataset.chunks, self.dtype)

    def take(self, count: int) -> np.ndarray:
        if not self.shape:
            return np.asarray(self._dataset[()]).reshape(1)
        members.check_size(self._dataset.name, (count, *self.shape[1:]), self.dtype)
        self._taken += count
        return self._dataset[self._taken - count : self._taken]
