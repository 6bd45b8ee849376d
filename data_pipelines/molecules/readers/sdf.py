"""SDF: cut into records at `$$$$`; each record is then parsed by RDKit, anywhere.

A record keeps its text, so that it can be written out as it was.

Two-dimensional records (all z are 0, and the header does not say 3D) have a SMILES and no
positions. A record that lacks hydrogens keeps the positions that the file gives: its SMILES has
more hydrogens than its atoms, and `row.text` can be parsed again to add them.
"""

import functools
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from data_pipelines.bonds import BondType
from data_pipelines.molecules.readers.fields import (
    LARGEST_RECORD,
    Damaged,
    charge_and_multiplicity,
    clean,
    open_text,
    too_large,
    union,
)
from data_pipelines.molecules.record import Refusal, Row

_CHUNK = 1 << 20  # characters read at a time
_NAME = re.compile(r"^>[^\n<]*<([^\n]*)>[^\n]*$", re.MULTILINE)
TITLE = "_Name"  # of the first line of a record, as RDKit calls it
# Twice the order that RDKit gives -> type of the edge; 0 for all others and what is larger.
_TYPE_OF_TWICE_ORDER = np.zeros(8, np.uint16)
_TYPE_OF_TWICE_ORDER[[2, 3, 4, 6]] = (
    BondType.SINGLE,
    BondType.AROMATIC,
    BondType.DOUBLE,
    BondType.TRIPLE,
)


def read(path: pathlib.Path, smiles_column: str) -> Iterator[Row]:
    """Rows with a number and the text of the record, without its `$$$$`."""
    del smiles_column  # a record has its own bonds
    number = 0
    for number, (text, whole) in enumerate(_records(path), 1):
        # A file with one molecule and no properties is a mol file: it ends without $$$$.
        if whole or (number == 1 and "\nM  END" in text and "\n>" not in text):
            yield Row(number, text=text)
        elif number == 1:
            raise Damaged("the file ends before its first $$$$")
        else:
            message = "the file ends within this record, before its $$$$: it is cut off"
            yield Row(number, text=text, refusal=Refusal("bad_row", message))


def columns(path: pathlib.Path) -> tuple[str, ...]:
    """Names of all properties in the file; reads it."""
    return union(properties(text) for text, _ in _records(path))


def _records(path: pathlib.Path) -> Iterator[tuple[str, bool]]:
    """(Text of a record, whether its `$$$$` came)."""
    with open_text(path) as stream:
        rest = ""
        while chunk := stream.read(_CHUNK):
            # The last line may go on in the next chunk.
            complete = chunk.rfind("\n") + 1
            if not complete:
                rest += chunk
            else:
                *records, last = _cut(rest + chunk[:complete])
                yield from ((record, True) for record in records)
                rest = last + chunk[complete:]
            if len(rest) > LARGEST_RECORD:
                raise too_large()
        *records, last = _cut(rest)
        yield from ((record, True) for record in records)
        if last.strip():
            yield last, False


def _cut(text: str) -> list[str]:
    """Whole records, and last what no `$$$$` ends; the lines that begin so are left out."""
    *records, last = f"\n{text}".split("\n$$$$")  # an expression is slower
    return [f"{piece}\n".partition("\n")[2] for piece in records] + [last.partition("\n")[2]]


def parse(row: Row, need: str) -> Row:
    """The row of one that has only a number and a text; `need` of `readers.NEEDS`."""
    if row.refusal:
        return row
    if need == "columns":
        return Row(row.number, properties(row.text), text=row.text)
    return parse_sdf_block(row.number, row.text, smiles=need == "all")


