"""Molecules of one's own: trained on, predicted, scored; bad rows, kills, other formats."""

import csv
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import ase
import ase.build
import ase.io
import numpy as np
import pytest
from conftest import REPOSITORY
from test_docs import ALL
from test_inference import experiment_of, weights_of

from data_pipelines.dataset import PARTS
from data_pipelines.elements import symbols
from data_pipelines.errors import UserError
from data_pipelines.molecules import preparation
from data_pipelines.molecules.parallel import map_rows
from data_pipelines.qm9.preparation import SAMPLE_FILE
from data_pipelines.qm9.properties import COLUMNS, HARTREE_IN_MEV
from data_pipelines.qm9.sources import read_raw
from data_pipelines.registry import load_dataset
from demetar import evaluate, predict
from demetar.exits import EXIT_DONE, EXIT_NOTHING
from demetar.inference import package, prediction
from demetar.inference.card import describe
from demetar.inference.model import load_model
from demetar.training.objective import standardize

HOMO = COLUMNS.index("homo")


@pytest.fixture(scope="module")
def molecules():
    """60 of the sample, as the source has them."""
    return list(read_raw(str(SAMPLE_FILE)))[:60]


@pytest.fixture
def here(monkeypatch):
    """Rows are made in this process: starting others takes longer than these few."""
    for module in (preparation, prediction):
        monkeypatch.setattr(module, "map_rows", functools.partial(map_rows, processes=1))


