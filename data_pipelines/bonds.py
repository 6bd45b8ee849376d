"""Chemical bonds of a molecule in file order, with types, from its SMILES and geometry.

For files that hold no bonds, such as QM9's, but whose heavy atoms stand in the order of the
SMILES: RDKit's reading of the SMILES gives the bond types; hydrogens belong to the nearest
heavy atom. Whether the geometry agrees is checked for every molecule:

* hydrogens per heavy atom or the order of elements differ: the SMILES does not describe
  this geometry (a proton moved, say), and the bonds are taken from distances, all single;
* only the heavy-atom graph differs (a long or strained bond): the SMILES is kept.

Both counts go into the data passport.
"""

import enum
import functools

import numpy as np

from data_pipelines.elements import covalent_radii

_TOLERANCE = 1.2  # a pair closer than this times the sum of radii counts as bonded


class BondType(enum.IntEnum):
    """Edge type of a graph; NONE is a pair of atoms without a chemical bond."""

    NONE = 0
    SINGLE = 1
    DOUBLE = 2
    TRIPLE = 3
    AROMATIC = 4


class Agreement(enum.IntEnum):
    """How a molecule's SMILES and geometry compare."""

    AGREE = 0
    HEAVY_GRAPH_DIFFERS = 1  # SMILES kept
    SMILES_UNUSABLE = 2  # bonds from distances, all single


# BondType by twice the bond order that RDKit gives: 1, 1.5 (aromatic), 2, 3.
_TYPE_OF_TWICE_ORDER = np.zeros(7, np.uint8)
_TYPE_OF_TWICE_ORDER[[2, 3, 4, 6]] = (
    BondType.SINGLE,
    BondType.AROMATIC,
    BondType.DOUBLE,
    BondType.TRIPLE,
)


def find_bonds(
    smiles: str, atomic_numbers_N: np.ndarray, positions_Nx3: np.ndarray
) -> tuple[np.ndarray, Agreement]:
    """Bonds `[b, 3]` uint16 rows (i, j, BondType) with i < j, ascending, and the agreement."""
    difference = positions_Nx3[:, None] - positions_Nx3[None]
    distance_NxN = np.sqrt(np.einsum("ijc,ijc->ij", difference, difference))
    radius_N = covalent_radii()[atomic_numbers_N]
    near_NxN = np.triu(distance_NxN < _TOLERANCE * (radius_N[:, None] + radius_N[None]), 1)
    heavy = np.flatnonzero(atomic_numbers_N > 1)
    hydrogen = np.flatnonzero(atomic_numbers_N == 1)
    from_smiles = _heavy_atoms_of_smiles(smiles)
    if from_smiles is not None and np.array_equal(from_smiles[0], atomic_numbers_N[heavy]):
        _, hydrogens, order = from_smiles
        owner = distance_NxN[np.ix_(hydrogen, heavy)].argmin(axis=1)
        if np.array_equal(np.bincount(owner, minlength=len(heavy)), hydrogens):
            i, j = np.nonzero(np.triu(order))
            kind = _TYPE_OF_TWICE_ORDER[(2 * order[i, j]).astype(int)]
            owner = heavy[owner]
            ends = np.concatenate([heavy[i], owner]), np.concatenate([heavy[j], hydrogen])
            kinds = np.concatenate([kind, np.full(len(hydrogen), BondType.SINGLE)])
            bonds = np.stack([np.minimum(*ends), np.maximum(*ends), kinds], axis=1)
            bonds = bonds[np.lexsort((bonds[:, 1], bonds[:, 0]))].astype(np.uint16)
            same = np.array_equal(near_NxN[np.ix_(heavy, heavy)], np.triu(order) > 0)
            return bonds, Agreement.AGREE if same else Agreement.HEAVY_GRAPH_DIFFERS
    pairs = np.argwhere(near_NxN)
    types = np.full((len(pairs), 1), BondType.SINGLE)
    return np.concatenate([pairs, types], axis=1).astype(np.uint16), Agreement.SMILES_UNUSABLE


def chemistry_of_atoms(
    smiles: str, atomic_numbers_N: np.ndarray, bonds_bx3: np.ndarray
) -> np.ndarray:
    """[N, 5] uint8: aromatic, sp, sp2, sp3 (0 or 1 each), number of hydrogen neighbours.

    The first four are RDKit's of the heavy atoms of the SMILES. They are 0 of hydrogens, and
    everywhere if the SMILES does not fit the bonds (`Agreement.SMILES_UNUSABLE`).

    Args:
      smiles: of the molecule.
      atomic_numbers_N: [N].
      bonds_bx3: of `find_bonds`.
    """
    ends = np.concatenate([bonds_bx3[:, :2], bonds_bx3[:, 1::-1]]).astype(np.int64)
    has_hydrogen = atomic_numbers_N[ends[:, 1]] == 1
    table_Nx5 = np.zeros((len(atomic_numbers_N), 5), np.uint8)
    table_Nx5[:, 4] = np.bincount(ends[has_hydrogen, 0], minlength=len(atomic_numbers_N))
    heavy = np.flatnonzero(atomic_numbers_N > 1)
    molecule = rdkit().MolFromSmiles(smiles)
    atoms = [] if molecule is None else list(molecule.GetAtoms())
    described = [(a.GetAtomicNum(), a.GetTotalNumHs()) for a in atoms]
    if described == list(zip(atomic_numbers_N[heavy], table_Nx5[heavy, 4], strict=True)):
        for row, atom in zip(heavy, atoms, strict=True):
            kind = atom.GetHybridization().name
            table_Nx5[row, :4] = [atom.GetIsAromatic(), kind == "SP", kind == "SP2", kind == "SP3"]
    return table_Nx5


@functools.cache
def rdkit():
    """The module `rdkit.Chem`, silent."""
    from rdkit import Chem, RDLogger  # takes 0.1 s to import, and is needed only to prepare

    RDLogger.DisableLog("rdApp.*")
    return Chem


def _heavy_atoms_of_smiles(smiles: str):
    """(atomic numbers, hydrogens per atom, bond orders [n, n]), or None if unreadable."""
    molecule = rdkit().MolFromSmiles(smiles)
    if molecule is None:
        return None
    atoms = [(a.GetAtomicNum(), a.GetTotalNumHs()) for a in molecule.GetAtoms()]
    numbers, hydrogens = np.array(atoms).reshape(-1, 2).T
    return numbers, hydrogens, rdkit().GetAdjacencyMatrix(molecule, useBO=True)
