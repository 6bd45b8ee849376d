"""Splits of molecules of one's own: pure functions of keys, groups and a seed.

Rows with the same key (the same molecule) or the same group never stand in two parts. So what is
divided are clusters: rows that keys and groups join, directly or through other rows. The order of
the rows decides nothing: clusters are shuffled by a hash of their smallest key.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.dataset import PARTS
from data_pipelines.errors import UserError, check_known

KINDS = ("random", "scaffold", "column", "file", "kfold")
# What a column or a file may call a part.
_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_NAMED = 5  # rows that a message names


def make_split(
    kind: str,
    *,
    keys: Sequence,
    groups: Sequence | None = None,
    scaffolds: Sequence | None = None,
    column: Sequence | None = None,
    file: str = "",
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    fold: int = 0,
    num_folds: int = 5,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    num_rows: int = 0,
    elements: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Positions of the rows of each of `PARTS`, int64, ascending.

    Args:
      kind: `random`; `scaffold` (rows with one scaffold stay together, large ones are trained on;
        all molecules without rings have the scaffold ""); `column` and `file` (as they say);
        `kfold` (test is fold `fold`, validation the next, train the rest).
      keys: [n] of each row, equal for the same molecule; text or numbers.
      groups: [n], equal for rows that belong together; None: no groups.
      scaffolds: [n], for `scaffold`.
      column: [n] name of a part (train, validation, test), for `column`; blank: left out.
      file: JSON, for `file`: chemprop's `[{"train": [0, 1], "val": "2-5,9", "test": []}]`, of
        which the fold `fold` is taken, or one such object. Rows are counted from 0.
      fractions: of train, validation and test, for `random` and `scaffold`.
      fold, num_folds: for `kfold`.
      seed: of the shuffle, for `random`, `scaffold` and `kfold`.
      numbers: [n] which row of the file each is, from 1, if some were refused.
      num_rows: of the file, those that were refused included; 0: none were.
      elements: [n, Z] which elements each row has; for `random` and `scaffold`, where training gets
        rows with each of them.

    Raises:
      UserError: a part would be empty; a column or file puts equal rows into two parts.
    """
    check_known("config.data.split:", kind, KINDS)
    numbers = np.arange(len(keys)) + 1 if numbers is None else numbers
    if len(keys) == 0:
        raise UserError("There are no molecules to split: all rows were refused, or none read.")
    if kind in ("column", "file"):
        if kind == "column":
            part = _of_column(column, numbers)
        else:
            part = _of_file(file, fold, numbers, num_rows or len(keys))
        check_together(part, keys, groups)
    else:
        cluster = _clusters(keys, groups, scaffolds if kind == "scaffold" else None)
        order = _shuffled(cluster, keys, seed)
        size = np.bincount(cluster)
        if kind == "kfold":
            part = _folds(order, size, fold, num_folds)[cluster]
        else:
            part = _fill(order, size, fractions, large_first=kind == "scaffold")[cluster]
            if elements is not None:
                _teach(part, elements, cluster, order)
    split = {name: np.flatnonzero(part == k) for k, name in enumerate(PARTS)}
    for name, rows in split.items():
        if not len(rows):
            sizes = ", ".join(f"{len(rows)} for {name}" for name, rows in split.items())
            raise UserError(
                f"Split {kind!r} leaves no molecules for {name}: {sizes}. Rows of one molecule, "
                "group or scaffold stay together. Give more rows, other fractions or another split."
            )
    return split


# --- clusters --------------------------------------------------------------------------------


