"""Which pairs of atoms become edges, decided once for the whole data set, on the host."""

import numpy as np

from data_pipelines.bonds import BondType
from data_pipelines.errors import check_known
from data_pipelines.ranges import POSITIVE, check_range

EDGE_KINDS = ("bonds", "cutoff", "complete")


def build_edges(molecules, kind: str, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges of every molecule: `(offset [G + 1] int64, rows [sum, 3] uint16)`.

    A row is (sender, receiver, BondType) with sender < receiver; each pair stands once.

    Args:
      molecules: a `MoleculeArrays`.
      kind: `bonds`; `cutoff` (all pairs closer than `cutoff`, and all bonds); or `complete`.
      cutoff: angstrom, for `cutoff`.
    """
    check_known("config.data.edges", kind, EDGE_KINDS)
    if kind == "cutoff":
        check_range("config.data.edge_cutoff", cutoff, POSITIVE)
    if kind == "bonds":
        return molecules.bond_offset, molecules.bonds
    num_nodes_G = np.diff(molecules.node_offset)
    graph_of_bond = np.repeat(np.arange(len(num_nodes_G)), np.diff(molecules.bond_offset))
    graphs, rows = [], []
    for n in np.unique(num_nodes_G):
        members_g = np.flatnonzero(num_nodes_G == n)
        sender_P, receiver_P = np.triu_indices(n, 1)
        type_gxP = np.zeros((len(members_g), len(sender_P)), np.uint16)
        of_member = num_nodes_G[graph_of_bond] == n
        bonds = molecules.bonds[of_member].astype(np.int64)
        pair_number = np.zeros((n, n), np.int64)
        pair_number[sender_P, receiver_P] = np.arange(len(sender_P))
        type_gxP[
            np.searchsorted(members_g, graph_of_bond[of_member]),
            pair_number[bonds[:, 0], bonds[:, 1]],
        ] = bonds[:, 2]
        keep_gxP = np.ones_like(type_gxP, bool)
        if kind == "cutoff":
            x_gxNx3 = molecules.position[molecules.node_offset[members_g, None] + np.arange(n)]
            square_gxP = sum(
                (x_gxNx3[:, sender_P, c] - x_gxNx3[:, receiver_P, c]) ** 2 for c in range(3)
            )
            keep_gxP = (square_gxP < cutoff**2) | (type_gxP != BondType.NONE)
        g, p = np.nonzero(keep_gxP)
        graphs.append(members_g[g])
        rows.append(np.stack([sender_P[p], receiver_P[p], type_gxP[g, p]], 1).astype(np.uint16))
    graph_E = np.concatenate(graphs)
    order = np.argsort(graph_E, kind="stable")
    counts = np.bincount(graph_E, minlength=len(num_nodes_G))
    return np.concatenate([[0], np.cumsum(counts)]), np.concatenate(rows)[order]
