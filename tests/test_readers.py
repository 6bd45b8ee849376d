"""Readers and writers of molecule files: all formats say the same; damage is a row, not an end."""

import csv
import gzip
import pickle
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest

from data_pipelines.bonds import BondType
from data_pipelines.errors import UserError
from data_pipelines.molecules import readers
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.packing import pack_molecules, unpack_molecules
from data_pipelines.molecules.readers import count_rows, parser, read_rows
from data_pipelines.molecules.readers.sdf import parse_sdf_block
from data_pipelines.molecules.record import Molecule, Refusal, Row
from data_pipelines.molecules.writers import WRITERS, Output

h5py = pytest.importorskip("h5py")
parquet = pytest.importorskip("pyarrow.parquet")

SMILES = ("CCO", "C[NH3+]", "c1ccncc1", "CC(=O)[O-]", "N#CC=O", "FC(F)Br")


@pytest.fixture(scope="module")
def molecules():
    """RDKit's, embedded; positions have four decimals, as SDF has."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    made = []
    for smiles in SMILES:
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        assert AllChem.EmbedMolecule(molecule, randomSeed=7) == 0
        conformer = molecule.GetConformer()
        conformer.SetPositions(np.round(conformer.GetPositions(), 4))
        made.append(molecule)
    return made


@pytest.fixture(scope="module")
def wanted(molecules):
    """What every format should say, as rows."""
    from rdkit import Chem

    return [
        Row(
            number=k,
            columns={"homo": -6.25 - k},
            smiles=SMILES[k - 1],
            atomic_numbers=np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()]),
            positions=molecule.GetConformer().GetPositions(),
            charge=Chem.GetFormalCharge(molecule),
            node_columns={"forces": np.round(np.sin(molecule.GetConformer().GetPositions()), 6)},
        )
        for k, molecule in enumerate(molecules, 1)
    ]


# --- writing each format as its own library would ------------------------------------------------


def write_sdf(path, molecules, rows):
    from rdkit import Chem

    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as stream:
        writer = Chem.SDWriter(stream)
        for molecule, row in zip(molecules, rows, strict=True):
            copy = Chem.Mol(molecule)
            copy.SetProp("homo", repr(row.columns["homo"]))
            writer.write(copy)
        writer.close()


def atoms_of(row):
    import ase

    atoms = ase.Atoms(row.atomic_numbers, row.positions, info=dict(row.columns))
    return atoms


def write_ase(path, molecules, rows):
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator

    images = []
    for row in rows:
        atoms = ase.Atoms(row.atomic_numbers, row.positions)
        atoms.info |= {"charge": row.charge, **row.columns}
        atoms.calc = SinglePointCalculator(atoms, forces=row.node_columns["forces"])
        images.append(atoms)
    if path.suffix == ".db":
        import ase.db

        with ase.db.connect(path) as table:
            for atoms in images:
                # ase stores the sum of the atoms' charges as "charge", whatever it is given.
                table.write(atoms, total_charge=atoms.info["charge"], **row_values(atoms))
    else:
        ase.io.write(path, images, format={".traj": "traj"}.get(path.suffix, "extxyz"))


def row_values(atoms):
    return {"homo": atoms.info["homo"], "charge": atoms.info["charge"]}


def padded(rows):
    width = max(len(row.atomic_numbers) for row in rows)
    pad = lambda x: np.concatenate([x, np.zeros((width - len(x), *x.shape[1:]), x.dtype)])
    return {
        "numbers": np.stack([pad(row.atomic_numbers) for row in rows]),
        "positions": np.stack([pad(row.positions) for row in rows]),
        "forces": np.stack([pad(row.node_columns["forces"]) for row in rows]),
        "homo": np.array([row.columns["homo"] for row in rows]),
        "charge": np.array([row.charge for row in rows]),
    }


def flat(rows):
    return {
        "atomic_numbers": np.concatenate([row.atomic_numbers for row in rows]),
        "coordinates": np.concatenate([row.positions for row in rows]),
        "forces": np.concatenate([row.node_columns["forces"] for row in rows]),
        "offsets": np.cumsum([0, *(len(row.atomic_numbers) for row in rows)]),
        "homo": np.array([row.columns["homo"] for row in rows])[:, None],
        "charge": np.array([row.charge for row in rows]),
    }


def write_npz(layout):
    return lambda path, molecules, rows: np.savez_compressed(path, **layout(rows))


def write_h5(path, molecules, rows):
    """One group for each molecule, as AIMNet2's and torchmd-net's are for each size."""
    with h5py.File(path, "w") as file:
        for row in rows:
            group = file.create_group(f"deep/{row.number:03}")
            group["numbers"] = row.atomic_numbers[None]
            group["coord"] = row.positions[None]
            group["forces"] = row.node_columns["forces"][None]
            group["homo"], group["charge"] = [row.columns["homo"]], [row.charge]


def write_table(path, molecules, rows):
    """A table of paths of xyz files beside it."""
    import ase.io

    table = {"homo": [], "xyz": [], "charge": []}
    for row in rows:
        name = f"{path.name}-{row.number}.xyz"
        ase.io.write(path.parent / name, atoms_of(row), format="xyz", fmt="%.6f")
        for key, value in zip(table, (row.columns["homo"], name, row.charge), strict=True):
            table[key].append(value)
    if path.suffix == ".parquet":
        import pyarrow

        parquet.write_table(pyarrow.table(table), path, row_group_size=2)
        return
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerows([list(table), *zip(*table.values(), strict=True)])


FILES = {
    "m.sdf": write_sdf,
    "m.sdf.gz": write_sdf,
    "m.extxyz": write_ase,
    "m.xyz": write_ase,
    "m.traj": write_ase,
    "m.db": write_ase,
    "padded.npz": write_npz(padded),
    "flat.npz": write_npz(flat),
    "m.h5": write_h5,
    "m.csv": write_table,
    "m.csv.gz": write_table,
    "m.tsv": write_table,
    "m.parquet": write_table,
}


@pytest.fixture(params=FILES)
def file(request, tmp_path, molecules, wanted):
    path = tmp_path / request.param
    FILES[request.param](path, molecules, wanted)
    return path


def test_all_formats_say_the_same(file, wanted):
    rows = list(read_rows(file))
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, want in zip(rows, wanted, strict=True):
        assert row.refusal is None
        np.testing.assert_array_equal(row.atomic_numbers, want.atomic_numbers)
        np.testing.assert_allclose(row.positions, want.positions, atol=1e-9)
        assert float(row.columns["homo"]) == want.columns["homo"]
        assert row.charge == want.charge
        if row.node_columns:
            np.testing.assert_allclose(row.node_columns["forces"], want.node_columns["forces"])
    assert "homo" in readers.columns(file)
    assert count_rows(file) in (6, None)


def test_rows_parse_elsewhere(file):
    parse = pickle.loads(pickle.dumps(parser(file)))
    for row, again in zip(read_rows(file), read_rows(file, parse=False), strict=True):
        again = parse(pickle.loads(pickle.dumps(again)))
        assert (again.number, again.smiles) == (row.number, row.smiles)
        np.testing.assert_array_equal(again.positions, row.positions)


def test_sdf_has_bonds_smiles_and_the_types_of_rdkit(tmp_path, molecules, wanted):
    from rdkit import Chem

    write_sdf(tmp_path / "m.sdf", molecules, wanted)
    for row, want in zip(read_rows(tmp_path / "m.sdf"), wanted, strict=True):
        assert row.smiles == Chem.CanonSmiles(want.smiles)
        assert (row.bonds[:, 0] < row.bonds[:, 1]).all() and row.text
    pyridine = list(read_rows(tmp_path / "m.sdf"))[2]
    assert (pyridine.bonds[:, 2] == BondType.AROMATIC).sum() == 6


# --- SDF -----------------------------------------------------------------------------------------


def sdf_rows(tmp_path, text):
    (tmp_path / "x.sdf").write_text(text)
    return list(read_rows(tmp_path / "x.sdf"))


def block(smiles, hydrogens=True, flat=False, seed=1):
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if flat:
        AllChem.Compute2DCoords(molecule)
    else:
        AllChem.EmbedMolecule(molecule, randomSeed=seed)
    return Chem.MolToMolBlock(molecule if hydrogens else Chem.RemoveHs(molecule))


def test_a_drawing_has_a_smiles_and_no_positions(tmp_path):
    (row,) = sdf_rows(tmp_path, block("C[C@H](O)F", flat=True) + "$$$$\n")
    assert row.positions is None and row.smiles == "C[C@H](O)F" and row.refusal is None
    assert make_molecule(row, "file").status == "no_conformer"
    assert make_molecule(row, "etkdg").smiles == row.smiles


def test_a_flat_molecule_that_is_said_to_be_three_dimensional_keeps_its_positions(tmp_path):
    text = block("O").replace(" 3D", " 3D")
    lines = text.split("\n")
    flat = [
        f"{line[:20]}    0.0000{line[30:]}" if i in (4, 5, 6) else line
        for i, line in enumerate(lines)
    ]
    (row,) = sdf_rows(tmp_path, "\n".join(flat) + "$$$$\n")
    assert row.positions is not None and not row.positions[:, 2].any()


def test_missing_hydrogens_are_seen_by_the_smiles(tmp_path):
    (row,) = sdf_rows(tmp_path, block("CCO", hydrogens=False) + "$$$$\n")
    assert len(row.atomic_numbers) == 3 and row.smiles == "CCO"
    made = make_molecule(row, "file")
    assert len(made.atomic_numbers) == 9 and "missing hydrogens" in made.notes[0]


def test_stereo_comes_from_the_geometry(tmp_path):
    for smiles in ("C[C@@H](O)F", "C/C=C\\F", "CC(C)C", "CCS(C)(=O)=O"):
        (row,) = sdf_rows(tmp_path, block(smiles) + "$$$$\n")
        assert row.smiles == smiles


def test_properties_of_several_lines_crlf_and_titles(tmp_path):
    text = "title\n" + block("CO").split("\n", 1)[1]
    text += "> 25 <note> (7)\nfirst\nsecond\n\n>  <empty>\n\n> <homo>\n-6.5\n\n$$$$\n"
    (row,) = sdf_rows(tmp_path, text.replace("\n", "\r\n"))
    assert dict(row.columns) == {
        "_Name": "title",
        "note": "first\nsecond",
        "empty": None,
        "homo": "-6.5",
    }


def test_a_bad_record_does_not_stop_the_next(tmp_path):
    bad = block("CO").replace("V2000", "V2x00")
    five = block("C").replace("  1  0\n", "  2  0\n", 1)  # a double bond to a hydrogen
    rows = sdf_rows(tmp_path, "$$$$\n".join([block("CO"), bad, five, "", block("N"), ""]))
    assert [row.refusal is None for row in rows] == [True, False, False, False, True]
    assert {row.refusal.status for row in rows if row.refusal} == {"bad_row"}


@pytest.mark.parametrize("size", [3, 1000, 1 << 20])
def test_records_do_not_depend_on_how_the_file_is_read(tmp_path, monkeypatch, size):
    from data_pipelines.molecules.readers import sdf

    monkeypatch.setattr(sdf, "_CHUNK", size)
    rows = sdf_rows(tmp_path, "$$$$\n".join([block("CO"), block("CN"), ""]))
    assert [row.smiles for row in rows] == ["CO", "CN"]


def test_one_mol_block_needs_no_end(tmp_path):
    assert sdf_rows(tmp_path, block("CO"))[0].smiles == "CO"


# --- CSV and Parquet -----------------------------------------------------------------------------


def csv_rows(tmp_path, content, **options):
    (tmp_path / "x.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(tmp_path / "x.csv", **options))


def test_csv_with_bom_crlf_quotes_and_blank_lines(tmp_path):
    content = '\ufeffSMILES,name,homo\r\nCCO,"a, ""b""",-6.5\r\n\r\nC,,\r\n'
    first, second = csv_rows(tmp_path, content)
    assert first.smiles == "CCO" and first.columns["name"] == 'a, "b"'
    assert dict(second.columns) == {"SMILES": "C", "name": None, "homo": None}
    assert second.number == 2


