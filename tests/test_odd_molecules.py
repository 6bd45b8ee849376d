"""Files and molecules that are unusual and legal: read as they are meant, or refused by row."""

import ase
import ase.db
import numpy as np
import pyarrow.parquet
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from data_pipelines.bonds import BondType
from data_pipelines.edges import PairEdges
from data_pipelines.errors import UserError
from data_pipelines.molecules import writers
from data_pipelines.molecules.making import chemistry
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.readers import content_sha256, parser, read_rows, tables
from data_pipelines.molecules.readers.fields import Damaged
from data_pipelines.molecules.readers.sdf import parse_sdf_block
from data_pipelines.molecules.record import Molecule, Row
from data_pipelines.molecules.splits import make_split
from demetar import predict

# Aromatic atoms of which their own bonds do not say whether they are charged, ions, radicals.
SMILES = (
    "c1cc[nH]c1 c1ccc2[nH]ccc2c1 Nc1ncnc2[nH]cnc12 O=c1cc[nH]c(=O)[nH]1 O=[N+]([O-])c1ccco1 "
    "C[NH3+] c1cc[nH+]cc1 [CH3] O=[N+]([O-])c1cccs1 O=[N+]([O-])c1ccc[nH]1 O=C([O-])c1ccc[nH]1 "
    "c1c[nH+]c[nH]1 C[N+](C)(C)Cc1ccco1 [O-][n+]1onc2ccccc21 C[n+]1ccccc1 Cn1cc[n+](C)c1 "
    "[O-][n+]1ccccc1 [O]c1ccccc1 C[n+]1ccc([O-])cc1 c1cc[cH-]c1 c1nnn[n-]1 c1ccccc1 "
    "NC(Cc1c[nH]cn1)C(=O)O [NH3+]C(Cc1c[nH]c2ccccc12)C(=O)[O-]"
)


@pytest.mark.parametrize("smiles", SMILES.split())
def test_hydrogens_and_charges_of_an_sdf_are_those_of_its_molecule(smiles):
    """With all hydrogens and with none; and the bonds alone give the molecule back."""
    whole = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(whole, randomSeed=1)
    for given in (whole, Chem.RemoveHs(whole)):
        made = make_molecule(parse_sdf_block(1, Chem.MolToMolBlock(given)), "file")
        assert sorted(made.atomic_numbers) == sorted(a.GetAtomicNum() for a in whole.GetAtoms())
        assert made.charge == Chem.GetFormalCharge(whole)
        graph = chemistry.graph_of(made)
        Chem.RemoveStereochemistry(graph)
        assert Chem.MolToSmiles(Chem.RemoveHs(graph)) == Chem.CanonSmiles(smiles)


def test_a_record_may_say_another_charge_than_its_atoms():
    """Pyrrole without hydrogens is pyrrolide if its charge is -1, and nothing if it is 3."""
    mol = Chem.AddHs(Chem.MolFromSmiles("c1cc[nH]c1"))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    block = Chem.MolToMolBlock(Chem.RemoveHs(mol)) + "> <charge>\n{}\n\n"
    ion, nothing = (
        make_molecule(parse_sdf_block(1, block.format(charge)), "file") for charge in (-1, 3)
    )
    assert ion.charge == -1 and len(ion.atomic_numbers) == 9
    assert nothing.status == "bad_row" and "lacks hydrogens" in nothing.message


def test_atoms_in_another_order_than_their_smiles_are_seen():
    mol = Chem.AddHs(Chem.MolFromSmiles("c1ccccc1"))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    numbers = chemistry.numbers_of(mol)
    for order in ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]):
        x = mol.GetConformer().GetPositions()
        x[:6] = x[order]
        made = make_molecule(Row(1, smiles="c1ccccc1", atomic_numbers=numbers, positions=x), "file")
        ends = made.bonds[:, :2].astype(int).T
        assert np.linalg.norm(np.subtract(*made.positions[ends]), axis=1).max() < 1.6
        assert (made.bonds[:, 2] == BondType.AROMATIC).sum() == 6
        assert (made.bonds_from == "smiles") == (order == sorted(order))


def test_a_long_smiles_is_a_row_and_not_a_name_of_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("demetar.training.runtime.configure_for_prediction", lambda: None)
    smiles = "C" * 300 + "("
    assert predict.main([smiles, "--model=qm9-homo"]) == 3
    assert "bad_smiles" in capsys.readouterr().out
    made = make_molecule(Row(1, smiles="C" * 9_000 + "("), "mmff")
    assert len(made.message) < 400
    (tmp_path / "t.csv").write_text(f"xyz,E\n{'x' * 300},1\n")
    (row,) = read_rows(tmp_path / "t.csv")
    assert row.refusal.status == "bad_row" and "path of a file" in row.refusal.message


def test_a_table_depends_on_the_files_that_it_names(tmp_path):
    table, frame = tmp_path / "t.csv", tmp_path / "a.xyz"
    table.write_text("xyz,E\na.xyz,1\nmissing.xyz,2\n")
    frame.write_text("1\n\nH 0 0 0\n")
    first = content_sha256(table)
    frame.write_text("1\n\nH 0 0 1\n")
    assert content_sha256(table) != first


