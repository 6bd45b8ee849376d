"""Splits of own molecules: nothing equal stands in two parts, whatever the split."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.dataset import PARTS
from data_pipelines.errors import UserError
from data_pipelines.molecules.splits import conflicts, make_split


@st.composite
def rows(draw):
    n = draw(st.integers(20, 60))
    column = lambda most: draw(st.lists(st.integers(0, most), min_size=n, max_size=n))
    groups = column(40) if draw(st.booleans()) else None
    keys = [f"key{k}" for k in column(30)]
    return {"keys": keys, "groups": groups, "scaffolds": [f"s{k}" for k in column(25)]}


def split_or_none(kind, data, **options):
    try:
        return make_split(kind, **data, **options)
    except UserError as error:
        assert "leaves no molecules for" in str(error)
        return None


@settings(max_examples=60, deadline=None)
@given(
    rows(), st.sampled_from(["random", "scaffold", "kfold"]), st.integers(0, 5), st.integers(0, 4)
)
def test_equal_rows_never_straddle(data, kind, seed, fold):
    split = split_or_none(kind, data, seed=seed, fold=fold)
    if split is None:
        return
    assert list(split) == list(PARTS)
    for part in split.values():
        assert part.dtype == np.int64 and (np.diff(part) > 0).all() and len(part)
    everything = np.sort(np.concatenate(list(split.values())))
    np.testing.assert_array_equal(everything, np.arange(len(data["keys"])))
    columns = [data["keys"], data["groups"], data["scaffolds"] if kind == "scaffold" else None]
    for column in filter(None, columns):
        values = [{column[k] for k in part} for part in split.values()]
        assert not values[0] & values[1] and not values[0] & values[2] and not values[1] & values[2]


@settings(max_examples=30, deadline=None)
@given(rows(), st.sampled_from(["random", "scaffold", "kfold"]), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_decides_nothing(data, kind, random):
    split = split_or_none(kind, data)
    order = list(range(len(data["keys"])))
    random.shuffle(order)
    again = split_or_none(kind, {k: v and [v[i] for i in order] for k, v in data.items()})
    if split is None or again is None:
        assert split is again
        return
    for part in PARTS:
        assert sorted(order[k] for k in again[part]) == split[part].tolist()


def test_sizes_and_seed():
    keys = [f"k{k}" for k in range(1_000)]
    split = make_split("random", keys=keys)
    assert [len(split[part]) for part in PARTS] == [800, 100, 100]
    other = make_split("random", keys=keys, seed=1)
    assert 0 < len(np.intersect1d(split["test"], other["test"])) < 30
    quarters = make_split("random", keys=keys, fractions=(0.5, 0.25, 0.25))
    assert [len(quarters[part]) for part in PARTS] == [500, 250, 250]


def test_folds_are_a_partition():
    keys = [f"k{k % 90}" for k in range(103)]
    splits = [make_split("kfold", keys=keys, fold=k, num_folds=4) for k in range(4)]
    tests = np.concatenate([split["test"] for split in splits])
    np.testing.assert_array_equal(np.sort(tests), np.arange(103))
    for k in range(4):
        np.testing.assert_array_equal(splits[k]["validation"], splits[(k + 1) % 4]["test"])
    for fold, folds in ((4, 4), (-1, 4), (0, 2)):
        with pytest.raises(UserError, match="does not exist"):
            make_split("kfold", keys=keys, fold=fold, num_folds=folds)


def test_large_scaffolds_are_trained_on():
    scaffolds = ["large"] * 30 + [f"s{k}" for k in range(70)]
    keys = [f"k{k}" for k in range(100)]
    for seed in range(5):
        split = make_split("scaffold", keys=keys, scaffolds=scaffolds, seed=seed)
        assert set(range(30)) <= set(split["train"].tolist())
        assert [len(split[part]) for part in PARTS] == [80, 10, 10]


def test_an_empty_part_is_named_with_numbers():
    with pytest.raises(UserError, match="no molecules for validation: 9 for train, 0 for valid"):
        make_split("random", keys=["a"] * 9)
    with pytest.raises(UserError, match="all rows were refused"):
        make_split("random", keys=[])
    for fractions in ((0.8, 0.1, 0.2), (0.9, 0.1, float("nan"))):
        with pytest.raises(UserError, match="add up to 1"):
            make_split("random", keys=["a", "b", "c"], fractions=fractions)


def test_column():
    column = ["train", "Train ", "valid", "test", "", None, float("nan")]
    split = make_split("column", keys=list("abcdefg"), column=column)
    assert {k: v.tolist() for k, v in split.items()} == {
        "train": [0, 1],
        "validation": [2],
        "test": [3],
    }
    with pytest.raises(UserError, match="'trian'.*write train"):
        make_split("column", keys=list("abc"), column=["trian", "val", "test"])
    with pytest.raises(UserError, match="row 1 in train, row 3 in test"):
        make_split("column", keys=list("aba"), column=["train", "val", "test"])
    # A row that is left out stands in no part.
    make_split("column", keys=list("abca"), column=["train", "val", "test", ""])


@pytest.mark.parametrize(
    "content",
    [
        [{"train": [0, 1, 2], "val": [3], "test": [4]}],  # as chemprop writes it
        [{"train": "0-2", "val": "3", "test": "4"}],
        {"train": "0, 1-2", "validation": [3], "test": "4"},
    ],
)
def test_file(tmp_path, content):
    file = tmp_path / "splits.json"
    file.write_text(json.dumps(content))
    split = make_split("file", keys=list("abcdef"), file=str(file))
    assert [split[part].tolist() for part in PARTS] == [[0, 1, 2], [3], [4]]
    # Row 2 of the file (counted from 1) was refused.
    split = make_split("file", keys=list("acde"), file=str(file), numbers=[1, 3, 4, 5], num_rows=6)
    assert [split[part].tolist() for part in PARTS] == [[0, 1], [2], [3]]


def test_files_that_are_wrong(tmp_path):
    file = tmp_path / "splits.json"
    cases = {
        "not JSON": "cannot be read as JSON",
        "[]": "has 0 splits",
        '{"train": [0], "dev": [1], "tset": [2]}': "'tset'",
        '{"train": [0, 1], "val": [1], "test": [2]}': "row 1 into train and into validation",
        '{"train": ["a"], "val": [1], "test": [2]}': "is no list of rows",
        '{"train": "0-x", "val": [1], "test": [2]}': "is no list of rows",
        '{"train": [0], "val": [], "test": [2]}': "no molecules for validation",
        '{"train": [0], "val": [1], "test": []}': "no molecules for test",
        '{"train": [0], "val": [1], "test": [9]}': "row 9 into test, but there are 4 rows",
        '{"train": [0, 3], "val": [1], "test": [2]}': None,
    }
    for text, message in cases.items():
        file.write_text(text)
        if message is None:
            make_split("file", keys=list("abcd"), file=str(file))
            continue
        with pytest.raises(UserError, match=message):
            make_split("file", keys=list("abcd"), file=str(file))
    with pytest.raises(UserError, match="nowhere.json"):
        make_split("file", keys=list("abcd"), file="nowhere.json")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 2.0, np.nan])), max_size=30))
def test_conflicts_are_what_a_search_finds(pairs):
    keys, labels = [k for k, _ in pairs], np.array([label for _, label in pairs])
    found = {c.key: c for c in conflicts(keys, {"homo": labels})}
    for key in set(keys):
        rows = [k for k in range(len(keys)) if keys[k] == key and not np.isnan(labels[k])]
        if len({labels[k] for k in rows}) > 1:
            assert found.pop(str(key)) == (str(key), "homo", tuple(rows), 1.0, 2.0)
    assert not found
