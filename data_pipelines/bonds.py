"""Chemical bonds of a molecule in file order, with types, from its SMILES and geometry.

QM9's files hold no bonds. Its heavy atoms stand in the order of the SMILES, so RDKit's
reading of the SMILES gives the bond types; hydrogens belong to the nearest heavy atom.
Whether the geometry agrees is checked for every molecule:

* hydrogens per heavy atom or the order of elements differ: the SMILES does not describe
  this geometry (a proton moved, say), and the bonds are taken from distances, all single;
* only the heavy-atom graph differs (a long or strained bond): the SMILES is kept.

Both counts go into the data passport.
"""

import enum

import numpy as np

# Single-bond covalent radii, angstrom (Cordero et al., Dalton Trans. 2008), of H C N O F.
_RADII = np.zeros(10)
_RADII[[1, 6, 7, 8, 9]] = 0.31, 0.76, 0.71, 0.66, 0.57
_TOLERANCE = 1.2  # a pair closer than this times the sum of radii counts as bonded


class BondType(enum.IntEnum):
    """Edge type of a graph; NONE is a pair of atoms without a chemical bond."""

    NONE = 0
    SINGLE = 1
    DOUBLE = 2
    TRIPLE = 3
    AROMATIC = 4


NUM_BOND_TYPES = len(BondType)


class Agreement(enum.IntEnum):
    """How a molecule's SMILES and geometry compare."""

    AGREE = 0
    HEAVY_GRAPH_DIFFERS = 1  # SMILES kept
    SMILES_UNUSABLE = 2  # bonds from distances, all single


def find_bonds(
    smiles: str, atomic_numbers_N: np.ndarray, positions_Nx3: np.ndarray
) -> tuple[np.ndarray, Agreement]:
    """Bonds `[b, 3]` uint8 rows (i, j, BondType) with i < j, ascending, and the agreement."""
    distance_NxN = np.linalg.norm(positions_Nx3[:, None] - positions_Nx3[None], axis=-1)
    near_NxN = _near(atomic_numbers_N, distance_NxN)
    heavy = np.flatnonzero(atomic_numbers_N > 1)
    hydrogen = np.flatnonzero(atomic_numbers_N == 1)
    from_smiles = _heavy_bonds_of_smiles(smiles)
    if from_smiles is not None and np.array_equal(from_smiles[0], atomic_numbers_N[heavy]):
        _, hydrogens, smiles_bonds = from_smiles
        owner = distance_NxN[np.ix_(hydrogen, heavy)].argmin(axis=1)
        if np.array_equal(np.bincount(owner, minlength=len(heavy)), hydrogens):
            near = np.argwhere(np.triu(near_NxN[np.ix_(heavy, heavy)]))
            same = {tuple(pair) for pair in near} == {(i, j) for i, j, _ in smiles_bonds}
            bonds = [(heavy[i], heavy[j], kind) for i, j, kind in smiles_bonds]
            bonds += [
                (*sorted((heavy[o], h)), BondType.SINGLE)
                for h, o in zip(hydrogen, owner, strict=True)
            ]
            return (
                np.array(sorted(bonds), np.uint8).reshape(-1, 3),
                Agreement.AGREE if same else Agreement.HEAVY_GRAPH_DIFFERS,
            )
    pairs = np.argwhere(np.triu(near_NxN))
    types = np.full((len(pairs), 1), BondType.SINGLE)
    return np.concatenate([pairs, types], axis=1).astype(np.uint8), Agreement.SMILES_UNUSABLE


def _near(atomic_numbers_N: np.ndarray, distance_NxN: np.ndarray) -> np.ndarray:
    radius_N = _RADII[atomic_numbers_N]
    near = distance_NxN < _TOLERANCE * (radius_N[:, None] + radius_N[None])
    np.fill_diagonal(near, False)
    return near


def _heavy_bonds_of_smiles(smiles: str):
    """(atomic numbers, hydrogens per atom, bonds) of the heavy atoms, or None if unreadable."""
    from rdkit import Chem, RDLogger  # the extra `qm9`; needed only to prepare

    RDLogger.DisableLog("rdApp.*")
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        return None
    heavy = [a for a in molecule.GetAtoms() if a.GetAtomicNum() > 1]
    types = {
        Chem.BondType.SINGLE: BondType.SINGLE,
        Chem.BondType.DOUBLE: BondType.DOUBLE,
        Chem.BondType.TRIPLE: BondType.TRIPLE,
        Chem.BondType.AROMATIC: BondType.AROMATIC,
    }
    bonds = [
        (
            min(b.GetBeginAtomIdx(), b.GetEndAtomIdx()),
            max(b.GetBeginAtomIdx(), b.GetEndAtomIdx()),
            types[b.GetBondType()],
        )
        for b in molecule.GetBonds()
    ]
    return (
        np.array([a.GetAtomicNum() for a in heavy]),
        np.array([a.GetTotalNumHs() for a in heavy], np.int64),
        bonds,
    )
