"""What people have in their hands, as rows: SMILES, `ase.Atoms`, RDKit's molecules."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.molecules.readers.ase_files import row_of_atoms
from data_pipelines.molecules.readers.sdf import parse_sdf_block
from data_pipelines.molecules.record import Molecule, Refusal, Row

_LARGEST_V2000 = 999  # atoms of a mol block of the old format


def items_of(molecules: Iterable | str | Any) -> list[Row | Molecule]:
    """Each input as a row, numbered from 1; what is one already stays as it is.

    Raises:
      UserError: something of another type.
    """
    if isinstance(molecules, str | Row | Molecule) or _is_atoms(molecules) or _is_mol(molecules):
        molecules = [molecules]
    return [_item_of(item, number) for number, item in enumerate(molecules, 1)]


def _item_of(item: Any, number: int) -> Row | Molecule:
    if isinstance(item, Row | Molecule):
        return item
    if isinstance(item, str):
        return Row(number, smiles=item)
    if _is_atoms(item):
        return row_of_atoms(number, item)
    if _is_mol(item):
        from rdkit import Chem

        large = item.GetNumAtoms() > _LARGEST_V2000
        try:
            row = parse_sdf_block(number, Chem.MolToMolBlock(item, forceV3000=large))
        except (ValueError, RuntimeError) as error:  # RDKit's, such as of kekulization
            message = f"RDKit cannot write it: {' '.join(str(error).split())}"
            return Row(number, refusal=Refusal("bad_row", message))
        if row.positions is None:
            return row
        # A record has four decimals.
        return dataclasses.replace(row, positions=item.GetConformer().GetPositions())
    if item is None:  # what RDKit gives for a SMILES that it cannot read
        return Row(number, refusal=Refusal("bad_row", "is None: there is no molecule."))
    raise UserError(
        f"Input {number} is a {type(item).__name__}: give SMILES, ase.Atoms, RDKit molecules, or "
        "rows of data_pipelines.molecules.readers."
    )


def _is_atoms(item: Any) -> bool:
    # Who has an Atoms has imported ase: nothing is imported only to look.
    return "ase" in sys.modules and isinstance(item, sys.modules["ase"].Atoms)


def _is_mol(item: Any) -> bool:
    chem = sys.modules.get("rdkit.Chem")
    return chem is not None and isinstance(item, chem.Mol)


def geometry_for(row: Row, trained_on: str) -> str:
    """How the positions of a row are made for a model: as in its training, if that can be.

    Args:
      row: of a file.
      trained_on: of `geometry.GEOMETRIES`, or `file+mmff` for both. Positions of a file cannot be
        made of a SMILES: `mmff` then.
    """
    if not trained_on.startswith("file"):
        return trained_on
    if row.positions is not None:
        return "file"
    return trained_on.partition("+")[2] or "mmff"


def table(columns: Mapping[str, np.ndarray], units: Mapping[str, str]):
    """A pandas `DataFrame` with `attrs["units"]`; without pandas a dict of arrays."""
    try:
        import pandas
    except ImportError:
        return dict(columns)
    frame = pandas.DataFrame(dict(columns))
    frame.attrs["units"] = dict(units)
    return frame
