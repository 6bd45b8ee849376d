"""From rows to molecules: bonds, hydrogens, charges, geometries, refusals; and their identity."""

import sys

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from data_pipelines.bonds import BondType
from data_pipelines.errors import UserError
from data_pipelines.molecules.making import chemistry, geometry
from data_pipelines.molecules.making.identity import identity_key, scaffold
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.record import STATUSES, Molecule, Refusal, Row

ZOO = (
    "Cc1ccccc1",
    "c1ccc2[nH]ccc2c1",
    "c1cscc1",
    "O=[N+]([O-])c1ccccc1",
    "CC(=O)[O-]",
    "C[N+](C)(C)C",
    "[C-]#[O+]",
    "CC#N",
    "CN=[N+]=[N-]",
    "CS(C)(=O)=O",
    "O=c1cc[nH]cc1",
    "C[C@H](F)Cl",
    "F/C=C/Cl",
    "O",
    "[H][H]",
)


def sdf_row(smiles, kekulize=False, **changes):
    """A row as an SDF gives it: atoms, positions, bonds; and RDKit's molecule."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(molecule, randomSeed=1) == 0
    typed = Chem.Mol(molecule)
    if kekulize:
        Chem.Kekulize(typed, clearAromaticFlags=True)
    row = {
        "number": 1,
        "atomic_numbers": chemistry.numbers_of(molecule),
        "positions": molecule.GetConformer().GetPositions(),
        "bonds": chemistry.bonds_of(typed).astype(int),
        "charge": Chem.GetFormalCharge(molecule),
    }
    return Row(**row | changes), molecule


def made(row, kind="mmff") -> Molecule:
    molecule = make_molecule(row, kind)
    assert isinstance(molecule, Molecule), molecule
    n = len(molecule.atomic_numbers)
    assert molecule.positions.shape == (n, 3) and molecule.positions.dtype == np.float32
    assert molecule.atomic_numbers.dtype == np.uint8 and molecule.bonds.dtype == np.uint16
    assert (molecule.bonds[:, 0] < molecule.bonds[:, 1]).all()
    return molecule


def refused(row, kind="file") -> Refusal:
    refusal = make_molecule(row, kind)
    assert isinstance(refusal, Refusal) and refusal.status in STATUSES, refusal
    return refusal


def distances(positions):
    x = positions.astype(np.float64)
    return np.linalg.norm(x[:, None] - x[None], axis=-1)


# --- bonds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("smiles", ZOO)
def test_bonds_are_the_same_whatever_they_come_from(smiles):
    row, molecule = sdf_row(smiles)
    expected = chemistry.bonds_of(molecule)
    kekule, _ = sdf_row(smiles, kekulize=True)
    xyz = Row(1, smiles=smiles, atomic_numbers=row.atomic_numbers, positions=row.positions)
    for one, kind in (
        (row, "file"),
        (kekule, "file"),
        (xyz, "file"),
        (Row(1, smiles=smiles), "etkdg"),
    ):
        found = made(one, kind)
        np.testing.assert_array_equal(found.bonds, expected)
        np.testing.assert_array_equal(found.atomic_numbers, row.atomic_numbers)
        assert found.charge == row.charge and found.multiplicity == 1
    assert made(row, "file").bonds_from == "file"
    if smiles != "[H][H]":  # heavy atoms are what a SMILES puts in order
        assert made(xyz, "file").bonds_from == "smiles"


def test_bonds_of_positions_alone():
    row, molecule = sdf_row("CC(=O)c1ccccc1")
    found = made(Row(1, atomic_numbers=row.atomic_numbers, positions=row.positions), "file")
    assert found.bonds_from == "geometry" and not found.smiles
    np.testing.assert_array_equal(found.bonds, chemistry.bonds_of(molecule))


def test_what_rdkit_cannot_perceive_is_paired_by_distance():
    positions = np.array([[0.0, 0, 0], [1.1, 0, 0], [9, 0, 0]])
    found = made(Row(1, atomic_numbers=np.array([7, 7, 26]), positions=positions), "file")
    assert found.bonds_from == "distances"
    assert found.bonds.tolist() == [[0, 1, BondType.SINGLE]]
    assert any("distance" in note for note in found.notes)
    row = Row(1, atomic_numbers=np.array([7, 7, 26]), positions=positions)
    assert refused(row, "mmff").status == "no_conformer"


def test_a_smiles_of_another_molecule_is_not_used():
    row, molecule = sdf_row("CCO")
    wrong = Row(1, smiles="CCN", atomic_numbers=row.atomic_numbers, positions=row.positions)
    found = made(wrong, "file")
    assert found.bonds_from == "geometry" and "SMILES does not fit" in " ".join(found.notes)


# --- hydrogens, drawings -----------------------------------------------------------------------


def test_missing_hydrogens_are_added_with_coordinates():
    row, molecule = sdf_row("CCO")
    bonds = row.bonds[(row.bonds[:, :2] < 3).all(axis=1)]
    bare = Row(1, atomic_numbers=row.atomic_numbers[:3], positions=row.positions[:3], bonds=bonds)
    found = made(bare, "file")
    assert "6 missing hydrogens added" in found.notes
    np.testing.assert_array_equal(found.atomic_numbers, row.atomic_numbers)
    np.testing.assert_allclose(found.positions[:3], row.positions[:3], atol=1e-6)
    i, j = found.bonds[found.bonds[:, 1] > 2, :2].T
    assert (np.abs(distances(found.positions)[i, j] - 1.05) < 0.15).all()


def test_free_valences_that_the_file_calls_electrons_get_no_hydrogens():
    row, _ = sdf_row("[CH3]", multiplicity=2)
    found = made(row, "file")
    assert len(found.atomic_numbers) == 4 and found.multiplicity == 2


def test_drawings_are_refused_and_flat_molecules_are_not():
    row, molecule = sdf_row("CC")
    flat = row.positions * [1, 1, 0]
    assert "mmff" in refused(Row(1, [], "", row.atomic_numbers, flat, row.bonds)).message
    assert made(Row(1, [], "", row.atomic_numbers, flat, row.bonds), "mmff").geometry == "mmff"
    # Heavy atoms alone, drawn; and all at one point.
    for positions in (np.array([[0.0, 0, 0], [1.5, 0, 0], [3.0, 0.1, 0]]), np.zeros((3, 3))):
        bonds = np.array([[0, 1, 1], [1, 2, 1]])
        refusal = refused(
            Row(1, atomic_numbers=np.array([6, 6, 8]), positions=positions, bonds=bonds)
        )
        assert refusal.status == "no_conformer" and "mmff" in refusal.message
    # Water lies in a plane by nature.
    water = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    bonds = np.array([[0, 1, 1], [0, 2, 1]])
    made(Row(1, atomic_numbers=np.array([8, 1, 1]), positions=water, bonds=bonds), "file")
    row, _ = sdf_row("c1ccccc1")
    angle = np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    benzene = np.concatenate([1.39 * ring, 2.48 * ring])
    made(Row(1, atomic_numbers=row.atomic_numbers, positions=benzene, bonds=row.bonds), "file")


# --- charges, electrons, fragments -------------------------------------------------------------


@pytest.mark.parametrize(
    ("smiles", "charge", "multiplicity", "note"),
    [
        ("[NH4+]", 1, 1, ""),
        ("[CH3]", 0, 2, "odd number"),
        ("[O][O]", 0, 3, "UFF"),
        ("[Na+].[Cl-]", 0, 1, "2 fragments"),
        ("CC(=O)[O-].[Na+].O", 0, 1, "3 fragments"),
    ],
)
def test_charge_multiplicity_and_fragments(smiles, charge, multiplicity, note):
    found = made(Row(1, smiles=smiles))
    assert (found.charge, found.multiplicity) == (charge, multiplicity)
    assert note in " ".join(found.notes) and (note or not found.notes)
    apart = distances(made(Row(1, smiles=smiles), "etkdg").positions) + 9 * np.eye(
        len(found.positions)
    )
    assert apart.min() > 0.7  # fragments stand side by side


def test_the_file_says_charge_and_multiplicity():
    found = made(Row(1, smiles="O", charge=1, multiplicity=2))
    assert (found.charge, found.multiplicity) == (1, 2)
    assert "do not go together" in " ".join(made(Row(1, smiles="O", multiplicity=2)).notes)


# --- refusals ----------------------------------------------------------------------------------


def test_refusals_name_the_thing_and_the_remedy():
    read = Refusal("bad_row", "line 3 is cut off")
    assert refused(Row(1, refusal=read)) is read
    for smiles, word in (("C(", "bracket"), ("CN(C)(C)C", "valence"), ("c1cccc1", "kekulize")):
        refusal = refused(Row(1, smiles=smiles), "mmff")
        assert refusal.status == "bad_smiles" and word in refusal.message.lower()
    assert "mmff" in refused(Row(1, smiles="CCO")).message
    assert refused(Row(1)).status == "bad_row"
    assert refused(Row(1, smiles="C*"), "mmff").status == "element"
    nowhere = np.array([[0.0, 0, np.nan]])
    assert refused(Row(1, atomic_numbers=np.array([2]), positions=nowhere)).status == "nonfinite"
    dummy = Row(1, atomic_numbers=np.array([0]), positions=np.zeros((1, 3)))
    assert refused(dummy).status == "element"
    many = Row(1, atomic_numbers=np.full(65_536, 2), positions=np.zeros((65_536, 3)))
    assert refused(many).status == "too_large"
    assert refused(Row(1, smiles="C" * 400), "mmff").status == "too_large"
    with pytest.raises(UserError, match="Did you mean 'mmff'"):
        make_molecule(Row(1, smiles="C"), "mmf")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"bonds": np.array([[0, 9, 1]])}, "bad_row"),
        ({"bonds": np.array([[-1, 1, 1]])}, "bad_row"),
        ({"bonds": np.array([[1, 1, 1]])}, "bad_row"),
        ({"bonds": np.array([[0, 1, 0]])}, "bad_row"),
        ({"bonds": np.array([[0, 1, 9]])}, "bad_row"),
        ({"bonds": np.array([[0, 1, 1], [1, 0, 2]])}, "bad_row"),
        ({"positions": np.ones((2, 2))}, "bad_row"),
        ({"positions": np.ones((3, 3))}, "bad_row"),
        ({"positions": np.ones((2, 3))}, "no_conformer"),
        ({"charge": 500}, "charge"),
        ({"charge": -101}, "charge"),
        ({"multiplicity": 0}, "charge"),
    ],
)
def test_rows_that_cannot_be_are_refused(changes, status):
    row = {"atomic_numbers": np.array([7, 7]), "positions": np.array([[0.0, 0, 0], [1.1, 0, 0]])}
    made(Row(1, **row), "file")
    assert refused(Row(1, **row | changes)).status == status


def test_ends_of_bonds_may_stand_in_any_order():
    row, _ = sdf_row("CC=O")
    turned = row.bonds[::-1, [1, 0, 2]]
    found = made(
        Row(1, atomic_numbers=row.atomic_numbers, positions=row.positions, bonds=turned), "file"
    )
    np.testing.assert_array_equal(found.bonds, row.bonds)


def test_a_monster_is_refused_by_the_clock(monkeypatch):
    monkeypatch.setattr(geometry, "TIME_LIMIT", 0)
    assert "in time" in refused(Row(1, smiles="CCO"), "mmff").message


def test_a_cage_that_cannot_be_is_refused():
    refusal = refused(Row(1, smiles="CC1=CC2CC13COC23"), "etkdg")
    assert refusal.status == "no_conformer" and "CC1=CC2CC13COC23" in refusal.message


# --- geometries --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["etkdg", "mmff"])
def test_a_geometry_is_a_function_of_the_molecule_alone(kind):
    one = made(Row(1, smiles="OCC(C)N"), kind)
    made(Row(2, smiles="c1ccccc1"), kind)
    again = made(Row(3, smiles="OCC(C)N"), kind)
    np.testing.assert_array_equal(one.positions, again.positions)
    other = made(Row(4, smiles="NC(CO)C"), kind)
    assert other.smiles == one.smiles
    a, b = distances(one.positions), distances(other.positions)
    np.testing.assert_array_equal(np.sort(a, axis=None), np.sort(b, axis=None))
    # Heavy atoms of the two: O C C C N and N C C O C.
    order = [3, 2, 1, 4, 0]
    np.testing.assert_array_equal(a[:5, :5], b[np.ix_(order, order)])


def test_a_geometry_made_again_keeps_atoms_and_stereo():
    row, molecule = sdf_row("C[C@H](F)Cl")
    order = np.random.RandomState(0).permutation(len(row.atomic_numbers))
    where = np.argsort(order)
    bonds = row.bonds.copy()
    bonds[:, :2] = np.sort(where[bonds[:, :2]], axis=1)
    shuffled = Row(1, [], "", row.atomic_numbers[order], row.positions[order], bonds)
    found = made(shuffled, "mmff")
    np.testing.assert_array_equal(found.atomic_numbers, row.atomic_numbers[order])
    i, j = found.bonds[:, :2].T
    assert (distances(found.positions)[i, j] < 1.9).all()
    assert identity_key(found) == identity_key(made(row, "file"))
    assert identity_key(found) != identity_key(made(Row(1, smiles="C[C@@H](F)Cl")))


def test_strained_rings_keep_their_stereo():
    smiles = "C[C@@]12C[C@H]3[C@@H]1C[C@]32O"  # ETKDG fails while it enforces stereo
    found = made(Row(1, smiles=smiles), "etkdg")
    assert "without enforcing" in " ".join(found.notes)
    graph = chemistry.graph_of(found)
    assert Chem.MolToSmiles(Chem.RemoveHs(graph)) == Chem.CanonSmiles(smiles)
    wrong = "N#C[C@@]12CN3CC[C@@H]1[C@H]32"  # without enforcing it comes out wrong
    if isinstance(found := make_molecule(Row(1, smiles=wrong), "etkdg"), Molecule):
        graph = chemistry.graph_of(found)
        assert Chem.MolToSmiles(Chem.RemoveHs(graph)) == Chem.CanonSmiles(wrong)
    # What comes out wrong is not taken; what the SMILES leaves open may be anything.
    for smiles, minds in (("C[C@H](F)Cl", True), ("CC(F)Cl", False), ("F/C=C/F", True)):
        _, molecule = sdf_row(smiles)
        assert geometry._has_its_stereo(molecule)
        x_Nx3 = molecule.GetConformer().GetPositions()
        if smiles.startswith("F"):  # Z instead of E: the second half is turned over
            x_Nx3 = sdf_row("F/C=C\\F")[0].positions
        molecule.GetConformer().SetPositions(-x_Nx3)
        assert geometry._has_its_stereo(molecule) != minds


def test_force_field_without_parameters_is_noted():
    assert "UFF" in " ".join(made(Row(1, smiles="CB(C)C")).notes)


def test_xtb():
    pytest.importorskip("tblite")
    bond = lambda molecule: distances(molecule.positions)[0, 1]
    assert abs(bond(made(Row(1, smiles="O"), "xtb")) - 0.959) < 0.005
    neutral, cation = (made(Row(1, smiles="[H][H]", charge=q), "xtb") for q in (0, 1))
    assert cation.multiplicity == 2 and bond(cation) > bond(neutral) + 0.2


def test_xtb_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    geometry._tblite.cache_clear()
    with pytest.raises(UserError, match="demetar.xtb"):
        make_molecule(Row(1, smiles="O"), "xtb")


# --- identity ----------------------------------------------------------------------------------


def test_identity_is_of_the_molecule():
    key = identity_key(made(Row(1, smiles="CCO")))
    assert key == "LFQSCWFLJHTTHZ-UHFFFAOYSA-N"
    assert identity_key(made(Row(2, smiles="OCC"), "etkdg")) == key
    assert identity_key(made(sdf_row("C(O)C")[0], "file")) == key
    assert identity_key(made(Row(3, smiles="COC"))) != key


def test_identity_without_bonds_is_of_the_geometry():
    numbers, rng = np.array([26, 7, 7, 1]), np.random.RandomState(1)
    positions = np.array([[0.0, 0, 0], [5, 0, 0], [6.1, 0, 0], [0, 3, 4]])
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(4)
    key = lambda numbers, x, **more: identity_key(
        made(Row(1, atomic_numbers=numbers, positions=x, **more), "file")
    )
    first = key(numbers, positions)
    assert first.startswith("geometry-")
    assert key(numbers[order], (positions @ turn + 1)[order]) == first
    assert key(numbers, positions * 1.01) != first
    assert key(numbers, positions, charge=1) != first


def test_scaffold():
    assert scaffold(made(Row(1, smiles="Cc1ccccc1CC"))) == "c1ccccc1"
    assert scaffold(made(sdf_row("OCc1ccccc1")[0], "file")) == "c1ccccc1"
    assert scaffold(made(Row(1, smiles="CCO"))) == ""
