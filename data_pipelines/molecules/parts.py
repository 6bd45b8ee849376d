"""Parts of a preparation: what is kept of 2,048 rows, in one .npz, and all parts joined."""

import pathlib
from collections import Counter

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.molecules.record import Molecule, Refusal
from data_pipelines.molecules.units import Column

# Texts of each molecule that are joined as numbers: equal where the texts are.
TEXTS = ("identity", "scaffold", "group", "part")
_NAMED_REFUSALS = 1_000  # rows that the passport names; it counts all


def columns_of_part(targets: tuple[Column, ...], chunk: list[dict], first: int) -> dict:
    """The arrays of one part.

    Args:
      targets: T columns to learn.
      chunk: of each row `number`, `source` and `made`; of molecules also `labels` [T],
        `node_labels` and `TEXTS`.
      first: index of its first row, counted over all files from 1.
    """
    kept = [(first + k, row) for k, row in enumerate(chunk) if isinstance(row["made"], Molecule)]
    refused = [row for row in chunk if isinstance(row["made"], Refusal)]
    molecules = [row["made"] for _, row in kept]
    of_rows = lambda name, dtype: np.array([row[name] for _, row in kept], dtype)
    field = lambda name, dtype: np.array([getattr(m, name) for m in molecules], dtype)
    joined = lambda name, empty: np.concatenate([empty, *(getattr(m, name) for m in molecules)])
    columns = {
        "index": np.array([index for index, _ in kept], np.int32),
        "number": of_rows("number", np.int32),
        "source": of_rows("source", np.uint8),
        "nodes": np.array([len(m.atomic_numbers) for m in molecules], np.int64),
        "edges": np.array([len(m.bonds) for m in molecules], np.int64),
        "atomic_number": joined("atomic_numbers", np.zeros(0, np.uint8)),
        "position": joined("positions", np.zeros((0, 3), np.float32)),
        "bonds": joined("bonds", np.zeros((0, 3), np.uint16)),
        "charge": field("charge", np.int8),
        "multiplicity": field("multiplicity", np.int16),
        "bonds_from": field("bonds_from", np.str_),
        "notes": np.array(["; ".join(m.notes) for m in molecules], np.str_),
        "labels": of_rows("labels", np.float64).reshape(len(kept), len(targets)),
        "refused_source": np.array([row["source"] for row in refused], np.uint8),
        "refused_number": np.array([row["number"] for row in refused], np.int32),
        "refused_status": np.array([row["made"].status for row in refused], np.str_),
        "refused_message": np.array([row["made"].message for row in refused], np.str_),
    }
    columns |= {name: of_rows(name, np.str_) for name in TEXTS}
    for column in targets:
        given = [row["node_labels"].get(column.name) for _, row in kept]
        if any(values is not None for values in given):
            columns[f"node_{column.name}"] = _filled(column.name, given, columns["nodes"])
    return columns


def _filled(name: str, given: list, nodes: np.ndarray) -> np.ndarray:
    """All of them one after the other, [atoms] or [atoms, 3]; NaN where there is None.

    Args:
      name: of the column, for a message.
      given: arrays of each molecule or part, or None.
      nodes: how many atoms each has.
    """
    shapes = {values.shape[1:] for values in given if values is not None}
    if len(shapes) > 1:
        raise UserError(f"Column {name!r} has numbers of some atoms, vectors of others: choose.")
    (shape,) = shapes
    pairs = zip(given, nodes, strict=True)
    return np.concatenate([np.full((n, *shape), np.nan) if v is None else v for v, n in pairs])


def join(files: list[pathlib.Path], targets: tuple[Column, ...]) -> tuple[dict, dict]:
    """All parts in one: arrays, and facts for the passport."""
    parts = [dict(np.load(file, allow_pickle=False)) for file in files]
    all_of = lambda name: np.concatenate([part[name] for part in parts])
    offset = lambda counts: np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    arrays = {
        name: all_of(name) for name in ("index", "number", "source", "charge", "multiplicity")
    }
    arrays |= {name: all_of(name) for name in ("atomic_number", "position", "bonds", "labels")}
    arrays |= {"node_offset": offset(all_of("nodes")), "bond_offset": offset(all_of("edges"))}
    for name in TEXTS:
        arrays[name] = np.unique(all_of(name), return_inverse=True)[1].astype(np.int64)
    node_columns = []
    for column in targets:
        given = [part.get(f"node_{column.name}") for part in parts]
        if any(values is not None for values in given):
            nodes = [part["nodes"].sum() for part in parts]
            arrays[f"node_{column.name}"] = _filled(column.name, given, nodes)
            node_columns.append(column.name)
    refused = ("refused_source", "refused_number", "refused_message")
    named = zip(*(all_of(name)[:_NAMED_REFUSALS].tolist() for name in refused), strict=True)
    count = lambda name: dict(Counter(text for text in all_of(name).tolist() if text))
    facts = {
        "parts": sorted(set(all_of("part").tolist())),
        "bonds_from": count("bonds_from"),
        "notes": dict(Counter(count("notes")).most_common(10)),
        "refused": count("refused_status"),
        "refused_rows": [list(row) for row in named],
        "node_columns": node_columns,
    }
    return arrays, facts
