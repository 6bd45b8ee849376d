"""From a row of a file to a molecule: the one way, for training and for prediction.

Bonds come from the file; else from its SMILES, where the atoms stand in the order of the SMILES;
else RDKit perceives them; else distances decide, all single. Types of bonds are those of RDKit's
sanitization, whatever they came from.
"""

import dataclasses

import numpy as np

from data_pipelines import bonds as smiles_bonds
from data_pipelines.bonds import Agreement, BondType, rdkit
from data_pipelines.elements import covalent_radii
from data_pipelines.errors import check_known
from data_pipelines.molecules.making import chemistry
from data_pipelines.molecules.making.chemistry import Refused
from data_pipelines.molecules.making.geometry import GEOMETRIES, make_positions
from data_pipelines.molecules.record import MAX_NODES, Molecule, Refusal, Row

_MAX_CHARGE = 99
_MAX_ATOMS_OF_SMILES = 2_000  # reading hydrogens off a geometry takes all pairs
_TOLERANCE = 1.2  # of the sum of radii, for bonds by distance
_NO_BOND = 1.5  # of the sum of radii: no bond is longer, where atoms are where they should be
_FLAT = 1e-4  # angstrom
_LONG_HYDROGEN = 1.3  # of the sum of radii; drawings have all bonds alike
# Twice the sum of the bond orders of neutral atoms that need no second look. [119]
_PLAIN_VALENCE = np.full(119, -1)
_PLAIN_VALENCE[[1, 6, 7, 8, 9, 17, 35, 53]] = (2, 8, 6, 4, 2, 2, 2, 2)
_REMEDY = "Set the geometry to 'mmff' (config.data.geometry), or give 3-D coordinates."


def make_molecule(row: Row, geometry: str) -> Molecule | Refusal:
    """The molecule of a row, or why there is none; a bad row raises nothing.

    Args:
      row: of a reader.
      geometry: of `GEOMETRIES`. `file` takes the positions of the row. With the others they are
        made anew, also where the row has some; atoms keep the order of the file, or else of the
        SMILES with the hydrogens after them.

    Raises:
      UserError: an unknown geometry, or one whose package is not installed.
    """
    check_known("geometry:", geometry, GEOMETRIES)
    if row.refusal is not None:
        return row.refusal
    try:
        if row.atomic_numbers is None or row.positions is None:
            return _of_smiles(row, geometry)
        found, graph = _of_file(row, again=geometry != "file")
        return found if geometry == "file" else _made_again(found, graph, geometry)
    except Refused as refused:
        return refused.refusal
    except (ValueError, RuntimeError, LookupError, ArithmeticError) as error:  # RDKit's
        return Refusal("bad_row", f"No molecule can be made of it: {error!r}. Correct the row.")


# --- from SMILES -----------------------------------------------------------------------------


def _of_smiles(row: Row, geometry: str) -> Molecule:
    if not row.smiles.strip():
        raise Refused("bad_row", "It has neither SMILES nor coordinates: give one of them.")
    molecule = chemistry.from_smiles(row.smiles)
    if geometry == "file":
        has = "flat drawing and no 3-D" if row.bonds is not None else "SMILES and no"
        raise Refused("no_conformer", f"It has a {has} coordinates. {_REMEDY}")
    _check_size(molecule.GetNumAtoms())
    numbers = chemistry.numbers_of(molecule)
    charge, multiplicity, notes = _electrons(row, numbers, molecule)
    positions, more = make_positions(molecule, geometry, charge, multiplicity)
    bonds = chemistry.bonds_of(molecule)
    return Molecule(
        number=row.number,
        atomic_numbers=numbers.astype(np.uint8),
        positions=positions.astype(np.float32),
        bonds=bonds,
        charge=charge,
        multiplicity=multiplicity,
        geometry=geometry,
        bonds_from="smiles",
        smiles=_canonical(molecule),
        notes=(*notes, *_fragments(len(numbers), bonds), *more),
    )


