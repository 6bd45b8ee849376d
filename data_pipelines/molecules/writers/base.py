"""What every writer of predictions is, and how values become text."""

import abc
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.json_text import json_text
from data_pipelines.molecules.record import Molecule, Row

KINDS = (
    "number",  # NaN or None: none
    "text",
    "vector",  # [D] for each molecule, all of one length; None: none
    "atoms",  # [n] or [n, 3], of every atom; None: none
)


class Writer(abc.ABC):
    """Writes rows to a file, chunk by chunk.

    Args:
      building: what to write to; the caller renames it.
      path: what it will be called.
      source: the file that the rows come from.
      names: columns of the source, in their order.
      columns: new column -> its kind, of `KINDS`.
    """

    def __init__(
        self,
        building: pathlib.Path,
        path: pathlib.Path,
        source: pathlib.Path,
        names: Sequence[str],
        columns: Mapping[str, str],
    ):
        self.building, self.path, self.source = building, path, source
        self.names, self.columns = tuple(names), dict(columns)
        self.open()

    @abc.abstractmethod
    def open(self) -> None:
        """Begins the file."""

    @abc.abstractmethod
    def write(
        self,
        rows: Sequence[Row],
        outputs: Mapping[str, Sequence[Any]],
        molecules: Sequence[Molecule | None] | None = None,
    ) -> None:
        """Appends rows.

        Args:
          rows: in the order of the source, whole (`readers.read_rows`), refused ones too.
          outputs: new column -> a value for each row.
          molecules: what the values are of, with the geometry that was used; None, as a whole or
            for one row: the atoms that the row itself has, if any.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the file."""


def as_text(value: Any) -> str:
    """A value as a cell: "" if there is none; arrays as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (np.ndarray, list, tuple)):  # faster than a union
        return json_text(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        value = value.item()
    return "" if isinstance(value, float) and math.isnan(value) else str(value)


def one_line(value: Any) -> str:
    """The same without breaks of lines."""
    return " ".join(as_text(value).split())


def atoms_of(row: Row, molecule: Molecule | None) -> tuple[np.ndarray, np.ndarray]:
    """(Atomic numbers [n], positions [n, 3]) to write; n is 0 where there is no molecule."""
    if molecule is not None:
        return molecule.atomic_numbers.astype(int), molecule.positions.astype(np.float64)
    if row.atomic_numbers is None or row.positions is None:
        return np.zeros(0, int), np.zeros((0, 3))
    return row.atomic_numbers, row.positions
