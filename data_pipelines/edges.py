"""Which pairs of atoms become edges, on the host, for each batch anew.

A data set keeps bonds and positions, and how many edges each molecule has: the shapes of batches
follow from that. Which they are is found when a batch is gathered, so ten million molecules need no
more memory and no more time at the start than their bonds and positions do.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
from typing import Protocol

import numpy as np

from data_pipelines.bonds import BondType
from data_pipelines.errors import check_known
from data_pipelines.json_text import json_text
from data_pipelines.prepared import default_cache_dir, prepare, write
from data_pipelines.ranges import POSITIVE, check_range

EDGE_KINDS = ("bonds", "cutoff", "complete")
_AT_ONCE, _PAIRS_AT_ONCE = 2_048, 1 << 22  # molecules and slots whose pairs are counted together
_MANY = 10_000  # molecules; the counts of as many are kept
_VERSION = 1  # of the rule by which pairs are edges


class Molecules(Protocol):
    """What edges are found in.

    Attributes:
      node_offset: [G + 1], where the atoms of each molecule begin.
      position: [atoms, 3], angstrom.
      bond_offset: [G + 1], where the bonds of each begin.
      bonds: [bonds, 3], as `StoredEdges.rows`.
    """

    node_offset: np.ndarray
    position: np.ndarray
    bond_offset: np.ndarray
    bonds: np.ndarray


@dataclasses.dataclass(frozen=True)
class StoredEdges:
    """Edges that are there.

    Attributes:
      offset: [G + 1], where the rows of each graph begin.
      rows: [E, 3], (sender, receiver, BondType) with sender < receiver; each pair once.
    """

    offset: np.ndarray
    rows: np.ndarray

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Edges of each graph, [G]."""
        return np.diff(self.offset)

    def of(self, graphs_g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(start [g], count [g], rows)`: graph k has `rows[start : start + count]`."""
        start_g = self.offset[graphs_g]
        return start_g, self.offset[graphs_g + 1] - start_g, self.rows


@dataclasses.dataclass(frozen=True)
class PairEdges:
    """All pairs closer than a distance, and all bonds.

    Attributes:
      molecules: which have them.
      cutoff: angstrom; infinite: all pairs.
      known_counts: what `counts` is, where it has been counted.
    """

    molecules: Molecules
    cutoff: float
    known_counts: np.ndarray | None = None

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Edges of each graph, [G]."""
        if self.known_counts is not None:
            return self.known_counts
        num_nodes_G = np.diff(self.molecules.node_offset)
        if math.isinf(self.cutoff):
            return num_nodes_G * (num_nodes_G - 1) // 2
        order, found = np.argsort(num_nodes_G, kind="stable"), np.zeros(len(num_nodes_G), np.int64)
        first = 0
        while first < len(order):
            graphs = order[first : first + _AT_ONCE]  # the last is the largest
            fit = _PAIRS_AT_ONCE // max(1, int(num_nodes_G[graphs[-1]]) ** 2)
            graphs = graphs[: max(1, fit)]
            found[graphs] = self.of(graphs)[1]
            first += len(graphs)
        return found

    def of(self, graphs_g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `StoredEdges.of`; rows of a graph are sorted."""
        molecules = self.molecules
        first_g = molecules.node_offset[graphs_g]
        count_g = molecules.node_offset[graphs_g + 1] - first_g
        slots = np.arange(count_g.max(initial=0))
        inside_gxN = slots < count_g[:, None]
        types_gxNxN = self._bond_types(graphs_g, len(slots))
        keep_gxNxN = inside_gxN[:, :, None] & inside_gxN[:, None] & (slots[:, None] < slots)
        if not math.isinf(self.cutoff):
            x_gxNx3 = molecules.position[np.where(inside_gxN, first_g[:, None] + slots, 0)]
            square_gxNxN = sum(
                np.square(x_gxNx3[:, :, None, c] - x_gxNx3[:, None, :, c]) for c in range(3)
            )
            keep_gxNxN &= (square_gxNxN < self.cutoff**2) | (types_gxNxN != BondType.NONE)
        g, i, j = np.nonzero(keep_gxNxN)
        rows = np.stack([i, j, types_gxNxN[g, i, j]], axis=1).astype(np.uint16)
        edges_g = np.bincount(g, minlength=len(graphs_g))
        return np.cumsum(edges_g) - edges_g, edges_g, rows

    def _bond_types(self, graphs_g: np.ndarray, num_nodes: int) -> np.ndarray:
        """BondType of each pair (sender, receiver), [g, N, N]."""
        types_gxNxN = np.full((len(graphs_g), num_nodes, num_nodes), BondType.NONE, np.uint8)
        bonds = StoredEdges(self.molecules.bond_offset, self.molecules.bonds)
        graph_b = np.repeat(np.arange(len(graphs_g)), bonds.of(graphs_g)[1])
        i_b, j_b, type_b = rows_of(bonds, graphs_g).T
        types_gxNxN[graph_b, i_b, j_b] = type_b
        return types_gxNxN


def rows_of(edges: StoredEdges | PairEdges, graphs_g: np.ndarray) -> np.ndarray:
    """The edges of some graphs, one graph after the other, [e, 3]."""
    start_g, count_g, rows = edges.of(graphs_g)
    return rows[row_numbers(start_g, count_g)]


def row_numbers(start_g: np.ndarray, count_g: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of the first graph, `count` of them, then those of the next."""
    before_g = np.cumsum(count_g) - count_g
    return np.arange(count_g.sum()) + np.repeat(start_g - before_g, count_g)


def make_edges(molecules: Molecules, kind: str, cutoff: float) -> StoredEdges | PairEdges:
    """Edges of molecules.

    Args:
      molecules: which are to have them.
      kind: `bonds`; `cutoff` (all pairs closer than `cutoff`, and all bonds); or `complete`.
      cutoff: angstrom, for `cutoff`.
    """
    check_known("config.data.edges", kind, EDGE_KINDS)
    if kind == "cutoff":
        check_range("config.data.edge_cutoff", cutoff, POSITIVE)
    if kind == "bonds":
        return StoredEdges(molecules.bond_offset, molecules.bonds)
    return PairEdges(molecules, cutoff if kind == "cutoff" else math.inf)


def load_edges(
    molecules: Molecules, kind: str, cutoff: float, passport: dict, cache_dir: str
) -> StoredEdges | PairEdges:
    """`make_edges` of a data set; how many each of many molecules has is counted once and kept.

    Args:
      molecules, kind, cutoff: of `make_edges`.
      passport: of the molecules, which says what they are.
      cache_dir: for what is kept; "": the default one.
    """
    edges = make_edges(molecules, kind, cutoff)
    if kind != "cutoff" or len(molecules.node_offset) < _MANY:
        return edges
    facts = {"version": _VERSION, "molecules": passport, "edge_cutoff": cutoff}
    name = hashlib.sha256(json_text(facts).encode()).hexdigest()[:12]
    folder = pathlib.Path(cache_dir or default_cache_dir()) / "edge_counts" / name

    def build(building: pathlib.Path) -> None:
        write(building, {"counts": edges.counts.astype(np.uint32)}, facts)

    arrays, _ = prepare(folder, build, "4 bytes for each molecule")
    return dataclasses.replace(edges, known_counts=arrays["counts"].astype(np.int64))
