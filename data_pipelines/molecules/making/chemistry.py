"""RDKit's molecules: made of SMILES, of atoms with bonds, of atoms alone; and what we read off.

All molecules here have every hydrogen as an atom. Types of bonds are those of RDKit's
sanitization, so a ring is aromatic or not whatever file it came from.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from data_pipelines.bonds import BondType, rdkit
from data_pipelines.elements import NUM_ELEMENTS, symbols
from data_pipelines.molecules.record import Molecule, Refusal

# Above this RDKit's search for bond orders, and its matrix of distances, may take minutes.
MAX_ATOMS_TO_PERCEIVE = 150
_SHOWN = 200  # characters of a SMILES in a message
_PERCEPTION_ITERATIONS = 20_000
# Neutral atoms have bonds of this sum (of orders); an excess or a lack makes an ion or radical.
_USUAL_VALENCE = {1: 1, 5: 3, 6: 4, 7: 3, 8: 2, 9: 1, 14: 4, 15: 3, 16: 2, 17: 1, 35: 1, 53: 1}
# Elements that become cations when they have one bond too many, anions with one too few (the
# first of the list first).
_ONIUM = (7, 8, 15, 16)
_ANIONS = (8, 16, 9, 17, 35, 53, 7, 15, 6)
_MOST_CATIONS, _CHOICES = 3, 64  # aromatic ones; ways of choosing them that are tried
_METAL_CHARGE = {3: 1, 11: 1, 19: 1, 37: 1, 55: 1, 12: 2, 20: 2, 38: 2, 56: 2, 30: 2}


class Refused(Exception):
    """Ends the making of one molecule; `refusal` says why. It never leaves this room."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.refusal = Refusal(status, message)


@functools.cache
def _kinds() -> tuple[dict, dict]:
    """RDKit's type of a bond -> ours, and back."""
    kind = rdkit().BondType
    ours = {
        kind.SINGLE: BondType.SINGLE,
        kind.DOUBLE: BondType.DOUBLE,
        kind.TRIPLE: BondType.TRIPLE,
        kind.AROMATIC: BondType.AROMATIC,
    }
    return ours, {int(b): k for k, b in ours.items()}


def from_smiles(smiles: str):
    """The molecule with all its hydrogens; raises `Refused("bad_smiles")`."""
    Chem = rdkit()
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise Refused("bad_smiles", _why_no_molecule(smiles))
    if molecule.GetNumAtoms() == 0:
        raise Refused("bad_smiles", f"SMILES {smiles!r} has no atoms: write one, such as CCO.")
    check_numbers(np.array([a.GetAtomicNum() for a in molecule.GetAtoms()]))
    return Chem.AddHs(molecule)


def _why_no_molecule(smiles: str) -> str:
    Chem = rdkit()
    raw = Chem.MolFromSmiles(smiles, sanitize=False)
    shown = smiles if len(smiles) <= _SHOWN else f"{smiles[:_SHOWN]}…"
    if raw is None:
        return f"{shown!r} is no SMILES: a bracket, ring or symbol is wrong. Correct it."
    problems = "; ".join(p.Message() for p in Chem.DetectChemistryProblems(raw))
    return f"SMILES {shown!r} is no molecule: {problems or 'RDKit refuses it'}. Correct it."


def check_numbers(atomic_numbers_N: np.ndarray) -> None:
    """Raises `Refused("element")` for what is not in the periodic table."""
    wrong = atomic_numbers_N[(atomic_numbers_N < 1) | (atomic_numbers_N > NUM_ELEMENTS)]
    if len(wrong):
        raise Refused(
            "element",
            f"Atomic number {wrong[0]} is no element (0 is a dummy atom, *): name a real one.",
        )


def from_bonds(
    atomic_numbers_N, bonds_bx3, charge: int, positions_Nx3=None, implicit=True, states_Nx3=None
):
    """A sanitized molecule of atoms and bonds, or None if RDKit refuses the bonds.

    Formal charges are what the file says or, if it does not, what the valences say: a nitrogen with
    four bonds is positive, an oxygen with one is negative where the charge of the molecule asks for
    it. Whether an aromatic atom gives its lone pair or is positive, its own bonds do not tell:
    neutral ones are tried first, then those that make the ring and the charge come out.

    Args:
      atomic_numbers_N: [N].
      bonds_bx3: [b, 3] rows (i, j, BondType).
      charge: of the molecule.
      positions_Nx3: become a conformer.
      implicit: whether atoms with free valences may get implicit hydrogens; else the atoms are
        all there are, and free valences are radicals.
      states_Nx3: of each atom, as `Row.atom_states`; then nothing is guessed.
    """
    found = None
    if states_Nx3 is not None and states_Nx3[:, 0].sum() == charge:
        choices = [states_Nx3[:, 0].tolist()]
    else:
        states_Nx3, choices = None, _choices_of_charges(atomic_numbers_N, bonds_bx3, charge)
    for formal_N in choices:
        molecule = _sanitized(atomic_numbers_N, bonds_bx3, formal_N, implicit, states_Nx3)
        if molecule is None:
            continue
        radicals = not implicit and any(a.GetNumRadicalElectrons() for a in molecule.GetAtoms())
        found = found or molecule  # the first, where none is as it should be
        if sum(formal_N) == charge and not radicals:
            found = molecule
            break
    if found is not None and positions_Nx3 is not None:
        conformer = rdkit().Conformer(len(atomic_numbers_N))
        conformer.SetPositions(np.ascontiguousarray(positions_Nx3, np.float64))
        found.AddConformer(conformer)
    return found