def test_csv_with_faults(tmp_path):
    content = 'smiles,homo\nCCO,1\nC,1,2\n,3\n"CC\nO",4\nN,5\n'
    rows = csv_rows(tmp_path, content)
    assert [row.refusal is None for row in rows] == [True, False, False, False, True]
    said = [row.refusal.message for row in rows if row.refusal]
    assert "line 3 has 3 fields" in said[0] and "blank" in said[1]
    assert "opens in line 5 closes in line 6" in said[2]


def test_csv_bytes_that_are_no_utf8_come_out_again(tmp_path):
    content = b"smiles,name\nC,caf\xe9\n"
    rows = csv_rows(tmp_path, content)
    with Output(tmp_path / "out.csv", tmp_path / "x.csv", {"p": "number"}).open(tmp_path) as out:
        out.write(rows, {"p": [1.5]})
    assert (tmp_path / "out.csv").read_bytes() == b"smiles,name,p\nC,caf\xe9,1.5\n"


def test_csv_in_utf16_says_so(tmp_path):
    with pytest.raises(UserError, match="save it as UTF-8"):
        csv_rows(tmp_path, "smiles,homo\nC,1\n".encode("utf-16"))


@pytest.mark.parametrize(
    "content, said",
    [
        ("smile,homo\nC,1\n", "--smiles=smile"),
        ("smiles;homo\nC;1\n", "write it again with commas"),
        ("smiles,SMILES\nC,C\n", "say which one"),
        ("smiles,homo,homo\nC,1,2\n", "two columns called 'homo'"),
        ("", "has no header"),
        ("smiles,homo\n", "has no rows"),
    ],
)
def test_csv_that_is_refused_whole(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        csv_rows(tmp_path, content)


def test_the_column_of_smiles_can_be_named(tmp_path):
    assert csv_rows(tmp_path, "mol,SMILES\nC,N\n", smiles_column="mol")[0].smiles == "C"
    with pytest.raises(UserError, match="Did you mean 'mol'"):
        csv_rows(tmp_path, "mol,SMILES\nC,N\n", smiles_column="mole")


def test_salts_and_duplicates_are_rows(tmp_path):
    rows = csv_rows(tmp_path, "smiles\n[Na+].[Cl-]\nOCC\nCCO\n")
    assert [row.smiles for row in rows] == ["[Na+].[Cl-]", "OCC", "CCO"]


def test_smiles_beside_a_path(tmp_path):
    (tmp_path / "a.xyz").write_text("2\n\nC 0 0 0\nO 0 0 1.1\n")
    first, second = csv_rows(tmp_path, "smiles,xyz\n[C-]#[O+],a.xyz\nC,b.xyz\n")
    assert first.smiles == "[C-]#[O+]" and first.positions.shape == (2, 3)
    assert "b.xyz: there is no such file" in second.refusal.message


# --- xyz and ase ---------------------------------------------------------------------------------


def test_plain_xyz_with_a_remark(tmp_path):
    (tmp_path / "x.xyz").write_text("1\nwater, more or less\nO 0 0 0\n\n1\n\nN 0 0 1\n")
    first, second = read_rows(tmp_path / "x.xyz")
    assert dict(first.columns) == {"comment": "water, more or less"} and not second.columns
    assert readers.columns(tmp_path / "x.xyz") == ("comment",)


def test_extended_xyz_of_energies_charges_and_atoms(tmp_path):
    (tmp_path / "x.extxyz").write_text(
        "2\nProperties=species:S:1:pos:R:3:forces:R:3:q:R:1 energy=-1.5 dipole='0 0 1' charge=-1 "
        "spin=2 homo=-3\nO 0 0 0 1 2 3 0.5\nH 0 0 1 4 5 6 -0.5\n"
    )
    (row,) = read_rows(tmp_path / "x.extxyz")
    assert (row.columns["energy"], row.columns["homo"]) == (-1.5, -3)
    assert (row.charge, row.multiplicity) == (-1, 2)
    assert row.columns["dipole"].tolist() == [0, 0, 1]
    assert row.node_columns["forces"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert row.node_columns["q"].tolist() == [0.5, -0.5]


def test_a_bad_frame_does_not_stop_the_next_and_crystals_are_refused(tmp_path):
    (tmp_path / "x.xyz").write_text(
        "1\n\nQq 0 0 0\n1\n\nO 0 0 zero\n1\n\nO 0 0 0\n"
        '1\nLattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3\nO 0 0 0\n'
    )
    rows = list(read_rows(tmp_path / "x.xyz"))
    assert [row.refusal is None for row in rows] == [False, False, True, False]
    assert "periodic" in rows[3].refusal.message


# --- NPZ and HDF5 --------------------------------------------------------------------------------


def test_npz_of_one_molecule_in_many_geometries(tmp_path):
    """As MD17."""
    R = np.arange(12.0).reshape(2, 2, 3)
    names = {"theory": "pbe", "z": np.array([1, 8]), "R": R, "E": np.array([[1.0], [2.0]])}
    np.savez(tmp_path / "x.npz", F=-R, **names)
    first, second = read_rows(tmp_path / "x.npz")
    assert second.columns == {"E": 2.0} and second.atomic_numbers.tolist() == [1, 8]
    np.testing.assert_array_equal(second.node_columns["F"], -R[1])
    assert readers.columns(tmp_path / "x.npz") == ("E",)


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"positions": np.zeros((2, 3, 3))}, "no array of atomic numbers"),
        ({"numbers": np.ones((2, 3), int)}, "no array of positions"),
        ({"numbers": np.ones(6, int), "positions": np.zeros((6, 3))}, "where a molecule ends"),
        (
            {"numbers": np.ones((2, 3), int), "positions": np.zeros((2, 3, 3)), "e": np.ones(3)},
            "e is",
        ),
        (
            {"numbers": np.ones(6, int), "positions": np.zeros((6, 3)), "offsets": [0, 2, 5]},
            "about 5 atoms",
        ),
        ({"numbers": np.array([[1], None], object)}, "unpickling"),
    ],
)
def test_npz_that_is_refused_whole(tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=said):
        list(read_rows(tmp_path / "x.npz"))