def parse_sdf_block(number: int, text: str, smiles: bool = True) -> Row:
    """The row of one record.

    Args:
      number: of the row.
      text: of the record, without its `$$$$`.
      smiles: whether a record with positions gets one too: it takes a third of the time.
    """
    named = properties(text)
    try:
        found = _molecule(text, smiles)
    except Exception as error:  # RDKit's own, of several classes
        message = f"RDKit cannot read the record: {' '.join(str(error).split())}"
        return Row(number, named, text=text, refusal=Refusal("bad_row", message))
    charge, multiplicity = charge_and_multiplicity(named)
    of_bonds = found.pop("charge")
    is_perceived = found.pop("is_whole") and charge in (None, of_bonds) and multiplicity is None
    return Row(
        number,
        named,
        # The bonds say it, unless the record states it.
        charge=of_bonds if charge is None else charge,
        multiplicity=multiplicity,
        is_perceived=is_perceived,
        text=text,
        **found,
    )


def properties(text: str) -> dict[str, str | None]:
    """The named values of a record, and its title if it has one."""
    title = text.partition("\n")[0].strip()
    found: dict[str, str | None] = {TITLE: title} if title else {}
    start = text.find("\n>", max(text.find("\nM  END"), 0))
    if start < 0:
        return found
    _, *parts = _NAME.split(text[start + 1 :])
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        found[name] = value.strip("\n") or None
    return found


@functools.cache
def _bonds_alone() -> int:
    """The steps of RDKit's sanitization that bonds, charges, hydrogens and radicals depend on.

    The others, and the stereochemistry that a SMILES needs, take a quarter of the reading.
    """
    from rdkit.Chem import SanitizeFlags as step

    others = step.SANITIZE_SETCONJUGATION | step.SANITIZE_SETHYBRIDIZATION
    others |= step.SANITIZE_CLEANUPCHIRALITY | step.SANITIZE_CLEANUPATROPISOMERS
    return int(step.SANITIZE_ALL & ~others)


def _molecule(text: str, smiles: bool) -> dict:
    """What RDKit reads of a record; raises what it raises."""
    from rdkit import Chem, rdBase  # slow to import

    end = text.find("M  END")
    if end < 0:
        raise ValueError("it has no 'M  END'")
    block = clean(text[: end + 7])
    with rdBase.BlockLogs():
        molecule = Chem.MolFromMolBlock(block, removeHs=False) if smiles else None
        if molecule is None:
            molecule = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
            if molecule is None:
                raise ValueError("its table of atoms and bonds is not as the format says")
            Chem.SanitizeMol(molecule, _bonds_alone())  # raises, and says why
        positions = molecule.GetConformer().GetPositions()
        if not positions[:, 2].any() and "3D" not in block.split("\n", 2)[1][20:22]:
            positions = None
        if positions is None and not smiles:
            return _molecule(text, smiles=True)
        found = Chem.MolToSmiles(Chem.RemoveHs(molecule, sanitize=False)) if smiles else ""
    # Not over GetAtoms(), whose items cost three times as much.
    atoms = [molecule.GetAtomWithIdx(k) for k in range(molecule.GetNumAtoms())]
    order = Chem.GetAdjacencyMatrix(molecule, useBO=True)
    i, j = order.nonzero()
    first = i < j
    i, j = i[first], j[first]
    bonds = np.empty((len(i), 3), int)
    bonds[:, 0], bonds[:, 1] = i, j
    bonds[:, 2] = _TYPE_OF_TWICE_ORDER.take((2 * order[i, j]).astype(int), mode="clip")
    if not bonds[:, 2].all():
        raise ValueError("a bond is neither single, double, triple nor aromatic")
    is_whole = molecule.GetNumAtoms(onlyExplicit=False) == len(atoms) and not any(
        atom.GetNumRadicalElectrons() for atom in atoms
    )
    charge = Chem.GetFormalCharge(molecule)
    states = None
    if charge or not is_whole:
        states = [
            (a.GetFormalCharge(), a.GetTotalNumHs(), a.GetNumRadicalElectrons()) for a in atoms
        ]
    return {
        "atomic_numbers": np.array([atom.GetAtomicNum() for atom in atoms], int),
        "positions": positions,
        "bonds": bonds,
        "charge": charge,
        "atom_states": None if states is None else np.array(states, int),
        "smiles": found,
        "is_whole": is_whole,
    }
