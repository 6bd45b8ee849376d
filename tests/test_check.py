"""`demetar check`: what is there, what is wrong row by row, and units that look wrong."""

import csv

import numpy as np
import pytest

from data_pipelines.errors import UserError
from data_pipelines.molecules.checking.rows import check_file
from data_pipelines.molecules.checking.suspicious_units import rough_total_energy, suspicions
from data_pipelines.molecules.units import Column, convert, factor, parse_column
from data_pipelines.qm9.properties import COLUMNS
from demetar import check
from demetar.exits import EXIT_DONE, EXIT_USER_ERROR

GOOD = [("CCO", "-6.5"), ("CCN", "-5.9"), ("c1ccccc1", "-6.3"), ("CC(=O)[O-]", "-2.1"), ("C", "")]
PLANTED = [
    ("C1CC", "-6"),  # no SMILES
    ("CC", "inf"),  # no finite label
    ("CCC", "n.d."),  # no number
    ("", "-6"),  # no molecule
    ("OCC", "-7.5"),  # the first molecule, with another label
]


def write(path, rows, header=("smiles", "homo")):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def look(path, *targets, **options):
    faults = []
    facts = check_file(path, [parse_column(t) for t in targets], on_fault=faults.append, **options)
    return facts, faults


# --- rows ----------------------------------------------------------------------------------------


def test_five_planted_faults_are_five_rows(tmp_path):
    facts, faults = look(write(tmp_path / "x.csv", GOOD + PLANTED), "homo:eV")
    assert [fault.row for fault in faults] == [6, 7, 8, 9, 10]
    assert [fault.status for fault in faults] == [
        "bad_smiles",
        "label",
        "label",
        "bad_row",
        "conflict",
    ]
    assert "row 1, but homo is -7.5 here and -6.5 there" in faults[-1].message
    assert (facts.rows, facts.usable, facts.faults, facts.repeats) == (10, 5, 5, 1)


def test_a_file_without_faults_has_none(tmp_path):
    facts, faults = look(write(tmp_path / "x.csv", GOOD), "homo:eV")
    assert not faults and facts.usable == 5 and not facts.suspicions
    assert facts.elements["N"] == [1, 1] and facts.elements["C"] == [13, 5]
    assert facts.charges == {0: 4, -1: 1} and facts.geometry == {"none, only SMILES": 5}
    assert facts.columns["homo"].kinds == {"number": 4, "blank": 1}


def test_many_rows_in_processes_say_the_same_as_few(tmp_path, monkeypatch):
    from data_pipelines.molecules.checking import rows as module

    path = write(tmp_path / "x.csv", (GOOD + PLANTED) * 10)
    alone = look(path, "homo:eV")
    monkeypatch.setattr(module, "_FEW", 10)
    together = look(path, "homo:eV")
    assert repr(alone) == repr(together)
    assert len(alone[1]) == 50


def test_conformers_with_other_energies_are_no_conflict(tmp_path):
    frame = "3\nenergy={} charge=0\nO 0 0 0\nH 0 0 {}\nH 0 0.96 0\n"
    frames = [(-1.0, 0.96), (-2.0, 1.1), (-3.0, 0.96)]
    (tmp_path / "x.xyz").write_text("".join(frame.format(*values) for values in frames))
    facts, faults = look(tmp_path / "x.xyz", "energy:eV")
    assert facts.repeats == 2
    assert [(fault.row, fault.status) for fault in faults] == [(3, "conflict")]


def test_salts_and_odd_electrons_are_told(tmp_path):
    facts, faults = look(write(tmp_path / "x.csv", [("[Na+].[Cl-]", 1), ("[CH3]", 2), ("C", 3)]))
    assert not faults
    assert facts.notes == {"2 fragments": ([1], 1), "an odd number of electrons": ([2], 1)}


def test_bytes_that_are_no_utf8_are_printed(tmp_path, capsys):
    (tmp_path / "x.csv").write_bytes(b"smiles,caf\xe9\nC\xe9,1\nC,\xe9\n")
    assert check.main([str(tmp_path / "x.csv"), f"--report={tmp_path / 'r.csv'}"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "column caf?" in said and "row 1: bad_smiles" in said


def test_an_unknown_target_is_refused(tmp_path):
    with pytest.raises(UserError, match="no column 'hom'. Did you mean 'homo'"):
        look(write(tmp_path / "x.csv", GOOD), "hom:eV")


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_some_and_reports_all(tmp_path, capsys):
    path = write(tmp_path / "x.csv", GOOD + PLANTED[:4] * 10)
    report = tmp_path / "faults.csv"
    arguments = [str(path), "--target=homo:eV", f"--report={report}"]
    assert check.main(arguments) == EXIT_DONE
    said = capsys.readouterr().out
    assert said.count("\n  row ") == 20 and f"and 20 more; all of them are in {report}" in said
    assert "45 rows, 5 usable" in said and "first text in row 8: 'n.d.'" in said
    with report.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["row"]) for row in rows] == list(range(6, 46))