def test_hdf5_by_formula_in_bohr(tmp_path):
    """As ANI-1x and SPICE: numbers once for a group; the unit of positions as an attribute."""
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for name, numbers in (("CO", [6, 8]), ("N3", [7, 7, 7])):
            group = file.create_group(name)
            group["atomic_numbers"] = numbers
            group["conformations"] = np.ones((2, len(numbers), 3))
            group["conformations"].attrs["units"] = "bohr"
            group["energy"] = [1.0, 2.0]
            group["smiles"] = [name]
    rows = list(read_rows(tmp_path / "x.hdf5"))
    assert [(row.number, row.columns["energy"], row.smiles) for row in rows] == [
        (1, 1.0, "CO"),
        (2, 2.0, "CO"),
        (3, 1.0, "N3"),
        (4, 2.0, "N3"),
    ]
    np.testing.assert_allclose(rows[2].positions, 0.529177, atol=1e-6)


def test_hdf5_of_symbols_and_letters(tmp_path):
    """As ANI-1: groups in groups, species and SMILES as arrays of text."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("gdb11_s01/gdb11_s01-0")
        group["species"] = np.array([b"C", b"O"])
        group["smiles"] = np.array([b"[C-]", b"#", b"[O+]"])
        group["coordinates"], group["energies"] = np.ones((3, 2, 3)), np.arange(3.0)
    rows = list(read_rows(tmp_path / "x.h5"))
    assert [row.atomic_numbers.tolist() for row in rows] == [[6, 8]] * 3
    assert rows[2].smiles == "[C-]#[O+]" and rows[2].columns["energies"] == 2.0


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.sdf", "m.sdf.gz", "m.extxyz", "m.csv", "m.csv.gz", "m.traj"])
def test_a_file_that_is_cut_off_gives_its_rows_and_then_one_refusal(
    tmp_path, molecules, wanted, name
):
    path = tmp_path / name
    FILES[name](path, molecules, wanted)
    content = path.read_bytes()
    cut = {"m.csv": 4, "m.csv.gz": 8}.get(name, 60)
    path.write_bytes(content[: len(content) - cut])
    rows = list(read_rows(path))
    assert 3 <= len(rows) <= 7 and rows[-1].number == len(rows)
    assert [row.refusal is None for row in rows] == [True] * (len(rows) - 1) + [False]
    assert rows[-1].refusal.status == "bad_row"


def test_a_number_that_is_cut_off_is_no_row(tmp_path):
    numbers = np.random.default_rng(0).normal(size=5000)
    text = "smiles,y\n" + "".join(f"C,{y!r}\n" for y in numbers.tolist())
    content = gzip.compress(text.encode(), mtime=0)
    for cut in (len(content) // 2, len(content) - 20):
        (tmp_path / "x.csv.gz").write_bytes(content[:cut])
        *good, last = read_rows(tmp_path / "x.csv.gz")
        assert len(good) > 1000 and "cut off" in last.refusal.message
        assert [float(row.columns["y"]) for row in good] == numbers[: len(good)].tolist()


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_such_file_is_refused_whole(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x00\x01 this is no file of molecules \xff" * 5)
    with pytest.raises(UserError, match=name):
        list(read_rows(path))


def test_a_damaged_member_of_npz_is_a_refusal(tmp_path, monkeypatch):
    from data_pipelines.molecules.readers import members

    monkeypatch.setattr(members, "_CHUNK", 4)
    path = tmp_path / "x.npz"
    rows = 4000
    positions = np.random.default_rng(0).normal(size=(rows, 2, 3))
    np.savez(path, positions=positions, numbers=np.ones((rows, 2), int))
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("positions.npy").header_offset
    content = bytearray(path.read_bytes())
    content[place + 100_000] ^= 255  # found by the checksum at the end of the member
    path.write_bytes(content)
    *good, last = read_rows(path)
    assert len(good) > rows // 2 and last.refusal.status == "bad_row"


def test_unknown_names_and_absent_files(tmp_path):
    with pytest.raises(UserError, match="must end in one of .csv"):
        list(read_rows(tmp_path / "x.pdf"))
    with pytest.raises(UserError, match="There is no file"):
        list(read_rows(tmp_path / "x.csv"))


# --- writers -------------------------------------------------------------------------------------

NEW = {"homo_pred": "number", "status": "text", "embedding": "vector", "spin_pred": "atoms"}


def predict(source, out, made):
    """Writes in chunks of four; row 2 has no prediction."""
    rows = list(read_rows(source))
    values = {
        "homo_pred": [None if row.number == 2 else row.number + 0.5 for row in rows],
        "status": ["bad_row" if row.number == 2 else "ok" for row in rows],
        "embedding": [None if row.number == 2 else np.arange(3.0) for row in rows],
        "spin_pred": [
            None if molecule is None else np.arange(float(len(molecule.atomic_numbers)))
            for molecule in made
        ],
    }
    with Output(out, source, NEW).open(out.parent) as writer:
        for k in range(0, len(rows), 4):
            part = slice(k, k + 4)
            chunk = {name: column[part] for name, column in values.items()}
            writer.write(rows[part], chunk, made[part])


@pytest.fixture(params=["m.sdf", "m.extxyz", "m.csv", "padded.npz"])
def source(request, tmp_path, molecules, wanted):
    path = tmp_path / request.param
    FILES[request.param](path, molecules, wanted)
    made = [make_molecule(row, "file") for row in read_rows(path)]
    made = [None if isinstance(m, Refusal) or m.number == 2 else m for m in made]
    assert len([m for m in made if m]) == 5
    return path, made


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_is_written_from_every_other(source, tmp_path, suffix):
    path, made = source
    outs = [tmp_path / f"{name}{suffix}" for name in ("out", "again")]
    for out in outs:
        predict(path, out, made)
    first, second = (out.read_bytes() for out in outs)
    assert first == second
    if suffix.endswith(".gz"):
        assert first[4:8] == bytes(4)  # no time
    assert sorted(p.name for p in tmp_path.iterdir() if "building" in p.name) == []
    found = read_back(outs[0])
    assert [float(value) for value in found["homo"]] == [-6.25 - k for k in range(1, 7)]
    assert found["status"] == ["ok", "bad_row", "ok", "ok", "ok", "ok"]
    predicted = [float("nan" if v in (None, "") else v) for v in found["homo_pred"]]
    np.testing.assert_array_equal(predicted, [1.5, np.nan, 3.5, 4.5, 5.5, 6.5])


def read_back(path):
    """Columns of an output, by another reader where it has no molecules in it."""
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pydict()
    if ".csv" in path.suffixes or ".tsv" in path.suffixes:
        stream = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
        with stream:
            rows = list(csv.DictReader(stream, delimiter="\t" if ".tsv" in path.suffixes else ","))
    else:
        rows = [row.columns for row in read_rows(path)]
    return {name: [row.get(name) for row in rows] for name in rows[0]}


@pytest.mark.parametrize("suffix", [".sdf", ".extxyz", ".npz"])
def test_structures_are_the_molecules(source, tmp_path, suffix, wanted):
    path, made = source
    predict(path, tmp_path / f"out{suffix}", made)
    for row, want, molecule in zip(read_rows(tmp_path / f"out{suffix}"), wanted, made, strict=True):
        if molecule is None and row.number == 2 and len(row.atomic_numbers) == 0:
            continue
        np.testing.assert_array_equal(row.atomic_numbers, want.atomic_numbers)
        np.testing.assert_allclose(row.positions, want.positions, atol=1e-4)
        if suffix != ".sdf" and molecule is not None:
            spins = np.arange(float(len(want.atomic_numbers)))
            np.testing.assert_array_equal(row.node_columns["spin_pred"], spins)


def test_sdf_and_xyz_keep_the_text_of_the_input(tmp_path, molecules, wanted):
    for name in ("m.sdf", "m.extxyz"):
        source = tmp_path / name
        FILES[name](source, molecules, wanted)
        rows = list(read_rows(source))
        out = tmp_path / f"out-{name}"
        with Output(out, source, {"p": "number"}).open(tmp_path) as writer:
            writer.write(rows, {"p": [1.5] * 6})
        text = out.read_text().replace("> <p>\n1.5\n\n", "").replace(" p=1.5", "")
        assert text == source.read_text().replace(">  <homo>  (", ">  <homo>  (")


def test_parquet_keeps_its_types(tmp_path):
    import pyarrow

    table = pyarrow.table(
        {"smiles": ["C", "N"], "n": pyarrow.array([1, None], pyarrow.int16()), "l": [[1], [2, 3]]}
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    rows = list(read_rows(tmp_path / "x.parquet"))
    with Output(tmp_path / "o.parquet", tmp_path / "x.parquet", {"p": "number"}).open(
        tmp_path
    ) as out:
        out.write(rows, {"p": [0.5, None]})
    found = parquet.read_table(tmp_path / "o.parquet")
    assert found.select(["smiles", "n", "l"]).equals(table)
    assert found["p"].to_pylist() == [0.5, None]


def test_npz_whose_first_chunks_have_no_values(tmp_path):
    source = tmp_path / "x.csv"
    source.write_text("smiles\n" + "C\n" * 4)
    rows = list(read_rows(source))
    with Output(tmp_path / "o.npz", source, {"e": "vector", "none": "vector"}).open(
        tmp_path
    ) as out:
        for row, value in zip(rows, [None, None, [1.0, 2.0], None], strict=True):
            out.write([row], {"e": [value], "none": [None]})
    found = np.load(tmp_path / "o.npz", allow_pickle=False)
    np.testing.assert_array_equal(found["e"], [[np.nan] * 2, [np.nan] * 2, [1, 2], [np.nan] * 2])
    assert found["none"].shape == (4,) and np.isnan(found["none"]).all()


def test_outputs_that_are_refused_before_anything_is_computed(tmp_path):
    source = tmp_path / "x.csv"
    source.write_text("smiles,homo_pred\nC,1\n")
    with pytest.raises(UserError, match="has a column 'homo_pred' already"):
        Output(tmp_path / "o.csv", source, {"homo_pred": "number"})
    with pytest.raises(UserError, match="is the input"):
        Output(source, source, {"p": "number"})
    with pytest.raises(UserError, match="must end in one of"):
        Output(tmp_path / "o.pdf", source, {"p": "number"})
    with pytest.raises(UserError, match="There is no folder"):
        Output(tmp_path / "none" / "o.csv", source, {"p": "number"})


def test_an_output_that_was_not_finished_is_not_there(tmp_path):
    source = tmp_path / "x.csv"
    source.write_text("smiles\nC\n")
    with pytest.raises(KeyboardInterrupt):
        with Output(tmp_path / "o.npz", source, {"p": "number"}).open(tmp_path):
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_records_without_a_smiles_are_the_same_molecules(tmp_path):
    """What a prediction reads: all but the SMILES, which a flat drawing keeps."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    solid = Chem.AddHs(Chem.MolFromSmiles("C[C@H](O)c1ccccc1"))
    AllChem.EmbedMolecule(solid, randomSeed=1)
    flat = Chem.MolFromSmiles("CCO")
    AllChem.Compute2DCoords(flat)
    path = tmp_path / "m.sdf"
    path.write_text("".join(Chem.MolToMolBlock(m) + "$$$$\n" for m in (solid, flat)))
    whole, light = readers.parser(path), readers.parser(path, "atoms")
    rows = list(readers.read_rows(path, parse=False))
    for row, wanted in zip(rows, ("", "CCO"), strict=True):
        full, found = whole(row), light(row)
        assert found.smiles == wanted and full.smiles
        np.testing.assert_array_equal(found.bonds, full.bonds)
        np.testing.assert_array_equal(found.atomic_numbers, full.atomic_numbers)
        assert found.charge == full.charge
        copied = readers.parser(path, "columns")(row)
        assert copied.columns == full.columns and copied.text == full.text