def _sanitized(atomic_numbers_N, bonds_bx3, formal_N, implicit: bool, states_Nx3):
    """The molecule with these formal charges, or None if RDKit refuses it."""
    Chem = rdkit()
    theirs = _kinds()[1]
    molecule = Chem.RWMol()
    for k, number in enumerate(atomic_numbers_N.tolist()):
        atom = Chem.Atom(number)
        if formal_N[k]:
            atom.SetFormalCharge(formal_N[k])
        if not implicit or states_Nx3 is not None:
            atom.SetNoImplicit(True)
        if states_Nx3 is not None:
            atom.SetNumExplicitHs(int(states_Nx3[k, 1]))
            atom.SetNumRadicalElectrons(int(states_Nx3[k, 2]))
        molecule.AddAtom(atom)
    for i, j, kind in bonds_bx3.tolist():
        molecule.AddBond(i, j, theirs[kind])
        if kind == BondType.AROMATIC:
            for k in (i, j):
                molecule.GetAtomWithIdx(k).SetIsAromatic(True)
    try:
        Chem.SanitizeMol(molecule)
    except ValueError:  # RDKit's own errors of valence and kekulization are ValueErrors
        return None
    return molecule


def valences(num_atoms: int, bonds_bx3: np.ndarray) -> np.ndarray:
    """[N] twice the sum of the orders of each atom's bonds."""
    twice_b = np.array([0, 2, 4, 6, 3])[bonds_bx3[:, 2]]
    ends = np.concatenate([bonds_bx3[:, 0], bonds_bx3[:, 1]])
    return np.bincount(ends, np.concatenate([twice_b, twice_b]), num_atoms).astype(np.int64)


def _choices_of_charges(atomic_numbers_N, bonds_bx3, charge: int) -> Iterator[list[int]]:
    """Formal charges of the atoms, the likeliest first."""
    valence_N = valences(len(atomic_numbers_N), bonds_bx3) // 2
    aromatic = set(bonds_bx3[bonds_bx3[:, 2] == BondType.AROMATIC, :2].ravel().tolist())
    # By their bonds these give a lone pair to the ring, as in pyrrole, or are positive.
    either = [
        k
        for k in sorted(aromatic)
        if (z := int(atomic_numbers_N[k])) in _ONIUM and valence_N[k] == _USUAL_VALENCE[z] + 1
    ]
    some = (
        positive
        for count in range(min(len(either), _MOST_CATIONS) + 1)
        for positive in itertools.combinations(either, count)
    )
    for positive in itertools.islice(some, _CHOICES):
        neutral = set(either) - set(positive)
        yield _formal_charges(atomic_numbers_N, valence_N, charge, neutral)
    if charge < 0:  # a lone pair in the ring in the place of a bond, as in tetrazolate
        for z, valence in ((7, 3), (6, 4)):
            for k in sorted(aromatic):
                if atomic_numbers_N[k] == z and valence_N[k] == valence:
                    rest = _formal_charges(atomic_numbers_N, valence_N, charge + 1, set(either))
                    rest[k] -= 1
                    yield rest


def _formal_charges(atomic_numbers_N, valence_N, charge: int, neutral: set[int]) -> list[int]:
    """A charge for each atom that valences and the charge of the molecule explain; else zeros.

    `neutral`: atoms that have none, though they have a bond too many.
    """
    formal = [0] * len(atomic_numbers_N)
    lack = {}
    for k, (z, valence) in enumerate(
        zip(atomic_numbers_N.tolist(), valence_N.tolist(), strict=True)
    ):
        if valence == 0 and z in _METAL_CHARGE:
            formal[k] = _METAL_CHARGE[z]
        elif z in _USUAL_VALENCE and k not in neutral:
            excess = valence - _USUAL_VALENCE[z]
            if excess == 1 and z in _ONIUM:
                formal[k] = 1
            elif excess == 1 and z == 5:
                formal[k] = -1
            elif excess < 0:
                lack[k] = -excess
    rest = charge - sum(formal)
    if rest > 0 and all(z not in _METAL_CHARGE for z in atomic_numbers_N.tolist()):
        for k in [k for k in lack if atomic_numbers_N[k] in (6, 7)][:rest]:
            formal[k], rest = 1, rest - 1
    for z in _ANIONS:
        for k in lack:
            while rest < 0 and atomic_numbers_N[k] == z and lack[k]:
                formal[k], lack[k], rest = formal[k] - 1, lack[k] - 1, rest + 1
    if rest and charge == 0:  # metals and others whose charge no rule explains
        return [0] * len(atomic_numbers_N)
    return formal