def _clusters(*columns: Sequence | None) -> np.ndarray:
    """[n] number of the cluster of each row: what equal values of any column join."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    columns = [np.unique(np.asarray(c), return_inverse=True)[1] for c in columns if c is not None]
    num = len(columns[0])
    # A graph of rows and values: row k is joined to its value in each column.
    starts = np.cumsum([num, *(c.max() + 1 for c in columns)])
    values = np.concatenate([c + start for c, start in zip(columns, starts, strict=False)])
    rows = np.tile(np.arange(num), len(columns))
    ones = np.ones(len(rows), np.int8)
    graph = coo_array((ones, (rows, values)), shape=(starts[-1], starts[-1]))
    return np.unique(connected_components(graph, directed=False)[1][:num], return_inverse=True)[1]


def _shuffled(cluster: np.ndarray, keys: Sequence, seed: int) -> np.ndarray:
    """Numbers of the clusters in an order that only their keys and the seed decide."""
    texts = np.asarray(keys).astype(np.str_)
    order = np.lexsort((texts, cluster))
    first = order[np.unique(cluster[order], return_index=True)[1]]
    hashes = [hashlib.sha256(f"{seed}:{texts[row]}".encode()).digest() for row in first]
    return np.array(sorted(range(len(first)), key=hashes.__getitem__))


def _fill(order, size, fractions, large_first: bool) -> np.ndarray:
    """Part of each cluster, filling one part after the other.

    `large_first`: what is larger than half of a smaller part goes first, so into training.
    """
    fractions = np.asarray(fractions, float)
    parts = fractions.shape == (3,) and (fractions >= 0).all()  # nan is not
    if not (parts and abs(fractions.sum() - 1) <= 1e-6):
        raise UserError(
            f"The fractions {tuple(fractions.tolist())} are not three numbers that add up to 1, "
            "such as (0.8, 0.1, 0.1)."
        )
    wanted = np.diff(np.round(np.cumsum([0, *fractions]) * size.sum())).astype(int)
    if large_first:
        large = size[order] > wanted[1:].min() / 2
        order = np.concatenate([order[large], order[~large]])
    room, part = wanted.tolist(), np.empty(len(size), np.int64)
    for cluster in order.tolist():
        n = int(size[cluster])
        fits = [k for k in range(3) if room[k] >= n]
        chosen = fits[0] if fits else room.index(max(room))
        room[chosen] -= n
        part[cluster] = chosen
    return part


def _teach(part, elements, cluster, order) -> None:
    """Moves the first cluster with an element that training lacks into it; changes `part`."""
    for has_n in elements.T:
        if not has_n[part == 0].any():
            having = set(cluster[has_n].tolist())
            part[cluster == next(c for c in order.tolist() if c in having)] = 0


def _folds(order, size, fold: int, num_folds: int) -> np.ndarray:
    if num_folds < 3 or not 0 <= fold < num_folds:
        raise UserError(
            f"Fold {fold} of {num_folds} does not exist: there are at least 3 folds (train, "
            f"validation, test), and they count from 0 to {max(num_folds, 3) - 1}."
        )
    middle = np.cumsum(size[order]) - size[order] / 2
    number = np.empty(len(size), np.int64)
    number[order] = np.minimum(middle * num_folds / size.sum(), num_folds - 1).astype(int)
    part = np.zeros(len(size), np.int64)
    part[number == (fold + 1) % num_folds] = PARTS.index("validation")
    part[number == fold] = PARTS.index("test")
    return part


# --- splits that somebody else made ----------------------------------------------------------


def _part_number(name, where: str) -> int:
    known = _NAMES.get(str(name).strip().lower())
    if known is None:
        raise UserError(f"{where} names the part {str(name)!r}: write {', '.join(PARTS)}.")
    return PARTS.index(known)


def _of_column(column: Sequence, numbers: Sequence[int]) -> np.ndarray:
    """[n] number of the part; -1 where it is blank."""
    blank = lambda value: value is None or str(value).strip().lower() in ("", "nan")
    return np.array(
        [
            -1 if blank(v) else _part_number(v, f"Row {number} of the split's column")
            for number, v in zip(numbers, column, strict=True)
        ],
        np.int64,
    )


def _of_file(file: str, fold: int, numbers: Sequence[int], num_rows: int) -> np.ndarray:
    """[n] number of the part; -1 for rows that the file does not name."""
    remedy = 'Write {"train": [0, 1], "validation": "2-5", "test": [6]}, rows counted from 0.'
    try:
        read = json.loads(pathlib.Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"The split file {file!r} cannot be read as JSON: {error}. {remedy}"
        ) from error
    if isinstance(read, list):
        if not 0 <= fold < len(read):
            raise UserError(f"{file} has {len(read)} splits, and number {fold} is asked for.")
        read = read[fold]
    if not isinstance(read, dict):
        raise UserError(f"{file} has no parts. {remedy}")
    position = {int(number) - 1: k for k, number in enumerate(numbers)}
    part = np.full(len(numbers), -1)
    for name, rows in read.items():
        chosen = _part_number(name, str(file))
        for row in _rows(rows, f"{file}, part {name!r}", remedy):
            if row >= num_rows:
                raise UserError(
                    f"{file} puts row {row} into {PARTS[chosen]}, but there are {num_rows} rows, "
                    "counted from 0: it is of another file, or counts from 1."
                )
            k = position.get(row, -1)  # no position: its row was refused
            if k >= 0 and part[k] not in (-1, chosen):
                raise UserError(
                    f"{file} puts row {row} into {PARTS[part[k]]} and into {PARTS[chosen]}: choose."
                )
            if k >= 0:
                part[k] = chosen
    return part


def _rows(rows, where: str, remedy: str) -> list[int]:
    """Numbers of rows: a list of them, or text such as `0-5,9` (both ends count)."""
    try:
        if isinstance(rows, str):
            found = []
            for piece in filter(None, rows.replace(" ", "").split(",")):
                first, _, last = piece.partition("-")
                found += range(int(first), int(last or first) + 1)
            return found
        if all(isinstance(row, int) and row >= 0 for row in rows):
            return list(rows)
    except (ValueError, TypeError):
        pass
    raise UserError(f"{where}: {str(rows)[:60]!r} is no list of rows. {remedy}")


def check_together(part: np.ndarray, *columns: Sequence | None) -> None:
    """Refuses rows with a value of a column in common, directly or through others, in two parts.

    Args:
      part: [n] number of the part of each row; -1: of none.
      columns: [n] values each, or None.
    """
    cluster = _clusters(*columns)
    kept = np.flatnonzero(part >= 0)
    low, high = np.full(cluster.max() + 1, len(PARTS)), np.full(cluster.max() + 1, -1)
    np.minimum.at(low, cluster[kept], part[kept])
    np.maximum.at(high, cluster[kept], part[kept])
    torn = np.flatnonzero(low < high)
    if len(torn):
        rows = kept[cluster[kept] == torn[0]]
        names = ", ".join(f"row {row + 1} in {PARTS[part[row]]}" for row in rows[:_NAMED])
        raise UserError(
            f"The split puts {len(torn)} molecules or groups into two parts, such as: {names} (of "
            "the rows that were read). Give equal rows one part, or leave one of them out."
        )


# --- duplicates ------------------------------------------------------------------------------


class Conflict(NamedTuple):
    """Rows of one molecule whose labels differ.

    Attributes:
      key: of the molecule.
      name: of the label.
      rows: positions, ascending; those with a label.
      low, high: smallest and largest label.
    """

    key: str
    name: str
    rows: tuple[int, ...]
    low: float
    high: float


def conflicts(keys: Sequence, labels: Mapping[str, np.ndarray]) -> list[Conflict]:
    """Duplicates with different labels, in the order of their first rows.

    Args:
      keys: [n], equal for the same molecule.
      labels: name -> [n] float; NaN, which is a missing label, differs from nothing.
    """
    keys = np.asarray(keys)
    key = np.unique(keys, return_inverse=True)[1]
    found = []
    for name, label in labels.items():
        label = np.asarray(label, np.float64)
        known = np.flatnonzero(~np.isnan(label))
        low, high = (
            np.full(key.max(initial=0) + 1, np.inf),
            np.full(key.max(initial=0) + 1, -np.inf),
        )
        np.minimum.at(low, key[known], label[known])
        np.maximum.at(high, key[known], label[known])
        for k in np.flatnonzero(low < high):
            rows = known[key[known] == k]
            text = str(keys[rows[0]])
            found.append(Conflict(text, name, tuple(rows.tolist()), float(low[k]), float(high[k])))
    return sorted(found, key=lambda conflict: conflict.rows)