def write_csv(path, rows):
    with path.open("w", newline="") as stream:
        table = csv.DictWriter(stream, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


def read_csv(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def rows_of(molecules, **more):
    return [
        {"name": f"m{m.index}", "smiles": m.smiles, "homo": repr(float(m.properties[HOMO]))}
        | {key: value(m) for key, value in more.items()}
        for m in molecules
    ]


# --- training ------------------------------------------------------------------------------------


def load(path, tmp_path, **options):
    options = {"targets": ("homo:hartree",), "geometry": "file"} | options
    defaults = dict(preparation_defaults())
    return load_dataset(
        name="molecules", cache_dir=str(tmp_path), path=str(path), **(defaults | options)
    )


def preparation_defaults():
    from data_pipelines.registry import DATASETS

    return {k: v for k, v in DATASETS["molecules"].defaults.items() if k != "path"}


def atoms_of(molecules):
    """ase.Atoms, of positions that every format holds exactly."""
    found = []
    for m in molecules:
        atoms = ase.Atoms(m.atomic_numbers.astype(int), np.round(m.positions, 4))
        atoms.info |= {"homo": float(m.properties[HOMO]), "smiles": m.smiles}
        found.append(atoms)
    return found


@pytest.fixture
def extxyz(molecules, tmp_path):
    ase.io.write(tmp_path / "mine.extxyz", atoms_of(molecules))
    return tmp_path / "mine.extxyz"


def test_every_format_prepares_the_same_data(molecules, extxyz, tmp_path, here):
    with ase.db.connect(tmp_path / "mine.db") as database:
        for atoms in atoms_of(molecules):
            database.write(
                atoms, key_value_pairs={k: v for k, v in atoms.info.items() if k != "smiles"}
            )
    width = max(len(m.atomic_numbers) for m in molecules)
    padded = lambda values, n: np.pad(values, [(0, n - len(values))] + [(0, 0)] * (values.ndim - 1))
    np.savez(
        tmp_path / "mine.npz",
        numbers=np.stack([padded(m.atomic_numbers, width) for m in molecules]),
        positions=np.stack([padded(np.round(m.positions, 4), width) for m in molecules]),
        homo=np.array([m.properties[HOMO] for m in molecules]),
    )
    files = [extxyz, tmp_path / "mine.db", tmp_path / "mine.npz"]
    datasets = [load(file, tmp_path) for file in files]
    assert len({d.passport["content_sha256"] for d in datasets}) == 1
    assert len(datasets[0].arrays.index) == len(molecules)


def test_labels_that_are_missing_weigh_nothing(molecules, tmp_path, here):
    """The statistics are those of the labels that are there, and duplicates stay together."""
    rng = np.random.default_rng(0)
    missing = rng.random(len(molecules)) < 0.4
    atoms = atoms_of(molecules)
    for k in np.flatnonzero(missing):
        del atoms[k].info["homo"]
    ase.io.write(tmp_path / "mine.extxyz", atoms + [atoms[k].copy() for k in range(10)])
    dataset = load(tmp_path / "mine.extxyz", tmp_path)
    train = dataset.split["train"]
    label = dataset.arrays.graph_labels["homo"]
    assert np.isnan(label[: len(atoms)]).tolist() == missing.tolist()
    _, normalizations = standardize(dataset, np.float64)
    assert normalizations["homo"].offset == pytest.approx(np.nanmean(label[train]))
    part = {g: name for name, graphs in dataset.split.items() for g in graphs.tolist()}
    assert all(part[k] == part[len(atoms) + k] for k in range(10))
    assert "10 rows repeat a molecule" in dataset.about["duplicates"]


def test_blank_cells_are_groups_of_their_own_and_in_no_part(molecules, tmp_path, here):
    """As a file has them: readers give None for a blank cell."""
    groups = {m.index: "one" if k < 6 else "" for k, m in enumerate(molecules)}
    names = ["train"] * 45 + ["validation", "test", ""] * 5
    parts = {m.index: name for m, name in zip(molecules, names, strict=True)}
    rows = rows_of(molecules, group=lambda m: groups[m.index], part=lambda m: parts[m.index])
    path, made = write_csv(tmp_path / "mine.csv", rows), {"geometry": "etkdg", "max_failed": 1.0}
    grouped = load(path, tmp_path, group="group", **made)
    assert all(len(graphs) > 3 for graphs in grouped.split.values())
    place = {g: part for part, graphs in grouped.split.items() for g in graphs.tolist()}
    assert len({place[g] for g in range(6)}) == 1
    divided = load(path, tmp_path, split="column", split_column="part", **made)
    sizes = {part: len(graphs) for part, graphs in divided.split.items()}
    assert sizes == {"train": 45, "validation": 5, "test": 5}


def test_files_of_three_parts_say_what_they_share(molecules, tmp_path, here):
    """Molecules may be shared, for a trajectory is of one; groups that were asked for may not."""
    atoms = atoms_of(molecules)
    for k, one in enumerate(atoms):
        one.info["group"] = f"g{k}"
    paths = {part: str(tmp_path / f"{part}.extxyz") for part in PARTS}
    for part, rows in zip(PARTS, (slice(30), slice(27, 45), slice(45, 60)), strict=True):
        ase.io.write(paths[part], atoms[rows])
    files = {f"{part}_path": paths[part] for part in PARTS[1:]}
    said = load(paths["train"], tmp_path, **files).about["duplicates"]
    assert "3 rows repeat a molecule" in said and "3 of 18 for validation, 0 of 15 for test" in said
    with pytest.raises(UserError, match="puts 3 molecules or groups into two parts"):
        load(paths["train"], tmp_path, group="group", **files)
    for one in atoms[45:]:
        del one.info["homo"]
    ase.io.write(paths["test"], atoms[45:])
    with pytest.raises(UserError, match="None of the 15 molecules for test has a label of homo"):
        load(paths["train"], tmp_path, **files)


def test_a_row_that_is_refused_may_have_any_label_and_the_first_may_lack_one(
    molecules, tmp_path, here
):
    rows = rows_of(molecules[:12])
    rows[0] |= {"smiles": "notasmiles", "homo": "CCN"}
    path = write_csv(tmp_path / "mine.csv", rows)
    assert len(load(path, tmp_path, geometry="etkdg", max_failed=0.5).arrays.index) == 11
    atoms = atoms_of(molecules[:12])
    del atoms[0].info["homo"]
    ase.io.write(tmp_path / "mine.extxyz", atoms)
    labels = load(tmp_path / "mine.extxyz", tmp_path).arrays.graph_labels["homo"]
    assert np.isnan(labels).tolist() == [True] + [False] * 11


def test_an_element_that_training_lacks_is_refused(molecules, tmp_path, here):
    """Its numbers would be those of an embedding that nothing has changed."""
    atoms = atoms_of(molecules[:12])
    atoms[7].numbers[0] = 15
    for k, one in enumerate(atoms):
        one.info["part"] = ("test", "validation")[k % 2] if k > 6 else "train"
    ase.io.write(tmp_path / "mine.extxyz", atoms)
    with pytest.raises(UserError, match="Row 8 is of the validation part and has P"):
        load(tmp_path / "mine.extxyz", tmp_path, split="column", split_column="part")
    for seed in range(5):  # a split that is made here gives training a row with each
        made = {"split_seed": seed, "fractions": (0.5, 0.25, 0.25)}
        split = load(tmp_path / "mine.extxyz", tmp_path, **made).split
        assert 7 in split["train"] and len(split["train"]) <= 9


def test_a_unit_changes_nothing_that_is_learned(molecules, tmp_path, here):
    standardized = []
    for unit, factor in (("hartree", 1.0), ("eV", HARTREE_IN_MEV / 1_000)):
        atoms = atoms_of(molecules)
        for one in atoms:
            one.info["homo"] *= factor
        ase.io.write(tmp_path / f"{unit}.extxyz", atoms)
        dataset = load(tmp_path / f"{unit}.extxyz", tmp_path, targets=(f"homo:{unit}",))
        standardized.append(standardize(dataset, np.float64)[0].graph_labels["homo"])
    np.testing.assert_allclose(*standardized, rtol=1e-6, atol=1e-9)


def test_references_of_atoms_are_fitted_to_training_alone(molecules, tmp_path, here):
    """What is left is orthogonal to the composition of the training part; all of it adds up."""
    atoms = atoms_of(molecules)
    total = {}
    for k, (one, m) in enumerate(zip(atoms, molecules, strict=True), 1):
        total[k] = float(m.properties[COLUMNS.index("U0")])
        one.info["U0"] = total[k]
    ase.io.write(tmp_path / "mine.extxyz", atoms)
    dataset = load(tmp_path / "mine.extxyz", tmp_path, targets=("U0:hartree",), extensive=("U0",))
    (target,) = dataset.targets
    assert target.readout == "sum" and target.extensive
    references, arrays = dataset.references["U0"], dataset.arrays
    number = lambda g: arrays.atomic_number[arrays.node_offset[g] : arrays.node_offset[g + 1]]
    left = arrays.graph_labels["U0"]
    for g, index in enumerate(arrays.index):
        whole = left[g] + sum(references[z] for z in number(g).tolist())
        assert whole == pytest.approx(total[int(index)], abs=1e-9)
    counts = np.array(
        [[np.sum(number(g) == z) for z in dataset.elements] for g in dataset.split["train"]]
    )
    np.testing.assert_allclose(counts.T @ left[dataset.split["train"]], 0, atol=1e-6)
    assert np.abs(left).max() < 1 < np.abs(list(total.values())).min()
    # From a file, its numbers are part of what the data are: a resume sees that they changed.
    assert "references" not in dataset.passport
    table = {symbols()[z]: value for z, value in references.items()}
    file = tmp_path / "references.json"
    options = {"targets": ("U0:hartree",), "extensive": ("U0",), "references": str(file)}
    file.write_text(json.dumps({"U0": table}))
    again = load(tmp_path / "mine.extxyz", tmp_path, **options)
    assert again.passport == dataset.passport | {"references": {"U0": table}}
    np.testing.assert_array_equal(again.arrays.graph_labels["U0"], left)
    file.write_text(json.dumps({"U0": table | {"H": float("nan")}}))
    with pytest.raises(UserError, match="The reference of H for 'U0' in .* is nan, but must be a"):
        load(tmp_path / "mine.extxyz", tmp_path, **options)


def test_other_elements_and_charges(tmp_path, here):
    """ase's g2 set has S, P, Si and Cl; an ion among neutral molecules needs a word."""
    names = "SO2 PH3 SiH4 HCl CH3Cl CH3SH C2H6 H2O NH3 CH4 CO2 C2H4 H2CO CH3OH SH2 Si2H6".split()
    atoms = [ase.build.molecule(name) for name in names]
    for k, one in enumerate(atoms):
        one.info["y"] = float(k)
    ase.io.write(tmp_path / "g2.extxyz", atoms)
    options = {"targets": ("y:1",), "fractions": (0.6, 0.2, 0.2)}
    dataset = load(tmp_path / "g2.extxyz", tmp_path, **options)
    assert {14, 15, 16, 17} <= set(dataset.elements)
    ion = ase.Atoms("OH", [(0, 0, 0), (0, 0, 0.97)], info={"y": 0.0, "charge": -1})
    ase.io.write(tmp_path / "ions.extxyz", [*atoms, ion])
    with pytest.raises(UserError, match=r"charges -1, 0; row 17 is the first of 1 that differ"):
        load(tmp_path / "ions.extxyz", tmp_path, **options)
    told = load(tmp_path / "ions.extxyz", tmp_path, charges="embed", **options)
    assert told.arrays.charge[-2:].tolist() == [-1, -1] and not told.arrays.charge[:-2].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("home:eV",)}, "no column 'home'. Did you mean 'homo'"),
        ({"targets": ("homo:evv",)}, "evv"),
        ({"targets": ("homo",)}, "unit"),
        ({"targets": ("homo:eV", "homo:meV")}, "names 'homo' twice"),
        ({"split": "file"}, "split_file"),
        ({"path": "nowhere.csv"}, "no file nowhere.csv"),
        ({"validation_path": "x.csv"}, "give both"),
        ({"extensive": ("U0",)}, "'U0', which is no target"),
        ({"split": "column"}, "split_column"),
        ({"geometry": "guess"}, "guess"),
        ({"max_failed": 2.0}, "from 0 to 1"),
    ],
)
def test_wrong_options_are_named(change, said, extxyz, tmp_path, here):
    path = change.get("path", extxyz)
    with pytest.raises(UserError, match=re.escape(said)):
        load(path, tmp_path, **{k: v for k, v in change.items() if k != "path"})