def _canonical(molecule) -> str:
    return rdkit().MolToSmiles(rdkit().RemoveHs(molecule))


# --- from atoms with positions ---------------------------------------------------------------


def _of_file(row: Row, again: bool):
    """(The molecule as the file has it, RDKit's of the same atoms or None).

    `again`: positions are made anew, so a drawing will do.
    """
    numbers = np.asarray(row.atomic_numbers, np.int64)
    positions = np.asarray(row.positions, np.float64)
    _check_size(len(numbers))
    if positions.shape != (len(numbers), 3):
        raise Refused(
            "bad_row",
            f"It has {len(numbers)} atoms and coordinates of shape {list(positions.shape)}: give "
            "x, y and z of each.",
        )
    chemistry.check_numbers(numbers)
    finite = np.isfinite(positions)
    if not finite.all():
        k = int(finite.all(axis=1).argmin())
        raise Refused(
            "nonfinite",
            f"Atom {k + 1} is at {positions[k].tolist()}: a coordinate is no number. Correct it.",
        )
    if not again and len(numbers) > 1 and (np.abs(positions - positions[0]) < _FLAT).all():
        raise Refused("no_conformer", f"All its atoms are at one point. {_REMEDY}")
    if row.bonds is not None:
        numbers, positions, bonds, graph, notes = _with_bonds(row, numbers, positions, again)
        origin, smiles = "file", row.smiles
    else:
        bonds, graph, origin, smiles, notes = _without_bonds(row, numbers, positions)
    charge, multiplicity, more = _electrons(row, numbers, graph)
    molecule = Molecule(
        number=row.number,
        atomic_numbers=numbers.astype(np.uint8),
        positions=positions.astype(np.float32),
        bonds=bonds,
        charge=charge,
        multiplicity=multiplicity,
        geometry="file",
        bonds_from=origin,
        smiles=smiles,
        notes=(*more, *_fragments(len(numbers), bonds), *notes),
    )
    return molecule, graph


def _with_bonds(row: Row, numbers, positions, again: bool):
    """(numbers, positions, bonds, RDKit's or None, notes); adds hydrogens that are missing."""
    bonds = row.bonds if row.is_perceived else _bonds_of_file(row, len(numbers))
    if not again and _is_drawing(numbers, positions, bonds):
        raise Refused("no_conformer", f"Its coordinates are a flat drawing (z = 0). {_REMEDY}")
    charge = row.charge or 0
    if row.is_perceived or (charge == 0 and _is_plain(numbers, bonds)):
        return numbers, positions, bonds.astype(np.uint16), None, ()
    states = row.atom_states
    graph = chemistry.from_bonds(numbers, bonds, charge, positions, states_Nx3=states)
    if graph is None and states is not None and states[:, 1].any():
        raise Refused(
            "bad_row",
            "It lacks hydrogens, and its charge or bonds are such that RDKit cannot say where they "
            "belong: give all atoms, or correct them.",
        )
    if graph is None:
        note = "RDKit refuses the bonds of the file: they are kept as they are"
        return numbers, positions, bonds.astype(np.uint16), None, (note,)
    missing = sum(atom.GetTotalNumHs() for atom in graph.GetAtoms())
    if not missing:
        return numbers, positions, chemistry.bonds_of(graph), graph, ()
    if missing == (row.multiplicity or 1) - 1:  # free valences are its unpaired electrons
        graph = chemistry.from_bonds(numbers, bonds, charge, positions, implicit=False)
        return numbers, positions, chemistry.bonds_of(graph), graph, ()
    if not again and len(numbers) > 2 and np.abs(positions[:, 2]).max() < _FLAT:
        raise Refused(
            "no_conformer",
            f"It lacks hydrogens and lies flat (z = 0), so it is a drawing. {_REMEDY}",
        )
    graph = rdkit().AddHs(graph, addCoords=True)
    _check_size(graph.GetNumAtoms())
    return (
        chemistry.numbers_of(graph),
        graph.GetConformer().GetPositions(),
        chemistry.bonds_of(graph),
        graph,
        (f"{missing} missing hydrogens added",),
    )


