"""What says that two rows are the same molecule, or have the same scaffold."""

import functools
import hashlib

import numpy as np

from data_pipelines.bonds import rdkit
from data_pipelines.molecules.making import chemistry
from data_pipelines.molecules.making.chemistry import Refused
from data_pipelines.molecules.record import Molecule

_MAX_ATOMS_OF_PAIRS = 1_000  # above, distances from the centre stand for those of all pairs
_DECIMALS = 2  # of angstrom


def identity_key(molecule: Molecule) -> str:
    """InChIKey; without bonds, a hash of formula, charge and sorted rounded distances.

    Two conformers have the same InChIKey; so have tautomers that differ by a mobile hydrogen.
    """
    graph = _graph(molecule)
    if graph is not None:
        key = rdkit().MolToInchiKey(graph)
        if key:
            return key
    return _hash_of_geometry(molecule)


def scaffold(molecule: Molecule) -> str:
    """SMILES of the Murcko scaffold (rings and what joins them), without stereo.

    "" of molecules without rings, and of those whose bonds are not known.
    """
    from rdkit.Chem.Scaffolds import MurckoScaffold

    graph = _graph(molecule)
    if graph is None or not graph.GetRingInfo().NumRings():
        return ""
    try:
        return MurckoScaffold.MurckoScaffoldSmiles(mol=graph, includeChirality=False)
    except (ValueError, RuntimeError):  # metals, mostly
        return ""


def _graph(molecule: Molecule):
    """RDKit's molecule, hydrogens implicit where it is made of SMILES; None without bonds."""
    if molecule.smiles and (graph := _read(molecule.smiles)) is not None:
        return graph
    if molecule.bonds_from == "distances":
        return None
    try:
        return chemistry.graph_of(molecule)
    except (Refused, ValueError, RuntimeError):
        return None


@functools.lru_cache(maxsize=1)  # key and scaffold are asked for one after the other
def _read(smiles: str):
    return rdkit().MolFromSmiles(smiles)


def _hash_of_geometry(molecule: Molecule) -> str:
    x_Nx3 = molecule.positions.astype(np.float64)
    if len(x_Nx3) <= _MAX_ATOMS_OF_PAIRS:
        i, j = np.triu_indices(len(x_Nx3), 1)
        distance = np.linalg.norm(x_Nx3[i] - x_Nx3[j], axis=1)
    else:
        distance = np.linalg.norm(x_Nx3 - x_Nx3.mean(axis=0), axis=1)
    digest = hashlib.sha256()
    digest.update(f"{chemistry.formula(molecule.atomic_numbers)} {molecule.charge} ".encode())
    digest.update(np.sort(np.round(distance, _DECIMALS)).astype("<f4").tobytes())
    return f"geometry-{digest.hexdigest()[:24]}"