def test_too_many_bad_rows_stop_training_with_their_names(molecules, tmp_path, here):
    rows = rows_of(molecules[:20])
    rows[3]["smiles"] = "notasmiles"
    path = write_csv(tmp_path / "mine.csv", rows)
    with pytest.raises(UserError, match=r"1 of 20 rows have no molecule.*mine.csv row 4"):
        load(path, tmp_path, geometry="etkdg")
    dataset = load(path, tmp_path, geometry="etkdg", max_failed=0.1)
    assert dataset.passport["refused"] == {"bad_smiles": 1}
    assert 4 not in dataset.arrays.index and len(dataset.arrays.index) == 19


@pytest.mark.parametrize("cell", ["inf", "high", "1,2"])
def test_a_label_that_is_no_number_names_its_row(molecules, tmp_path, here, cell):
    rows = rows_of(molecules[:20])
    rows[7]["homo"] = cell
    with pytest.raises(UserError, match=rf"mine.csv, row 8: homo is '{cell}'"):
        load(write_csv(tmp_path / "mine.csv", rows), tmp_path, geometry="etkdg")


def test_a_preparation_that_was_killed_goes_on(extxyz, tmp_path, here, monkeypatch):
    whole = load(extxyz, tmp_path / "whole")
    monkeypatch.setattr(preparation, "ROWS_OF_A_PART", 16)
    monkeypatch.setattr(preparation, "_ROWS_OF_A_BLOCK", 8)
    make, made = preparation.make_molecule, []

    def dies(row, geometry):  # in the place of a signal: this process must live
        made.append(row.number)
        if len(made) == 40:
            raise KeyboardInterrupt
        return make(row, geometry)

    monkeypatch.setattr(preparation, "make_molecule", dies)
    with pytest.raises(KeyboardInterrupt):
        load(extxyz, tmp_path / "again")
    again = load(extxyz, tmp_path / "again")
    assert made[40] == 33  # the first row after two whole parts
    assert again.passport["content_sha256"] == whole.passport["content_sha256"]
    assert not list((tmp_path / "again").rglob("*.parts"))


