"""What passes between the parts of this room: rows of a file, molecules, refusals.

    reader -> Row --make_molecule--> Molecule, or a Refusal that says why not

Training and prediction go the same way; a bad row is a value, never an exception, so that it can
neither stop nor change its neighbours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# `status` of a row in the output of a prediction; "ok" is all that has a prediction.
STATUSES = (
    "ok",
    "bad_row",  # the file is damaged there, or says nothing that can be read
    "bad_smiles",
    "no_conformer",  # no geometry could be made of the SMILES
    "element",  # that the model has not learned
    "charge",  # that the model has not learned
    "too_large",
    "nonfinite",  # a coordinate or a prediction that is no number
)


MAX_NODES = 65_535  # numbers of nodes are 16 bits wide in bonds and edges

BLANK = ("", "nan", "na", "n/a", "none", "null")  # what a missing label is written as


class Refusal(NamedTuple):
    """Why a row has no molecule, or no prediction.

    Attributes:
      status: of `STATUSES`.
      message: for a person: the thing, its value, the remedy.
    """

    status: str
    message: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file, as the file says it; nothing is checked.

    Attributes:
      number: from 1, in the order of the file.
      columns: name -> value as read: text, a number, or None where blank.
      smiles: "" where the file gives none.
      atomic_numbers: [n] int, or None.
      positions: [n, 3] float64, angstrom, or None.
      bonds: [b, 3] int rows (i, j, BondType) with i < j, or None where the file gives none.
      charge: of the molecule, or None where the file does not say.
      multiplicity: 2 S + 1, or None where the file does not say.
      atom_states: [n, 3] int: of each atom its formal charge, its hydrogens that are no atoms here,
        and its unpaired electrons; None where the file does not say.
      is_perceived: whether RDKit has read it: its bonds are sanitized, i < j, ascending, its charge
        is theirs, and no hydrogen or electron is missing.
      node_columns: name -> [n] or [n, 3], what the file says of each atom.
      text: the row as it stands in the file, for formats that are written out again as they were.
      refusal: why the reader could not read it.
    """

    number: int
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    smiles: str = ""
    atomic_numbers: np.ndarray | None = None
    positions: np.ndarray | None = None
    bonds: np.ndarray | None = None
    charge: int | None = None
    multiplicity: int | None = None
    atom_states: np.ndarray | None = None
    is_perceived: bool = False
    node_columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    text: str = ""
    refusal: Refusal | None = None


@dataclasses.dataclass(frozen=True)
class Molecule:
    """One molecule that a graph can be made of.

    Attributes:
      number: of its row.
      atomic_numbers: [n] uint8.
      positions: [n, 3] float32, angstrom.
      bonds: [b, 3] uint16 rows (i, j, BondType) with i < j, ascending.
      charge: 0 where nothing says otherwise.
      multiplicity: 2 S + 1; the lowest that the number of electrons allows where nothing says
        otherwise.
      geometry: of `geometry.GEOMETRIES`: how the positions were made.
      bonds_from: `file`, `smiles`, `geometry` (perceived by RDKit) or `distances`.
      smiles: canonical, without explicit hydrogens; "" where there are only positions.
      notes: what a person should know of it, such as two fragments.
    """

    number: int
    atomic_numbers: np.ndarray
    positions: np.ndarray
    bonds: np.ndarray
    charge: int
    multiplicity: int
    geometry: str
    bonds_from: str
    smiles: str = ""
    notes: tuple[str, ...] = ()
