"""What was predicted of a chunk of rows, as one .npz file that is whole or absent."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.molecules.packing import pack_molecules, unpack_molecules
from data_pipelines.molecules.record import Molecule
from data_pipelines.prepared import own_name


@dataclasses.dataclass(frozen=True)
class Part:
    """New columns of some rows, and the molecules that they are of.

    Attributes:
      columns: name -> a value of each row: numbers or texts, [R]; or a list of arrays and None.
      molecules: of each row, or None; an empty list where they are not kept.
    """

    columns: dict[str, Sequence[Any]]
    molecules: list[Molecule | None]

    def save(self, file: pathlib.Path) -> None:
        """Writes the part; under its name it is whole."""
        arrays = {}
        for name, values in self.columns.items():
            arrays |= _packed(f"column.{name}", values)
        packed = pack_molecules(self.molecules)
        arrays |= {f"molecule.{name}": values for name, values in packed.items()}
        # A name of its own: two processes may write one part, where one was thought lost.
        building = file.with_name(f"building-{own_name()}.npz")
        np.savez(building, **arrays)
        building.rename(file)

    @classmethod
    def load(cls, file: pathlib.Path) -> "Part":
        """What `save` wrote."""
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        names = [n.removeprefix("column.") for n in arrays if n.startswith("column.")]
        names = [n for n in names if not n.endswith(_PARTS_OF_LISTS)]
        names += [
            n.removeprefix("column.").removesuffix(".given")
            for n in arrays
            if n.startswith("column.") and n.endswith(".given")
        ]
        columns = {name: _unpacked(f"column.{name}", arrays) for name in names}
        packed = {
            name.removeprefix("molecule."): values
            for name, values in arrays.items()
            if name.startswith("molecule.")
        }
        return cls(columns, unpack_molecules(packed))


_PARTS_OF_LISTS = (".given", ".sizes", ".values")


def _packed(name: str, values: Sequence[Any]) -> dict[str, np.ndarray]:
    """One array of numbers or texts; of a list of arrays: which are given, sizes, all values."""
    if isinstance(values, np.ndarray):
        return {name: values}
    given = [value for value in values if value is not None]
    return {
        f"{name}.given": np.array([value is not None for value in values], bool),
        f"{name}.sizes": np.array([len(value) for value in given], np.int64),
        f"{name}.values": np.concatenate(given) if given else np.zeros(0),
    }


def _unpacked(name: str, arrays: dict[str, np.ndarray]) -> Sequence[Any]:
    if name in arrays:
        return arrays[name]
    ends = np.cumsum(arrays[f"{name}.sizes"])[:-1]
    pieces = iter(np.split(arrays[f"{name}.values"], ends) if len(arrays[f"{name}.sizes"]) else [])
    return [next(pieces) if given else None for given in arrays[f"{name}.given"]]
