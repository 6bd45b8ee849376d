"""From molecules to padded graphs of few shapes, so that new molecules do not compile again."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.batch_plan import Bucket
from data_pipelines.batching import GraphArrays
from data_pipelines.edges import make_edges
from data_pipelines.molecules.record import Molecule

# Node limits; above the last, multiples of it.
_NODES = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)


@dataclasses.dataclass(frozen=True)
class _Molecules:
    """What `make_edges` looks at."""

    node_offset: np.ndarray
    position: np.ndarray
    bond_offset: np.ndarray
    bonds: np.ndarray


def arrays_of(
    molecules: Sequence[Molecule], edges: str, cutoff: float, dtype, with_charge: bool = False
) -> GraphArrays:
    """Graphs of molecules, by the same rules as in training.

    Args:
      molecules: at least one.
      edges, cutoff: as `make_edges` takes them.
      dtype: of a batch.
      with_charge: whether each node has the charge of its molecule.
    """
    joined = lambda name: np.concatenate([getattr(m, name) for m in molecules])
    num_nodes_G = np.array([len(m.atomic_numbers) for m in molecules])
    offset = lambda counts: np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = _Molecules(
        node_offset=offset(num_nodes_G),
        position=joined("positions"),
        bond_offset=offset([len(m.bonds) for m in molecules]),
        bonds=joined("bonds").reshape(-1, 3).astype(np.uint16),
    )
    charge_G = np.array([m.charge for m in molecules])
    return GraphArrays(
        index=np.arange(len(molecules), dtype=np.int32),
        node_offset=rows.node_offset,
        atomic_number=joined("atomic_numbers").astype(np.uint8),
        position=rows.position,
        edges=make_edges(rows, edges, cutoff),
        charge=np.repeat(charge_G, num_nodes_G) if with_charge else None,
        dtype=np.dtype(dtype),
    )


def bucket_of(num_nodes: int, num_edges: int, edges: str) -> Bucket:
    """The smallest shape of the ladder that holds a graph of `num_nodes` and `num_edges`.

    Nodes: 8, 12, 16, ... 128, then multiples of 128. Edges: all pairs for complete graphs; else
    9/8 of the node limit, for a molecule has about as many bonds as atoms. One with somewhat more
    goes where the next molecules in size go; with many more, the limit is doubled until it
    suffices.
    """
    last = _NODES[-1]
    next_limit = lambda size: next((n for n in _NODES if n >= size), -(-size // last) * last)
    nodes = next_limit(num_nodes)
    if edges == "complete":
        return Bucket(nodes, _num_pairs(nodes))
    for candidate in (nodes, next_limit(nodes + 1)):
        if num_edges <= (limit := _usual_edges(candidate)):
            return Bucket(candidate, limit)
    limit = _usual_edges(nodes)
    while limit < num_edges:
        limit *= 2
    return Bucket(nodes, min(limit, _num_pairs(nodes)))


def _num_pairs(nodes: int) -> int:
    return nodes * (nodes - 1) // 2


def _usual_edges(nodes: int) -> int:
    return min(nodes * 9 // 8, _num_pairs(nodes))


def buckets_of(
    arrays: GraphArrays, graphs_g: np.ndarray, edges: str, one_shape: bool = False
) -> dict[Bucket, np.ndarray]:
    """Shape -> places in `graphs_g` of those that go into it, ascending.

    With `one_shape` it is the one that would hold any of `arrays`.
    """
    if one_shape:
        sizes = arrays.sizes
        largest = bucket_of(sizes.num_nodes.max(), sizes.num_edges.max(), edges)
        return {largest: np.arange(len(graphs_g))}
    nodes, pairs = arrays.sizes.num_nodes[graphs_g], arrays.sizes.num_edges[graphs_g]
    found: dict[Bucket, list[int]] = {}
    for place, (n, e) in enumerate(zip(nodes.tolist(), pairs.tolist(), strict=True)):
        found.setdefault(bucket_of(n, e, edges), []).append(place)
    return {bucket: np.array(places) for bucket, places in found.items()}
