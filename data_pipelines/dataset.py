"""A data set as training sees it: graphs with edges and targets, a split, buckets, a passport."""

import dataclasses

import numpy as np

from data_pipelines import qm9
from data_pipelines.edges import build_edges
from data_pipelines.pipeline import GraphArrays
from data_pipelines.plan import MAX_BUCKETS, Bucket, buckets_with_limits, choose_buckets
from data_pipelines.splits import get_split
from data_pipelines.targets import Target, get_targets, reported_values
from demetar.errors import UserError

DATASETS = ("qm9",)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What `load_dataset` gives.

    Attributes:
      name: of the data set.
      arrays: all graphs; targets in reported units, atom references subtracted, float64.
      targets: rows of the table of targets, in the order of `arrays.target`'s columns.
      split: positions of the graphs of `train`, `validation` and `test`.
      buckets: the compiled shapes, ascending; enough for every graph.
      passport: counts, ids, units and hashes.
    """

    name: str
    arrays: GraphArrays
    targets: tuple[Target, ...]
    split: dict[str, np.ndarray]
    buckets: tuple[Bucket, ...]
    passport: dict


def load_dataset(
    *, name, source, path, cache_dir, targets, split, edges, edge_cutoff, buckets, **_
) -> Dataset:
    """Loads (preparing it first where needed) what the group `config.data` names."""
    if name not in DATASETS:
        raise UserError(f"Unknown config.data.name {name!r}. Known: {', '.join(DATASETS)}.")
    rows = get_targets(targets)
    molecules, passport = qm9.load(source, path, cache_dir)
    parts = get_split(split, molecules.index)
    edge_offset, edge_rows = build_edges(molecules, edges, edge_cutoff)
    arrays = GraphArrays(
        index=molecules.index,
        node_offset=molecules.node_offset,
        atomic_number=molecules.atomic_number,
        position=molecules.position,
        edge_offset=edge_offset,
        edges=edge_rows,
        target=reported_values(rows, molecules.properties, molecules.composition()),
    )
    if buckets:
        chosen = buckets_with_limits(arrays.sizes, buckets)
    else:
        chosen = choose_buckets(arrays.sizes, MAX_BUCKETS)
    return Dataset(name, arrays, rows, parts, chosen, passport)
