"""Trajectories and databases of ase, and what its atoms say.

ase moves energies, forces and dipoles into `atoms.calc.results` and leaves other names in
`atoms.info`: both are read, as is what a database keeps beside its atoms.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from data_pipelines.molecules.readers.fields import (
    VECTORS,
    Damaged,
    charge_and_multiplicity,
    plain,
    union,
)
from data_pipelines.molecules.record import Refusal, Row

_OF_THE_MOLECULE = {"numbers", "positions"}
# Of a database: of the row, not of the molecule.
_BOOKKEEPING = {"key_value_pairs", "data", "unique_id"}


def read(path: pathlib.Path, smiles_column: str) -> Iterator[Row]:
    """Rows of all frames."""
    del smiles_column
    for number, atoms in enumerate(_atoms(path), 1):
        yield row_of_atoms(number, atoms)


def columns(path: pathlib.Path) -> tuple[str, ...]:
    """Names of all values; reads the file."""
    return union(row_of_atoms(0, atoms).columns for atoms in _atoms(path))


def _atoms(path: pathlib.Path) -> Iterator:
    try:
        yield from _of_database(path) if path.suffix.lower() == ".db" else _of_trajectory(path)
    except Exception as error:  # ase raises what its readers meet, of any class
        raise Damaged(f"ase says {type(error).__name__}: {error}") from error


def _of_trajectory(path: pathlib.Path) -> Iterator:
    import ase.io

    return ase.io.iread(path, index=":", format="traj")


def _of_database(path: pathlib.Path) -> Iterator:
    import ase.db  # ase.io leaves out what the database keeps beside the atoms

    with ase.db.connect(path, type="db") as database:
        for row in database.select():
            atoms = row.toatoms(add_additional_information=True)
            if "initial_charges" not in atoms.arrays:
                # ase stores the sum of the atoms' charges there, whatever it was given.
                atoms.info.get("key_value_pairs", {}).pop("charge", None)
            yield atoms


def row_of_atoms(number: int, atoms, text: str = "") -> Row:
    """The row of `ase.Atoms`.

    Args:
      number: of the row.
      atoms: values in `info`, of a database in its `key_value_pairs` and `data`, and results of a
        calculator that has them already.
      text: as the file has it.
    """
    info = {k: v for k, v in atoms.info.items() if k not in _BOOKKEEPING}
    info |= atoms.info.get("key_value_pairs", {}) | atoms.info.get("data", {})
    results = getattr(atoms.calc, "results", None) or {}
    size = len(atoms)
    per_atom = {k: v for k, v in atoms.arrays.items() if k not in _OF_THE_MOLECULE}
    columns = {}
    # SchNetPack keeps one number as an array of one.
    info = {k: v[0] if np.shape(v) == (1,) else v for k, v in info.items()}
    for name, value in (info | results).items():
        value = plain(value)
        if name not in VECTORS and np.shape(value) in ((size,), (size, 3)) and size:
            per_atom[name] = np.asarray(value)
        else:
            columns[name] = value
    refusal = None
    if atoms.pbc.any():
        refusal = Refusal(
            "bad_row",
            'it is periodic, and demetar reads single molecules: write pbc="F F F" if it is one '
            "molecule in a box",
        )
    charge, multiplicity = charge_and_multiplicity(columns)
    return Row(
        number,
        columns,
        smiles=str(columns.get("smiles") or ""),
        atomic_numbers=atoms.numbers.astype(int),
        positions=atoms.positions,
        charge=charge,
        multiplicity=multiplicity,
        node_columns=per_atom,
        text=text,
        refusal=refusal,
    )
