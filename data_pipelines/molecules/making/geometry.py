"""Geometries of molecules: the file's, or made by RDKit and, where asked for, by xTB.

    file    as the file says
    etkdg   RDKit's ETKDGv3; where it fails again with random coordinates, then without its
            knowledge of torsions and flat groups
    mmff    etkdg, then MMFF94s (UFF where MMFF has no parameters)
    xtb     mmff, then GFN2-xTB (package tblite)

A geometry is a function of the molecule alone: not of its neighbours, of the process, or of how
its SMILES was written. (One limit is the clock: what takes longer than `TIME_LIMIT` is refused.)
"""

import functools
import os
import time

import numpy as np

from data_pipelines.bonds import rdkit
from data_pipelines.errors import UserError
from data_pipelines.molecules.making.chemistry import Refused, bonds_of, numbers_of, places

GEOMETRIES = ("file", "etkdg", "mmff", "xtb")
TIME_LIMIT = 30  # seconds, for each stage
# RDKit's matrix of bounds and MMFF's Hessian grow with the square: 150 MB at this size.
MAX_ATOMS = 1_000
_SEED = 20_140_807
_SHOWN = 80  # characters of a SMILES in a message
_GAP = 3.0  # angstrom between fragments, which RDKit puts on top of each other
_MMFF_STEPS, _MMFF_ROUNDS = 200, 20
_XTB_FORCE, _XTB_STEPS = 0.05, 500  # eV/angstrom