def test_a_table_that_is_damaged_or_names_nonsense_has_a_content_too(tmp_path):
    """Its rows are refused one by one; to ask what it depends on raises nothing."""
    names = [f"{k:032x}.xyz" for k in range(4_000)]
    pyarrow.parquet.write_table(
        pyarrow.table({"xyz": names}), tmp_path / "t.parquet", compression="none"
    )
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[8:40] = b"\xff" * 32  # the head of the first page; the footer is whole
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(Damaged):
        list(tables.parquet_files(tmp_path / "t.parquet"))
    (tmp_path / "t.csv").write_text("xyz,E\na\0b.xyz,1\n")
    for name in ("t.parquet", "t.csv"):
        assert len(content_sha256(tmp_path / name)) == 64


def test_symbols_of_no_element_refuse_their_row_alone(tmp_path):
    species = np.array([["CL", "C", "H", "H", "H"], ["Cl", "C", "H", "", ""]])
    np.savez(tmp_path / "s.npz", species=species, positions=np.zeros((2, 5, 3)))
    bad, good = read_rows(tmp_path / "s.npz")
    assert bad.refusal.status == "element" and "Cl" in bad.refusal.message
    assert good.refusal is None and good.atomic_numbers.tolist() == [17, 6, 1]


def test_one_number_as_an_array_of_one_is_a_number(tmp_path):
    with ase.db.connect(tmp_path / "s.db") as database:
        for atoms in (ase.Atoms("H"), ase.Atoms("HH", [[0, 0, 0], [0, 0, 0.74]])):
            database.write(atoms, data={"U0": np.array([-1.5])})
    for row in read_rows(tmp_path / "s.db"):
        assert row.columns["U0"] == -1.5 and "U0" not in row.node_columns


def test_a_long_cell_is_one_cell(tmp_path):
    long = "\n".join(["x" * 100] * 2_000)
    (tmp_path / "t.csv").write_text(f'smiles,note\nCC,"{long}"\nCO,b\n')
    rows = list(read_rows(tmp_path / "t.csv"))
    assert [row.smiles for row in rows] == ["CC", "CO"] and rows[0].columns["note"] == long


def test_upper_case_suffixes_say_the_same(tmp_path):
    (tmp_path / "T.TSV").write_text("smiles\tE\nCC\t1\n")
    (row,) = read_rows(tmp_path / "T.TSV")
    assert (row.smiles, row.columns["E"]) == ("CC", "1")


@pytest.mark.parametrize(
    ("comment", "columns"),
    [
        ("E = -1.5", {"E": -1.5}),
        ("E free_E=-5.5", {"free_E": -5.5}),
        ("good=T bad=F word", {"good": True, "bad": False}),
        ('"my E"=3.5', {"my E": 3.5}),
    ],
)
def test_values_of_a_comment(comment, columns, tmp_path):
    (tmp_path / "a.xyz").write_text(f"1\n{comment}\nH 0 0 0\n")
    (row,) = read_rows(tmp_path / "a.xyz")
    assert row.columns == columns


def test_a_frame_without_atoms_is_written_as_it_was(tmp_path):
    (tmp_path / "A.XYZ").write_text("0\n\n1\nE=1\nH 0 0 0\n")
    rows = list(map(parser(tmp_path / "A.XYZ"), read_rows(tmp_path / "A.XYZ", parse=False)))
    made = [make_molecule(row, "file") for row in rows]
    output = writers.Output(tmp_path / "o.xyz", tmp_path / "A.XYZ", {"status": "text"})
    with output.open(tmp_path) as out:
        molecules = [m if isinstance(m, Molecule) else None for m in made]
        out.write(rows, {"status": ["bad_row", "ok"]}, molecules)
    text = "0\nstatus=bad_row\n1\nE=1 status=ok\nH 0 0 0\n"
    assert (tmp_path / "o.xyz").read_text() == text


def test_large_molecules_are_counted_a_few_at_once(monkeypatch):
    class Two:
        node_offset = np.array([0, 40, 100, 103])
        position = np.random.default_rng(0).normal(size=(103, 3))
        bond_offset, bonds = np.zeros(4, int), np.zeros((0, 3), int)

    expected = PairEdges(Two, 1.5).counts
    monkeypatch.setattr("data_pipelines.edges._PAIRS_AT_ONCE", 1_700)
    np.testing.assert_array_equal(PairEdges(Two, 1.5).counts, expected)


def test_splits_name_rows_of_the_file(tmp_path):
    keys, numbers = ["a", "b", "c"], [3, 5, 6]  # rows 1, 2 and 4 were refused
    with pytest.raises(UserError, match="Row 5 of the split's column names the part 'tset'"):
        make_split("column", keys=keys, column=["train", "tset", "test"], numbers=numbers)
    file = tmp_path / "s.json"
    file.write_text('{"train": [2], "validation": [4], "test": [5, 0]}')
    split = make_split("file", keys=keys, file=str(file), numbers=numbers, num_rows=6)
    assert [rows.tolist() for rows in split.values()] == [[0], [1], [2]]
    file.write_text('{"train": [2], "validation": [4], "test": [6]}')
    with pytest.raises(UserError, match="puts row 6 into test, but there are 6 rows"):
        make_split("file", keys=keys, file=str(file), numbers=numbers, num_rows=6)
