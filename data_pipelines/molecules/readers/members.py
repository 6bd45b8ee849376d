"""Rows of arrays that are read a slice at a time: what NPZ and HDF5 share.

    padded   positions [G, N, 3], numbers [G, N] (0 in padding) or [N], the same for all
    flat     positions [atoms, 3], numbers [atoms], and offsets [G + 1] or numbers of atoms [G]

Of the other arrays, those of length G are columns, or of [G, N], [G, N, 3], [atoms] and
[atoms, 3] numbers of each atom.
"""

import abc
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.elements import NUM_ELEMENTS
from data_pipelines.errors import UserError
from data_pipelines.molecules.readers.fields import (
    VECTORS,
    Damaged,
    charge_and_multiplicity,
    plain,
)
from data_pipelines.molecules.record import MAX_NODES, Refusal, Row

# As ase, AIMNet2, torchmd-net, ANI, SPICE, sGDML and rMD17 call them.
NUMBERS = ("numbers", "atomic_numbers", "z", "Z", "types", "species", "nuclear_charges")
POSITIONS = ("positions", "R", "coordinates", "coord", "coords", "pos", "conformations")
_OFFSETS = ("offsets", "offset", "node_offset", "ptr")
_SIZES = ("num_atoms", "n_atoms", "natoms", "sizes", "N")
_NO_ELEMENT = NUM_ELEMENTS + 1  # an atom, other than 0 or -1, which fill up
_CHUNK, _ATOMS = 1_024, 1 << 19  # molecules and slots for atoms in memory, at most
_LARGEST = 1 << 30  # bytes of an array that are read at once


class Member(abc.ABC):
    """One array of a file, read from its beginning to its end.

    Attributes:
      shape, dtype: as NumPy's.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @abc.abstractmethod
    def take(self, count: int) -> np.ndarray:
        """The next rows; `[count, ...]`."""

    def all(self) -> np.ndarray:
        """The whole array, if nothing was taken before."""
        return self.take(self.shape[0]) if self.shape else self.take(1).reshape(())


def find(members: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Which of the names is there; "" if none is."""
    return next((name for name in names if name in members), "")


def count(members: Mapping[str, Member]) -> int:
    """How many molecules the arrays hold."""
    if key := find(members, _OFFSETS):
        return members[key].shape[0] - 1
    if (key := find(members, _SIZES)) and len(members[find(members, POSITIONS)].shape) == 2:
        return members[key].shape[0]
    return members[find(members, POSITIONS)].shape[0]


def columns(members: Mapping[str, Member], where: str) -> tuple[str, ...]:
    """Names of the arrays that hold one value for each molecule."""
    kinds = _Kinds(members, where)
    return tuple(name for name, kind in kinds.of.items() if kind in ("row", "shared"))