def test_the_command_exits_2_if_nothing_is_usable(tmp_path, capsys):
    assert check.main([str(write(tmp_path / "x.csv", PLANTED[:1]))]) == EXIT_USER_ERROR
    assert "1 rows, 0 usable" in capsys.readouterr().out


def test_the_command_refuses_a_target_without_unit(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        check.main([str(write(tmp_path / "x.csv", GOOD)), "--target=homo"])
    assert end.value.code == EXIT_USER_ERROR
    assert "write homo:eV" in capsys.readouterr().err


# --- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit",
    "eV meV hartree Ha kcal/mol kJ/mol cal/mol/K debye D bohr angstrom angstrom^2 bohr^3 1 "
    "1/cm GHz eV/angstrom e*angstrom".split(),
)
def test_usual_units_parse(unit):
    assert parse_column(f"name:{unit}") == Column("name", unit)
    assert factor(unit, unit) == 1


def test_energies_of_a_mole_are_of_one_particle():
    assert factor("Ha", "eV") == pytest.approx(27.211386, rel=1e-7)
    assert factor("hartree", "kcal/mol") == pytest.approx(627.5095, rel=1e-6)
    assert factor("eV", "kJ/mol") == pytest.approx(96.48533, rel=1e-6)
    assert factor("cal/mol/K", "J/mol/K") == pytest.approx(4.184, rel=1e-9)
    np.testing.assert_allclose(convert([2, np.nan], "kcal/mol", "kJ/mol"), [8.368, np.nan])


@pytest.mark.parametrize(
    "text, said",
    [
        ("homo", "write homo:eV"),
        ("homo:", "write homo:eV"),
        (":eV", "no unit"),
        ("homo:evv", "Did you mean 'eV'"),
        ("homo:ev", "write eV"),
        ("alpha:au", "astronomical"),
        ("tpsa:A^2", "write angstrom"),
        ("x:2*eV", "unknown"),
        ("x:__import__('os')", "unknown"),
    ],
)
def test_columns_that_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_column(text)


def test_other_dimensions_and_other_zeros_are_refused():
    with pytest.raises(UserError, match="cannot be converted"):
        factor("eV", "debye")
    with pytest.raises(UserError, match="use kelvin"):
        factor("degC", "K")


# --- suspicious units ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qm9(sample):
    """(Columns in their own units, atoms, rough total energies) of real molecules."""
    molecules, _ = sample
    offset = molecules.node_offset
    total = [
        rough_total_energy(molecules.atomic_number[a:b])
        for a, b in zip(offset[:-1], offset[1:], strict=True)
    ]
    columns = dict(zip(COLUMNS, np.array(molecules.properties).T, strict=True))
    return columns, np.diff(offset).astype(float), np.array(total)


@pytest.mark.parametrize("name", ["homo", "gap", "zpve", "U0"])
@pytest.mark.parametrize("wrong", ["eV", "kcal/mol", "kJ/mol"])
def test_hartree_declared_as_another_unit_is_suspicious(qm9, name, wrong):
    columns, *rest = qm9
    assert not suspicions({name: columns[name]}, {name: "hartree"}, *rest)
    (said,) = suspicions({name: columns[name]}, {name: wrong}, *rest)
    assert f"{name}:{wrong}" in said and "in hartree" in said


@pytest.mark.parametrize("wrong", ["hartree", "kcal/mol", "kJ/mol"])
def test_ev_declared_as_another_unit_is_suspicious(qm9, wrong):
    columns, *rest = qm9
    values = {"U0": convert(columns["U0"], "hartree", "eV")}
    assert not suspicions(values, {"U0": "eV"}, *rest)
    assert "it may be in eV" in suspicions(values, {"U0": wrong}, *rest)[0]


def test_more_than_1000_ev_an_atom_is_suspicious(qm9):
    columns, *rest = qm9
    assert "eV an atom" in suspicions({"x": columns["U0"] * 100}, {"x": "eV"}, *rest)[0]


@pytest.mark.parametrize("every", [2, 3, 7, 50])
@pytest.mark.parametrize("name", ["homo", "gap", "U0"])
def test_a_column_in_two_units_is_suspicious(qm9, name, every):
    columns, *rest = qm9
    mixed = columns[name].copy()
    mixed[::every] *= 27.2114
    (said,) = suspicions({name: mixed}, {}, *rest)
    assert "two units" in said and "hartree" in said


def test_two_columns_of_the_same_in_two_units(qm9):
    columns, *rest = qm9
    values = {"a": columns["homo"], "b": columns["homo"] * 27.211386}
    assert "b is 27.2114 times a" in suspicions(values, {}, *rest)[0]
    assert suspicions(values, {"a": "eV", "b": "eV"}, *rest)
    assert not suspicions(values, {"a": "hartree", "b": "eV"}, *rest)


def test_nothing_about_qm9_is_suspicious(qm9):
    columns, *rest = qm9
    assert not suspicions(columns, {}, *rest)
    ethanol = np.full(20, 9.0), np.full(20, rough_total_energy(np.array([6, 6, 8, *[1] * 6])))
    homo_of_one = {"homo": ethanol[1] / 627.5}  # -6.7 eV, which is right
    assert not suspicions(homo_of_one, {"homo": "eV"}, *ethanol)
