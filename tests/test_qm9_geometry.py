"""QM9 with geometries made from SMILES, and a limit of molecules."""

import numpy as np
import pytest

from data_pipelines.dataset import PARTS
from data_pipelines.edges import rows_of
from data_pipelines.errors import UserError
from data_pipelines.molecules.record import Refusal
from data_pipelines.qm9 import geometry, preparation
from data_pipelines.registry import load_dataset


@pytest.fixture
def serial(monkeypatch):
    """No pool: the numbers of the rows that were made."""
    made = []

    def map_rows(function, rows):
        for row in rows:
            made.append(row.number)
            yield function(row)

    monkeypatch.setattr(geometry, "map_rows", map_rows)
    return made


def load(cache_dir, **options):
    options = {"targets": ("homo", "U0"), "split": "random", "edges": "bonds"} | options
    return load_dataset(
        name="qm9", source="sample", path="", edge_cutoff=0.0, cache_dir=str(cache_dir), **options
    )


def numbers(dataset):
    return {part: dataset.arrays.index[rows].tolist() for part, rows in dataset.split.items()}


def test_a_limit_draws_from_each_part(cache_dir):
    full, some, few = (numbers(load(cache_dir, limit=n)) for n in (0, 100, 20))
    assert [len(some[part]) for part in PARTS] == [100, 20, 20]
    for part in PARTS:
        assert set(few[part]) < set(some[part]) < set(full[part])
    with pytest.raises(UserError, match="config.data.limit is 3"):
        load(cache_dir, limit=3)


def test_made_geometries_have_the_labels_and_parts_of_the_file(cache_dir, serial):
    file = load(cache_dir, limit=10)
    made = load(cache_dir, limit=10, geometry="etkdg")
    both = load(cache_dir, limit=10, geometry="file+etkdg")
    assert len(serial) == 14  # made once for both
    lost = set(made.passport["geometry"]["failed_numbers"])
    assert made.passport["content_sha256"] == file.passport["content_sha256"]  # of the source
    for part in PARTS:
        expected = sorted(set(numbers(file)[part]) - lost)
        assert sorted(numbers(made)[part]) == expected
        assert sorted(numbers(both)[part]) == sorted(numbers(file)[part] + expected)
    for data in (made, both):
        assert "etkdg" in data.split_name and "etkdg" in data.about["geometry"]
        for g in np.concatenate(list(data.split.values())):
            k = np.searchsorted(file.arrays.index, data.arrays.index[g])
            for name in ("homo", "U0"):
                assert data.arrays.graph_labels[name][g] == file.arrays.graph_labels[name][k]
            atoms = [
                np.sort(d.arrays.atomic_number[slice(*d.arrays.node_offset[i : i + 2])])
                for d, i in ((data, g), (file, k))
            ]
            np.testing.assert_array_equal(*atoms)
    # The second half of `both` is what was made.
    n = len(made.arrays.index)
    np.testing.assert_array_equal(both.arrays.index[-n:], made.arrays.index)
    np.testing.assert_array_equal(
        both.arrays.position[-len(made.arrays.position) :], made.arrays.position
    )
    graphs = np.arange(n)
    np.testing.assert_array_equal(
        rows_of(both.arrays.edges, graphs + len(both.arrays.index) - n),
        rows_of(made.arrays.edges, graphs),
    )


def test_what_fails_is_left_out_and_counted(cache_dir, monkeypatch):
    def map_rows(function, rows):
        for k, row in enumerate(rows):
            yield Refusal("no_conformer", "") if k % 2 else function(row)

    monkeypatch.setattr(geometry, "map_rows", map_rows)
    monkeypatch.setattr(geometry, "_VERSION", "a test of failures")
    file, made = load(cache_dir, limit=30), load(cache_dir, limit=30, geometry="etkdg")
    kept = sum(len(rows) for rows in made.split.values())
    assert made.passport["geometry"]["failed"] >= 21 and kept == len(made.arrays.index) <= 21
    for part in PARTS:
        assert set(numbers(made)[part]) <= set(numbers(file)[part])


def test_a_killed_preparation_goes_on(cache_dir, serial, monkeypatch):
    monkeypatch.setattr(geometry, "_VERSION", "a test of resuming")
    monkeypatch.setattr(geometry, "_MOLECULES_OF_A_PART", 4)
    whole = geometry.make_molecule

    def killed(row, geometry):
        if len(serial) == 10:
            raise KeyboardInterrupt
        return whole(row, geometry)

    monkeypatch.setattr(geometry, "make_molecule", killed)
    with pytest.raises(KeyboardInterrupt):
        load(cache_dir, limit=10, geometry="etkdg")
    monkeypatch.setattr(geometry, "make_molecule", whole)
    dataset = load(cache_dir, limit=10, geometry="etkdg")
    assert serial[10:12] == serial[8:10]  # two parts of 4 were whole
    assert len(serial) == 10 + 14 - 8
    assert len(dataset.arrays.index) + dataset.passport["geometry"]["failed"] == 14
    monkeypatch.setattr(geometry, "_VERSION", 1)
    undisturbed = load(cache_dir, limit=10, geometry="etkdg")
    np.testing.assert_array_equal(dataset.arrays.position, undisturbed.arrays.position)


def test_options_that_do_not_go_together(cache_dir):
    with pytest.raises(UserError, match="node_features"):
        load(cache_dir, geometry="mmff", node_features="pyg")
    with pytest.raises(UserError, match="Did you mean 'mmff'"):
        load(cache_dir, geometry="mmf")


def test_records_of_some_molecules(sample, cache_dir):
    folder = preparation.folder_of("sample", cache_dir=cache_dir)
    wanted = np.array([3, 499, 10])
    found = [r for rows in preparation.records_of(folder, "", 2, wanted) for r in rows]
    assert [int(r["index"]) for r in found] == sample[0].index[wanted].tolist()