@pytest.mark.parametrize(
    "smiles, hydrogens, named, perceived",
    [
        ("c1ccccc1[N+](=O)[O-]", True, "", True),
        ("[NH3+]CC(=O)[O-]", True, "> <charge>\n0\n\n", True),
        ("C[NH3+]", True, "> <charge>\n0\n\n", False),  # stated otherwise than the bonds say
        ("Oc1ccccc1", False, "", False),
        ("[CH3]", True, "", False),
    ],
)
def test_what_rdkit_has_read_is_not_perceived_again(tmp_path, smiles, hydrogens, named, perceived):
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    molecule = molecule if hydrogens else Chem.RemoveHs(molecule)
    path = tmp_path / "m.sdf"
    path.write_text(f"{Chem.MolToMolBlock(molecule)}{named}$$$$\n")
    (row,) = read_rows(path)
    assert row.is_perceived == perceived
    if perceived:
        one, other = (make_molecule(r, "file") for r in (row, replace(row, is_perceived=False)))
        for field in fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_damage_that_only_a_fuzzer_finds(tmp_path):
    """`benchmarks/fuzz.py` found these: the libraries raise something unexpected."""
    import pyarrow

    atoms = {"numbers": [[1, 1]], "positions": np.zeros((1, 2, 3))}
    np.savez(tmp_path / "a.npz", **atoms)
    data = (tmp_path / "a.npz").read_bytes()
    at = data.index(b"PK\x01\x02") + 6  # the version of zip that the reader needs
    (tmp_path / "a.npz").write_bytes(data[:at] + b"\x7c" + data[at + 1 :])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in atoms.items():
            file[name] = values
        file["energy"] = h5py.SoftLink("/nowhere")
    parquet.write_table(pyarrow.table({"smiles": ["C"], "homo": [1.0]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"homo", b"h\x9dmo"))
    text = "1\nProperties=species:S:1:pos:R:900000000\nH 0 0 0\n"  # ase would wait for memory
    (tmp_path / "a.xyz").write_text(text)
    (row,) = read_rows(tmp_path / "a.xyz")
    assert "Properties names 900000001 columns, and the first atom has 4" in row.refusal.message
    (tmp_path / "negative.xyz").write_text("-5\n")
    with h5py.File(tmp_path / "circle.h5", "w") as file:
        group = file.create_group("CH")
        for name, values in atoms.items():
            group[name] = values
        file["CH/again"] = group
    assert len(list(read_rows(tmp_path / "circle.h5"))) == 1
    for name in ("a.npz", "a.h5", "a.parquet", "negative.xyz"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            list(read_rows(tmp_path / name))


def test_a_file_that_claims_a_huge_molecule_is_refused_before_it_is_read(tmp_path, monkeypatch):
    few = np.zeros((1, 70_000, 3), np.uint8)
    few = np.asfortranarray(few)  # such an array is read whole, so not too early
    np.savez_compressed(tmp_path / "padded.npz", numbers=few[..., 0], positions=few)
    many = np.zeros((600_000, 3), np.uint8)
    flat = {"numbers": many[:, 0], "positions": many, "num_atoms": [600_000]}
    np.savez_compressed(tmp_path / "flat.npz", **flat)
    for name, said in (("padded", "with at most 65535 atoms"), ("flat", "has 600000 atoms")):
        with pytest.raises(UserError, match=said):
            list(read_rows(tmp_path / f"{name}.npz"))
    positions = np.arange(90.0).reshape(5, 6, 3)
    np.savez(tmp_path / "m.npz", numbers=np.ones((5, 6), int), positions=positions)
    monkeypatch.setattr(readers.members, "_ATOMS", 13)  # two molecules at a time
    take, taken = readers.npz._Stored.take, []
    monkeypatch.setattr(
        readers.npz._Stored, "take", lambda self, n: taken.append(n) or take(self, n)
    )
    rows = list(read_rows(tmp_path / "m.npz"))
    assert max(taken) == 2
    np.testing.assert_array_equal([row.positions for row in rows], positions)


# What a part of RDKit's sanitization might change: aromatic and charged rings, what it cleans up,
# ions, radicals, metals, hypervalent atoms.
_HARD = (
    "CN(=O)=O CS(=O)(=O)C c1ccc2[nH]ccc2c1 [Fe] [CH3] [O][O] [Na+].[Cl-] C[N+](C)(C)C [C-]#[O+] "
    "CN=[N+]=[N-] c1ccsc1 O=c1cc[nH]cc1 F[P-](F)(F)(F)(F)F OCl(=O)(=O)=O c1cc[cH-]c1.[Fe+2] [2H]C "
    "O=[Xe] [O-][n+]1ccccc1 c1ccc[o+]c1 C[Hg]C C/C=C/C C[C@H](F)Cl CN->[Cu]"
).split()


@pytest.mark.parametrize("change", [("", ""), (" C ", " N "), (" C ", " Br"), ("2  0\n", "4  0\n")])
def test_the_steps_of_sanitization_that_are_left_out_change_nothing(change):
    from rdkit import Chem
    from rdkit.Chem import AllChem

    for smiles in _HARD:
        molecule = Chem.MolFromSmiles(smiles, sanitize=False)  # as a program may have drawn it
        AllChem.Compute2DCoords(molecule)
        block = (
            Chem.MolToMolBlock(molecule, kekulize=False)
            .replace("     2D", "     3D")
            .replace(*change, 1)
        )
        whole, light = (parse_sdf_block(1, block, smiles=needed) for needed in (True, False))
        for field in fields(Row):
            if field.name != "smiles":
                found, wanted = getattr(light, field.name), getattr(whole, field.name)
                np.testing.assert_array_equal(found, wanted, err_msg=f"{smiles} {field.name}")


def test_packed_molecules_come_back(wanted):
    made = [make_molecule(row, "file") for row in wanted]
    given = [made[0], None, *made[1:], None]
    found = unpack_molecules(pickle.loads(pickle.dumps(pack_molecules(given))))
    for one, other in zip(found, given, strict=True):
        assert (one is None) == (other is None)
        for field in fields(Molecule) if one else ():
            if field.name != "notes":
                a, b = getattr(one, field.name), getattr(other, field.name)
                np.testing.assert_array_equal(a, b)
                assert np.asarray(a).dtype == np.asarray(b).dtype
    assert unpack_molecules(pack_molecules([None, None])) == [None, None]