def _bonds_of_file(row: Row, num_atoms: int) -> np.ndarray:
    """[b, 3] int64 rows (i, j, BondType), i < j, ascending."""
    a, b, kind = np.asarray(row.bonds, np.int64).reshape(-1, 3).T
    i, j = np.minimum(a, b), np.maximum(a, b)
    pair = i * num_atoms + j
    order = pair.argsort()
    good = (i >= 0) & (i < j) & (j < num_atoms) & (kind > 0) & (kind <= BondType.AROMATIC)
    good[order[1:]] &= np.diff(pair[order]) > 0  # each once
    if not good.all():
        k = good.argmin()
        raise Refused(
            "bad_row",
            f"Bond {a[k]}-{b[k]} of type {kind[k]} cannot be, or is there twice: it has "
            f"{num_atoms} atoms, counted from 0, and types are 1 to 4. Correct it.",
        )
    return np.stack([i, j, kind], axis=1)[order]


def _is_plain(numbers, bonds) -> bool:
    """All hydrogens there, and nothing in it that could be aromatic, charged or a radical."""
    if not np.array_equal(chemistry.valences(len(numbers), bonds), _PLAIN_VALENCE[numbers]):
        return False
    kinds = bonds[:, 2]
    if (kinds == BondType.AROMATIC).any():
        return False
    # Aromatic rings have a double bond whose ends both have other heavy neighbours.
    double = kinds == BondType.DOUBLE
    if not double.any():
        return True
    heavy = bonds[(numbers[bonds[:, 0]] > 1) & (numbers[bonds[:, 1]] > 1), :2]
    degree = np.bincount(heavy.ravel(), minlength=len(numbers))
    return not (degree[bonds[double, :2]] > 1).all(axis=1).any()


def _is_drawing(numbers, positions, bonds) -> bool:
    """A flat geometry that no molecule has: four neighbours in a plane, or long bonds to H."""
    if len(numbers) < 2 or np.abs(positions[:, 2]).max() > _FLAT:
        return False
    degree = np.bincount(bonds[:, :2].ravel(), minlength=len(numbers))
    if (degree[np.isin(numbers, (6, 7, 14, 15))] > 3).any():
        return True
    i, j = bonds[:, 0], bonds[:, 1]
    hydrogen = (numbers[i] == 1) | (numbers[j] == 1)
    length = np.linalg.norm(positions[i] - positions[j], axis=1)
    usual = covalent_radii()[numbers[i]] + covalent_radii()[numbers[j]]
    return bool((length > _LONG_HYDROGEN * usual)[hydrogen].any())


def _without_bonds(row: Row, numbers, positions):
    """(bonds, RDKit's or None, bonds_from, smiles, notes)."""
    notes = ()
    if row.smiles:
        graph, agreement = _by_smiles(row.smiles, numbers, positions)
        if graph is not None:
            if agreement == Agreement.HEAVY_GRAPH_DIFFERS:
                notes = ("distances say other bonds than the SMILES, which is kept",)
            return chemistry.bonds_of(graph), graph, "smiles", _canonical(graph), notes
        notes = ("the SMILES does not fit the atoms in their order: it is not used",)
    graph = chemistry.perceive(numbers, positions, row.charge or 0)
    if graph is not None:
        rdkit().AssignStereochemistryFrom3D(graph)
        return chemistry.bonds_of(graph), graph, "geometry", "", notes
    note = "RDKit finds no bonds: pairs by distance, all single"
    return _bonds_by_distance(numbers, positions), None, "distances", "", (*notes, note)