def rows(members: dict[str, Member], first: int, where: str, scale: float = 1.0) -> Iterator[Row]:
    """The molecules of one set of arrays.

    Args:
      members: by their names.
      first: number of the first row.
      where: file, and group, for messages.
      scale: by which positions are multiplied, to be in angstrom.

    Raises:
      UserError: the arrays do not fit each other.
    """
    kinds = _Kinds(members, where)
    shared = {n: members[n].all() for n, kind in kinds.of.items() if kind.startswith("shared")}
    fixed = _numbers(members[kinds.numbers].all()) if kinds.fixed_numbers else None
    sizes = kinds.sizes()
    largest = kinds.width if sizes is None else int(sizes.max(initial=1))
    chunk = max(1, min(_CHUNK, _ATOMS // max(largest, 1)))
    for start in range(0, kinds.count, chunk):
        length = min(chunk, kinds.count - start)
        sizes_g = sizes[start : start + length] if sizes is not None else None
        atoms = int(sizes_g.sum()) if sizes_g is not None else length
        positions = np.asarray(members[kinds.positions].take(atoms), np.float64) * scale
        numbers = None if fixed is not None else _numbers(members[kinds.numbers].take(atoms))
        taken = {
            name: members[name].take(atoms if kind == "node" else length)
            for name, kind in kinds.of.items()
            if not kind.startswith("shared")
        }
        offset = None if sizes_g is None else np.concatenate([[0], np.cumsum(sizes_g)])
        for k in range(length):
            if offset is not None:
                part = slice(offset[k], offset[k + 1])
                own, keep = numbers[part], slice(None)
                place = positions[part]
            else:
                part = k
                own = fixed if fixed is not None else numbers[k]
                keep = own > 0
                own, place = own[keep], positions[k][keep]
            values, per_atom = {}, {}
            for name, kind in kinds.of.items():
                if kind == "row":
                    values[name] = _value(taken[name][k])
                elif kind == "node":
                    per_atom[name] = _drop_one(taken[name][part][keep])
                elif kind == "shared":
                    values[name] = _value(shared[name])
                else:
                    per_atom[name] = shared[name][keep]
            charge, multiplicity = charge_and_multiplicity(values)
            refusal = None
            if (own == _NO_ELEMENT).any():
                message = f"{kinds.numbers} names an atom of no element: write H, C, Cl, or numbers"
                refusal = Refusal("element", message)
            yield Row(
                first + start + k,
                values,
                smiles=str(values.get("smiles") or ""),
                atomic_numbers=own,
                positions=place,
                charge=charge,
                multiplicity=multiplicity,
                node_columns=per_atom,
                refusal=refusal,
            )


def check_size(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuses to read too much of an array at once: few bytes of a compressed file can claim it."""
    size = math.prod(shape) * dtype.itemsize
    if size > _LARGEST:
        raise Damaged(
            f"{name}: {list(shape)} of {dtype} would take {size:,} bytes at once, and at most "
            f"{_LARGEST:,} go: leave it out, or write it in smaller parts, in the order of C"
        )


class _Kinds:
    """What each array is: `row`, `node`, or for all molecules alike `shared`, `shared node`."""

    def __init__(self, members: Mapping[str, Member], where: str):
        self._members, self._where = members, where
        self.numbers, self.positions = find(members, NUMBERS), find(members, POSITIONS)
        for what, key, known in (
            ("atomic numbers", self.numbers, NUMBERS),
            ("positions", self.positions, POSITIONS),
        ):
            if not key:
                raise UserError(
                    f"{where} has no array of {what}: call it one of {', '.join(known)}. "
                    f"Arrays: {', '.join(members) or 'none'}."
                )
        shape = members[self.positions].shape
        if len(shape) not in (2, 3) or shape[-1] != 3:
            self._refuse(self.positions, "[G, N, 3] or [atoms, 3]")
        self.flat = len(shape) == 2
        self.offsets = find(members, _OFFSETS) if self.flat else ""
        self._sizes = find(members, _SIZES) if self.flat and not self.offsets else ""
        if self.flat and not self.offsets and not self._sizes:
            raise UserError(
                f"{where}: {self.positions} is {list(shape)}, all atoms in a row, but nothing says "
                "where a molecule ends: add offsets [G + 1] or num_atoms [G]."
            )
        self.count = count(members)
        self.width = shape[0] if self.flat else shape[1]
        if not self.flat and self.width > MAX_NODES:
            self._refuse(self.positions, f"[G, N, 3] with at most {MAX_NODES} atoms")
        found = members[self.numbers].shape
        self.fixed_numbers = not self.flat and found == (self.width,)
        if found != ((shape[0],) if self.flat else shape[:2]) and not self.fixed_numbers:
            self._refuse(self.numbers, f"{list(shape[:-1])}, as {self.positions} has")
        used = {self.numbers, self.positions, self.offsets, self._sizes}
        kinds = {name: self._kind(name) for name in members if name not in used}
        self.of = {name: kind for name, kind in kinds.items() if kind}

    def sizes(self) -> np.ndarray | None:
        """[G] atoms of each molecule, of flat arrays."""
        if not self.flat:
            return None
        if self._sizes:
            sizes = self._members[self._sizes].all().reshape(-1).astype(np.int64)
        else:
            offset = self._members[self.offsets].all().astype(np.int64)
            if offset[0] != 0:
                raise UserError(f"{self._where}: {self.offsets} begins with {offset[0]}, not 0.")
            sizes = np.diff(offset)
        if sizes.max(initial=0) > _ATOMS:  # it would have to be in memory to be refused alone
            raise UserError(
                f"{self._where}: molecule {sizes.argmax() + 1} has {sizes.max()} atoms, and at "
                f"most {MAX_NODES} go: leave it out."
            )
        if sizes.min(initial=0) < 0 or sizes.sum() != self.width:
            raise UserError(
                f"{self._where}: {self.offsets or self._sizes} is about {sizes.sum()} atoms, but "
                f"{self.positions} has {self.width}: write them again."
            )
        return sizes

    def _kind(self, name: str) -> str:
        member = self._members[name]
        length, rest = (member.shape or (0,))[0], member.shape[1:]
        vector = name.lower() in VECTORS
        if self.fixed_numbers and name.lower() == "smiles":
            return "shared"  # of one molecule; ANI stores it by letters, of any number
        if member.shape and length == self.count:
            shapes = ((self.width,), (self.width, 3), (self.width, 1))
            node = not self.flat and rest in shapes and not vector and self.width > 1
            return "node" if node else "row"
        if self.flat and length == self.width and rest in ((), (1,), (3,)):
            return "node"
        if self.fixed_numbers and length == self.width and rest in ((), (3,)):
            return "shared node" if member.dtype.kind in "iufb" else ""
        if member.dtype.kind in "SUO" or np.prod(member.shape) <= 1:
            return "shared" if name.lower() == "smiles" else ""  # a remark on the whole file
        return self._refuse(name, f"of {self.count} molecules, so its first length must be this")

    def _refuse(self, name: str, wanted: str):
        raise UserError(
            f"{self._where}: {name} is {list(self._members[name].shape)}, but must be {wanted}."
        )


def _numbers(values: np.ndarray) -> np.ndarray:
    """Atomic numbers of numbers or of symbols."""
    if values.dtype.kind in "iu":
        return values.astype(int)
    if values.dtype.kind == "f":
        return np.where(np.isfinite(values), values, 0).astype(int)
    from data_pipelines.elements import symbols

    table = {symbol: number for number, symbol in enumerate(symbols())} | {"": 0}
    text = [plain(value) or "" for value in values.reshape(-1)]
    return np.array([table.get(t.strip(), _NO_ELEMENT) for t in text], int).reshape(values.shape)


def _value(value) -> Any:
    """One value of a molecule; of text that is stored by letters, the text."""
    if np.ndim(value) and np.asarray(value).dtype.kind in "SUO":
        parts = [plain(part) or "" for part in np.asarray(value).reshape(-1)]
        return ("".join(parts) if len(set(parts)) > 1 else parts[0]) or None
    if np.shape(value) == (1,):
        value = value[0]
    return plain(value)


def _drop_one(values: np.ndarray) -> np.ndarray:
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