def make_positions(
    molecule, geometry: str, charge: int, multiplicity: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Positions [N, 3] float64, angstrom, of all atoms, and notes.

    Args:
      molecule: RDKit's, sanitized, with all hydrogens.
      geometry: of `GEOMETRIES`, not `file`.
      charge, multiplicity: of the molecule, for xTB.

    Raises:
      Refused: `no_conformer` or `too_large`.
      UserError: xTB is asked for, but tblite is not installed.
    """
    if geometry == "xtb":
        _tblite()
    if molecule.GetNumAtoms() > MAX_ATOMS:
        raise Refused(
            "too_large",
            f"{molecule.GetNumAtoms()} atoms: a geometry is made for at most {MAX_ATOMS}. Give one "
            "in the file.",
        )
    canonical, place = _canonical(molecule)
    notes = _embed(canonical)
    if geometry != "etkdg":
        notes += _force_field(canonical)
    positions = canonical.GetConformer().GetPositions()
    if geometry == "xtb":
        numbers = numbers_of(canonical)
        positions = _relax_by_xtb(numbers, positions, charge, multiplicity)
    if not np.isfinite(positions).all():
        raise Refused(
            "no_conformer", f"The {geometry} geometry has coordinates that are no numbers."
        )
    return positions[place], notes


def _canonical(molecule):
    """The same molecule in an order of its own, and where in it each of our atoms is: [N]."""
    Chem = rdkit()
    marked = Chem.Mol(molecule)
    marked.RemoveAllConformers()
    for atom in marked.GetAtoms():
        atom.SetIntProp("_ours", atom.GetIdx())
    try:
        heavy = Chem.RemoveHs(marked)
        smiles = Chem.MolToSmiles(heavy)
        order = list(heavy.GetPropsAsDict(True, True)["_smilesAtomOutputOrder"])
        read = Chem.MolFromSmiles(smiles)
        full = None if read is None else Chem.AddHs(read)
    except (ValueError, KeyError):
        full = None
    place = None
    if full is not None and read.GetNumAtoms() == len(order):
        ours = [heavy.GetAtomWithIdx(k).GetIntProp("_ours") for k in order]
        place = places(numbers_of(molecule), bonds_of(molecule), full, ours)
    if place is None:  # its SMILES says something else: some radicals and metals
        return marked, np.arange(molecule.GetNumAtoms())
    return full, place


# Options of RDKit in the order in which they are tried, and what a person is told. Without
# enforcement, strained rings are found that the first misses; their stereo is looked at after.
_TRIALS = (
    ({}, ()),
    ({"enforceChirality": False}, ("embedded without enforcing stereo, which came out right",)),
    ({"useRandomCoords": True}, ("embedded from random coordinates",)),
    (
        {"useRandomCoords": True, "useExpTorsionAnglePrefs": False, "useBasicKnowledge": False},
        ("embedded by distances alone",),
    ),
)


def _embed(molecule) -> tuple[str, ...]:
    from rdkit.Chem import rdDistGeom

    start = time.monotonic()
    for options, notes in _TRIALS:
        left = TIME_LIMIT - (time.monotonic() - start)
        if left < 1:
            break
        parameters = rdDistGeom.ETKDGv3()
        parameters.randomSeed = _SEED
        parameters.timeout = int(left)  # 0 would be no limit
        # A tenth of RDKit's own. What fails so often fails on: on QM9 one molecule in a hundred,
        # which otherwise costs more than the other ninety-nine.
        parameters.maxIterations = molecule.GetNumAtoms()
        for name, value in options.items():
            setattr(parameters, name, value)
        try:
            made = rdDistGeom.EmbedMolecule(molecule, parameters) == 0
        except (ValueError, RuntimeError):  # an atom that RDKit has no distances for
            made = False
        if made and (parameters.enforceChirality or _has_its_stereo(molecule)):
            _part_fragments(molecule)
            return notes
    smiles = rdkit().MolToSmiles(rdkit().RemoveHs(molecule))
    late = " in time" if time.monotonic() - start > TIME_LIMIT - 1 else ""
    raise Refused(
        "no_conformer",
        f"RDKit finds no geometry of {smiles[:_SHOWN]}{late}: give one in the file (SDF, xyz).",
    )


def _has_its_stereo(molecule) -> bool:
    """Whether the geometry has the stereo that the molecule states."""
    Chem = rdkit()
    found = Chem.Mol(molecule)
    Chem.AssignStereochemistryFrom3D(found)
    for ours, theirs in zip(molecule.GetAtoms(), found.GetAtoms(), strict=True):
        if ours.GetChiralTag() == Chem.ChiralType.CHI_UNSPECIFIED:
            theirs.SetChiralTag(Chem.ChiralType.CHI_UNSPECIFIED)
    for ours, theirs in zip(molecule.GetBonds(), found.GetBonds(), strict=True):
        if ours.GetStereo() == Chem.BondStereo.STEREONONE:
            theirs.SetStereo(Chem.BondStereo.STEREONONE)
    return Chem.MolToSmiles(found) == Chem.MolToSmiles(molecule)


def _part_fragments(molecule) -> None:
    """Puts fragments side by side."""
    pieces = rdkit().GetMolFrags(molecule)
    if len(pieces) == 1:
        return
    conformer = molecule.GetConformer()
    positions, end = conformer.GetPositions(), 0.0
    for piece in pieces:
        rows = positions[list(piece)]
        rows = rows - rows.mean(axis=0)
        rows[:, 0] += end - rows[:, 0].min()
        end = rows[:, 0].max() + _GAP
        positions[list(piece)] = rows
    conformer.SetPositions(positions)


def _force_field(molecule) -> tuple[str, ...]:
    from rdkit.Chem import rdForceFieldHelpers as helpers

    properties = helpers.MMFFGetMoleculeProperties(molecule, mmffVariant="MMFF94s")
    notes = ()
    if properties is not None:
        field = helpers.MMFFGetMoleculeForceField(
            molecule, properties, ignoreInterfragInteractions=False
        )
    elif helpers.UFFHasAllMoleculeParams(molecule):
        field = helpers.UFFGetMoleculeForceField(molecule, ignoreInterfragInteractions=False)
        notes = ("MMFF94s has no parameters for it: UFF instead",)
    else:
        return ("neither MMFF94s nor UFF has parameters for it: ETKDG alone",)
    if field is None:
        return (*notes, "no force field could be set up: ETKDG alone")
    field.Initialize()
    start = time.monotonic()
    for _ in range(_MMFF_ROUNDS):  # rounds, so that the clock is looked at
        if field.Minimize(maxIts=_MMFF_STEPS) == 0:
            return notes
        if time.monotonic() - start > TIME_LIMIT:
            break
    return (*notes, "the force field did not converge")


@functools.cache
def _tblite():
    # Its threads cost a hundred times what they save on a small molecule.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise UserError(
            "config.data.geometry is 'xtb', but the package tblite is not installed. Install it "
            "(pip install 'demetar[xtb]'), or choose 'mmff'."
        ) from error
    return TBLite


def _relax_by_xtb(
    numbers_N: np.ndarray, positions_Nx3: np.ndarray, charge: int, multiplicity: int
) -> np.ndarray:
    import ase
    from ase.optimize import BFGS

    atoms = ase.Atoms(numbers=numbers_N, positions=positions_Nx3)
    atoms.calc = _tblite()(method="GFN2-xTB", charge=charge, multiplicity=multiplicity, verbosity=0)
    start = time.monotonic()
    try:
        for _ in BFGS(atoms, logfile=None).irun(fmax=_XTB_FORCE, steps=_XTB_STEPS):
            if time.monotonic() - start > TIME_LIMIT:
                break
        else:
            if np.linalg.norm(atoms.get_forces(), axis=1).max() < _XTB_FORCE:
                return atoms.get_positions()
    except (RuntimeError, ValueError, ase.calculators.calculator.CalculatorError) as error:
        raise Refused("no_conformer", f"GFN2-xTB fails: {error}. Choose 'mmff'.") from error
    raise Refused(
        "no_conformer",
        f"GFN2-xTB does not converge in {_XTB_STEPS} steps or {TIME_LIMIT} s: choose 'mmff'.",
    )