def _by_smiles(smiles: str, numbers, positions):
    """(RDKit's molecule of the SMILES, its atoms in the order of the file, or None; agreement)."""
    try:
        described = chemistry.from_smiles(smiles)
    except Refused:
        return None, None
    kinds = {bond.GetBondTypeAsDouble() for bond in described.GetBonds()}
    if len(numbers) > _MAX_ATOMS_OF_SMILES or not kinds <= {1.0, 1.5, 2.0, 3.0}:
        return None, None
    bonds, agreement = smiles_bonds.find_bonds(smiles, numbers, positions)
    if agreement == Agreement.SMILES_UNUSABLE:
        return None, None
    ends = bonds[:, :2].astype(np.int64).T
    length = np.linalg.norm(np.subtract(*positions[ends]), axis=1)
    if (length > _NO_BOND * covalent_radii()[numbers[ends]].sum(axis=0)).any():
        return None, None  # its atoms stand in another order than those of the file
    place = chemistry.places(numbers, bonds, described, np.flatnonzero(numbers > 1))
    if place is None:
        return None, None
    return rdkit().RenumberAtoms(described, place.tolist()), agreement


def _bonds_by_distance(numbers, positions) -> np.ndarray:
    from scipy.spatial import cKDTree

    radii = covalent_radii()[numbers]
    pairs = cKDTree(positions).query_pairs(2 * _TOLERANCE * radii.max(), output_type="ndarray")
    i, j = pairs.min(axis=1), pairs.max(axis=1)
    near = np.linalg.norm(positions[i] - positions[j], axis=1) < _TOLERANCE * (radii[i] + radii[j])
    rows = np.stack([i, j, np.full(len(i), int(BondType.SINGLE))], axis=1)[near]
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))].astype(np.uint16)


def _made_again(found: Molecule, graph, geometry: str) -> Molecule:
    """The same molecule, atoms in the same order, with positions that are made."""
    if graph is None and found.bonds_from != "distances":
        graph = chemistry.graph_of(found)
    if graph is None:
        raise Refused(
            "no_conformer",
            "Its bonds are not known well enough to make a geometry: give its SMILES or an SDF, or "
            "set the geometry to 'file'.",
        )
    positions, notes = make_positions(graph, geometry, found.charge, found.multiplicity)
    return dataclasses.replace(
        found,
        positions=positions.astype(np.float32),
        geometry=geometry,
        notes=(*found.notes, *notes),
    )


# --- what all have in common -----------------------------------------------------------------


def _check_size(num_atoms: int) -> None:
    if num_atoms > MAX_NODES:
        raise Refused(
            "too_large", f"It has {num_atoms} atoms, and at most {MAX_NODES} go: leave it out."
        )
    if num_atoms == 0:
        raise Refused("bad_row", "It has no atoms: leave the row out.")


def _electrons(row: Row, numbers, graph) -> tuple[int, int, tuple[str, ...]]:
    """(charge, multiplicity, notes): of the file, else of RDKit's molecule, else the lowest."""
    charge, multiplicity = row.charge, row.multiplicity
    if charge is None:
        charge = 0 if graph is None else rdkit().GetFormalCharge(graph)
    electrons = int(numbers.sum()) - charge
    if (
        electrons < 0
        or abs(charge) > _MAX_CHARGE
        or (multiplicity is not None and multiplicity < 1)
    ):
        raise Refused(
            "charge",
            f"Charge {charge} and multiplicity {multiplicity} cannot be with nuclei of charge "
            f"{electrons + charge}: correct them.",
        )
    odd = electrons % 2
    if multiplicity is None:
        radicals = 0 if graph is None else sum(a.GetNumRadicalElectrons() for a in graph.GetAtoms())
        multiplicity = 1 + (radicals if radicals % 2 == odd else odd)
    notes = ("an odd number of electrons",) if odd else ()
    if multiplicity % 2 == odd:
        notes = (*notes, f"charge {charge} and multiplicity {multiplicity} do not go together")
    return charge, multiplicity, notes


def _fragments(num_atoms: int, bonds) -> tuple[str, ...]:
    pieces = chemistry.num_fragments(num_atoms, bonds)
    return (f"{pieces} fragments",) if pieces > 1 else ()