def perceive(atomic_numbers_N, positions_Nx3, charge: int):
    """RDKit's reading of bonds from positions, or None where it finds none or is too slow."""
    if len(atomic_numbers_N) > MAX_ATOMS_TO_PERCEIVE:
        return None
    from rdkit.Chem import rdDetermineBonds

    odd = (int(atomic_numbers_N.sum()) - charge) % 2 == 1
    for factor in (1.3, 1.2):  # the second for strained cages: across a ring is no bond
        molecule = from_bonds(atomic_numbers_N, np.zeros((0, 3), np.int64), 0, positions_Nx3, False)
        for atom in molecule.GetAtoms():
            atom.SetFormalCharge(0)
            atom.SetNumRadicalElectrons(0)
        try:
            rdDetermineBonds.DetermineBonds(
                molecule,
                charge=charge,
                covFactor=factor,
                useVdw=True,
                allowChargedFragments=not odd,  # else an odd electron would become a charge
                embedChiral=False,
                maxIterations=_PERCEPTION_ITERATIONS,
            )
            rdkit().SanitizeMol(molecule)
            return molecule
        except (ValueError, RuntimeError):
            continue
    return None


def graph_of(molecule: Molecule):
    """RDKit's molecule of the same atoms in the same order, with stereo of the positions.

    None where RDKit refuses the bonds.
    """
    numbers, bonds = molecule.atomic_numbers.astype(np.int64), molecule.bonds.astype(np.int64)
    graph = from_bonds(numbers, bonds, molecule.charge, molecule.positions, implicit=False)
    if graph is not None:
        rdkit().AssignStereochemistryFrom3D(graph)
    return graph


def numbers_of(molecule) -> np.ndarray:
    """[N] atomic numbers."""
    return np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.int64)


def bonds_of(molecule) -> np.ndarray:
    """`[b, 3]` uint16 rows (i, j, BondType), i < j, ascending; other kinds count as single."""
    ours = _kinds()[0]
    rows = []
    for bond in molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        kind = int(ours.get(bond.GetBondType(), BondType.SINGLE))
        rows.append((i, j, kind) if i < j else (j, i, kind))
    return np.array(sorted(rows), np.uint16).reshape(-1, 3)


def owners(atomic_numbers_N, bonds_bx3) -> dict[int, int]:
    """Hydrogen -> the one heavy atom it is bonded to; other hydrogens are left out."""
    neighbours: dict[int, list[int]] = {}
    for i, j in bonds_bx3[:, :2].tolist():
        for a, b in ((i, j), (j, i)):
            if atomic_numbers_N[a] == 1:
                neighbours.setdefault(a, []).append(b)
    return {
        h: of[0]
        for h, of in sorted(neighbours.items())
        if len(of) == 1 and atomic_numbers_N[of[0]] > 1
    }


def places(atomic_numbers_N, bonds_bx3, full, first) -> np.ndarray | None:
    """[N] number in the molecule `full` of each atom, or None if they do not match.

    Args:
      atomic_numbers_N, bonds_bx3: of the atoms.
      full: RDKit's molecule of the same, in another order.
      first: [n] the atoms that come first in `full`, in that order; the rest are hydrogens.
    """
    if len(atomic_numbers_N) != full.GetNumAtoms():
        return None
    place = np.full(len(atomic_numbers_N), -1)
    place[first] = np.arange(len(first))
    free: dict[int, list[int]] = {}
    for hydrogen, owner in owners(numbers_of(full), bonds_of(full)).items():
        if hydrogen >= len(first):
            free.setdefault(owner, []).append(hydrogen)
    for hydrogen, owner in owners(atomic_numbers_N, bonds_bx3).items():
        if place[hydrogen] < 0:
            if not free.get(place[owner]):
                return None
            place[hydrogen] = free[place[owner]].pop(0)
    return None if (place < 0).any() else place


def num_fragments(num_atoms: int, bonds_bx3: np.ndarray) -> int:
    """How many pieces the bonds leave."""
    root = list(range(num_atoms))

    def find(k):
        while root[k] != k:
            root[k] = root[root[k]]
            k = root[k]
        return k

    pieces = num_atoms
    for i, j in bonds_bx3[:, :2].tolist():
        a, b = find(i), find(j)
        if a != b:
            root[a] = b
            pieces -= 1
    return pieces


def formula(atomic_numbers_N: np.ndarray) -> str:
    """In Hill's order: carbon, hydrogen, the others by symbol."""
    counts = np.bincount(atomic_numbers_N, minlength=NUM_ELEMENTS + 1)
    names = {symbols()[z]: int(counts[z]) for z in np.flatnonzero(counts)}
    first = [s for s in ("C", "H") if s in names] if "C" in names else []
    rest = sorted(set(names) - set(first))
    return "".join(f"{s}{names[s] if names[s] > 1 else ''}" for s in (*first, *rest))