# --- predicting ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(cache_dir, tmp_path_factory):
    """A tiny model with random weights, as a zip."""
    experiment = experiment_of(cache_dir)
    card = describe(experiment, {}, "CC0")
    tiny = package.with_hash(package.Package("tiny", weights_of(experiment), card))
    path = tmp_path_factory.mktemp("saved") / "tiny.zip"
    package.write(tiny, path)
    return path


@pytest.fixture
def quietly(monkeypatch, here):
    """Devices are those of the tests already."""
    monkeypatch.setattr("demetar.training.runtime.configure_for_prediction", lambda: None)
    monkeypatch.setattr(prediction, "ROWS_OF_A_CHUNK", 8)


@pytest.mark.filterwarnings("ignore:.*trained on the geometry")
def test_every_row_has_an_answer_and_bad_ones_change_nothing(molecules, saved, tmp_path, quietly):
    rows = rows_of(molecules[:12], note=lambda m: 'a, "b"')
    bad = {2: ("notasmiles", "bad_smiles"), 5: ("CCBr", "element"), 9: ("CC(=O)[O-]", "charge")}
    arguments = lambda name: [
        str(tmp_path / f"{name}.csv"),
        f"--model={saved}",
        f"--out={tmp_path}/{name}_out.csv",
        "--geometry=etkdg",
        "--batch-size=8",
    ]
    write_csv(tmp_path / "good.csv", rows)
    for place, (smiles, _) in bad.items():
        rows.insert(place, rows[0] | {"smiles": smiles})
    write_csv(tmp_path / "mixed.csv", rows)
    assert predict.main(arguments("good")) == predict.main(arguments("mixed")) == EXIT_DONE
    good, mixed = (read_csv(tmp_path / f"{name}_out.csv") for name in ("good", "mixed"))
    assert [{k: row[k] for k in rows[0]} for row in mixed] == rows
    for place, (_, status) in bad.items():
        assert mixed[place]["status"] == status and mixed[place]["message"]
        assert not mixed[place]["homo_pred"]
    left = [row for place, row in enumerate(mixed) if place not in bad]
    assert [float(row["homo_pred"]) for row in left] == pytest.approx(
        [float(row["homo_pred"]) for row in good], rel=1e-5
    )
    assert {row["status"] for row in left} == {"ok"}
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.filterwarnings("ignore:.*trained on the geometry")
def test_no_prediction_at_all_and_a_stop_at_the_first(saved, tmp_path, quietly, capsys):
    model = f"--model={saved}"
    assert predict.main(["notasmiles", "CCBr", model]) == EXIT_NOTHING
    assert "bad_smiles" in (out := capsys.readouterr().out) and "element" in out
    with pytest.raises(SystemExit) as stopped:
        predict.main(["CO", "CCBr", model, "--geometry=etkdg", "--on-error=stop"])
    assert stopped.value.code == 2 and "Row 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine.csv"], "--out is missing"),
        (["absent.csv", "--out=o.csv"], "There is no file absent.csv"),
        (["absent.smi", "--out=o.csv"], "no SMILES, and there is no such file"),
        (["mine.csv", "--out=o.docx"], "must end in one of"),
        (["taken.csv", "--out=o.csv"], "column 'homo_pred' already"),
        (["mine.csv", "--out=mine.csv"], "is the input"),
        (["mine.csv", "CCO", "--out=o.csv"], "give one file"),
        (["mine.csv", "--out=o.csv", "--batch-size=-1"], "must be 0 or more"),
        (["mine.csv", "--out=o.csv", "--smiles=structure"], "structure"),
    ],
)
def test_wrong_commands_are_refused_before_anything(
    arguments, said, molecules, saved, tmp_path, quietly, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = rows_of(molecules[:2])
    write_csv(tmp_path / "mine.csv", rows)
    write_csv(tmp_path / "taken.csv", [row | {"homo_pred": 1} for row in rows])
    with pytest.raises(SystemExit) as stopped:
        predict.main([*arguments, f"--model={saved}"])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


CHUNKS_OF_8 = """
import sys
from demetar import predict
from demetar.inference import prediction
prediction.ROWS_OF_A_CHUNK = 8
sys.exit(predict.main(sys.argv[1:]))
"""


def start(arguments, runner, **more):
    """A real process of `demetar predict`, in small chunks."""
    return subprocess.Popen(
        [sys.executable, "-c", CHUNKS_OF_8, *map(str, arguments)],
        cwd=REPOSITORY,
        env=runner.environment() | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_or_divided_a_prediction_has_the_same_bytes(saved, tmp_path, runner):
    every = list(read_raw(str(SAMPLE_FILE)))
    extxyz = tmp_path / "mine.extxyz"  # of one size: a program is compiled once
    ase.io.write(extxyz, atoms_of([m for m in every if len(m.atomic_numbers) == 18][:40]))
    out = lambda name: tmp_path / f"{name}.csv"
    arguments = lambda name: [extxyz, f"--model={saved}", f"--out={out(name)}", "--batch-size=8"]
    killed = start(arguments("killed"), runner)
    parts = tmp_path / "killed.csv.parts"
    while killed.poll() is None and len(list(parts.glob("[0-9]*.npz"))) < 2:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not out("killed").exists()
    there = {file: file.stat().st_mtime_ns for file in parts.glob("[0-9]*.npz")}
    place = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"}
    two = [start(arguments("two"), runner, JAX_PROCESS_ID=str(k), **place) for k in range(2)]
    for process in two:
        _, err = process.communicate(timeout=200)
        assert process.returncode == EXIT_DONE, err[-2000:]
    again = start(arguments("killed"), runner)
    while again.poll() is None and out("killed").exists() is False:
        for file, written in there.items():  # what is done is not done again
            with_time = file.stat().st_mtime_ns if file.exists() else written
            assert with_time == written
        time.sleep(0.05)
    _, err = again.communicate(timeout=200)
    assert again.returncode == EXIT_DONE, err[-2000:]
    assert out("killed").read_bytes() == out("two").read_bytes()
    assert len(read_csv(out("two"))) == 40


def test_what_a_process_does_that_was_thought_lost(molecules, saved, tmp_path, quietly):
    """Process 0 has predicted its chunks and deleted the parts: it ends, and nothing fails."""
    ase.io.write(tmp_path / "mine.extxyz", atoms_of(molecules[:12]))
    request = prediction.Prediction(
        load_model(saved), tmp_path / "mine.extxyz", tmp_path / "out.csv", batch_size=8
    )
    assert prediction._predict(request, lambda chunk: True, iter(())).total() == 0
    request.parts.mkdir()
    assert not prediction._others_come(request, itertools.repeat(None), patience=0)
    assert prediction._predict(request, lambda chunk: True, iter(())).total() == 12


def test_only_process_0_knows_that_nothing_was_predicted(saved, quietly, monkeypatch):
    monkeypatch.setattr(prediction, "predict_file", lambda request, here: Counter())
    place = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"}
    for process, code in ((0, EXIT_NOTHING), (1, EXIT_DONE)):
        for name, value in (place | {"JAX_PROCESS_ID": str(process)}).items():
            monkeypatch.setenv(name, value)
        assert predict.main(["CO", f"--model={saved}", "--out=out.csv"]) == code


@pytest.mark.filterwarnings("ignore:.*trained on the geometry")
def test_smiles_for_the_screen_are_of_the_first_process(saved, quietly, monkeypatch, capsys):
    place = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"}
    for process, lines in ((1, 0), (0, 2)):
        for name, value in (place | {"JAX_PROCESS_ID": str(process)}).items():
            monkeypatch.setenv(name, value)
        code = predict.main(["CO", f"--model={saved}", "--geometry=etkdg"])
        assert code == EXIT_DONE and len(capsys.readouterr().out.splitlines()) == lines


def test_a_file_is_scored_in_any_unit(molecules, saved, tmp_path, quietly, capsys):
    errors = []
    for unit, factor in (("hartree", 1.0), ("meV", HARTREE_IN_MEV)):
        atoms = atoms_of(molecules[:10])
        for one in atoms:
            one.info["homo"] *= factor
        del atoms[3].info["homo"]
        path = tmp_path / f"{unit}.extxyz"
        ase.io.write(path, atoms)
        assert evaluate.main([str(path), f"--model={saved}", f"--target=homo:{unit}"]) == EXIT_DONE
        found = __import__("json").loads(capsys.readouterr().out)
        assert found["rows"] == 10 and found["targets"]["homo"]["count"] == 9
        assert found["targets"]["homo"]["unit"] == "meV"
        errors.append(found["targets"]["homo"]["mae"])
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    out = tmp_path / "by_hand.csv"
    assert predict.main([str(tmp_path / "meV.extxyz"), f"--model={saved}", f"--out={out}"]) == 0
    rows = [row for row in read_csv(out) if row["homo"]]
    by_hand = np.mean([abs(float(r["homo_pred"]) - float(r["homo"])) for r in rows])
    assert errors[1] == pytest.approx(by_hand, rel=1e-9)


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_works_as_it_stands(tmp_path, cache_dir):
    """The commands of docs/guide/molecules.md, in their order, as a new user types them."""
    page = [fence for fence in ALL if fence.page == "docs/guide/molecules.md"]
    make = next(fence for fence in page if fence.language == "python")
    subprocess.run([sys.executable, "-c", make.text], cwd=tmp_path, check=True)
    commands = next(fence for fence in page if fence.language == "sh").commands()
    assert len(commands) == 5
    for _, command, *arguments in commands:
        process = subprocess.run(
            [sys.executable, "-m", "demetar.cli", command, *arguments],
            cwd=tmp_path,
            env=os.environ | {"XDG_CACHE_HOME": cache_dir, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )
        assert process.returncode == EXIT_DONE, (command, process.stderr[-2000:])
        if command == "predict" and "CCO" in arguments:
            assert process.stdout.splitlines()[0].startswith("smiles,homo_pred,ood,")
    rows = read_csv(tmp_path / "predicted.csv")
    good = [row for row in rows if row["status"] == "ok"]
    assert (len(rows), len(good)) == (500, 495)  # five strained cages
    # It has learned something: the mean alone errs by 0.0164 hartree
    error = np.mean([abs(float(row["homo_pred"]) - float(row["homo"])) for row in good])
    assert error < 0.01
