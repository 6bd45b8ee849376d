"""The one data structure: a padded graph, and the letters its dimensions carry.

Letters in names such as `x_NxD`, everywhere in the project:

    B  graphs of a batch          D  features (model width)
    N  nodes of a graph, padded   H  attention heads
    E  edges of a graph, padded   K  radial basis functions
    G  graphs of a data set       T  targets
    M  messages, or keys          L  pairs that attend
    Z  elements of the data       P  points, pairs or properties
    F  features of a layer        C  channels, or columns

A small letter counts a part: g graphs of a split, d features of a head.

Particles are nodes too: "atoms" of number 1 that also have a velocity and a charge. Molecules
have neither (`None`).

Invariant: slots past a graph's own nodes and edges are masked, and whatever they hold
(zeros or junk) changes no output, loss or gradient bit.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp

Array = Any  # numpy on the host, jax inside a step


@flax.struct.dataclass
class Graph:
    """One padded graph; a batch has the same fields with a leading axis B.

    Every pair of nodes that forms an edge is stored once, with `senders < receivers`.
    Bond types and lengths are the same in both directions, and a softmax over keys that
    all appear twice equals the softmax over single ones: mirrored edges would double the
    work, quadruple edge attention, and change nothing. A model whose messages differ by
    direction mirrors them itself.

    Attributes:
      position: [N, 3] float, angstrom for molecules.
      atomic_number: [N] int32; 0 in padding.
      node_mask: [N] bool, true for real atoms.
      senders: [E] int32, index of an edge's first atom.
      receivers: [E] int32, index of its second atom.
      edge_type: [E] int32, a `BondType` (0: no chemical bond).
      edge_mask: [E] bool, true for real edges.
      graph_mask: [] bool, false for a graph that only fills up a batch.
      index: [] int32, the graph's published number; 0 in padding.
      velocity: [N, 3] float, or None.
      charge: [N] float, or None.
      node_feature: [N, F] float, what else is known of each node, or None.
      graph_feature: [P] float, numbers of the whole graph computed before training, or None.
      labels: name of a target -> [], [N] or [N, 3] float, as a model predicts it; no model
        looks at them.
      label_mask: name of a target -> [] or [N] bool, true where there is a label; only of
        targets that miss some, see `has_label`.
    """

    position: Array
    atomic_number: Array
    node_mask: Array
    senders: Array
    receivers: Array
    edge_type: Array
    edge_mask: Array
    graph_mask: Array
    index: Array
    velocity: Array | None = None
    charge: Array | None = None
    node_feature: Array | None = None
    graph_feature: Array | None = None
    labels: dict[str, Array] = flax.struct.field(default_factory=dict)
    label_mask: dict[str, Array] = flax.struct.field(default_factory=dict)


def has_label(graph: Graph, name: str, per_node: bool) -> Array:
    """`[]` or `[N]` (in a batch `[B]` or `[B, N]`) bool: whether there is a label of a target."""
    everywhere = graph.node_mask if per_node else graph.graph_mask
    return graph.label_mask.get(name, everywhere)


def without_padding_values(graph: Graph) -> Graph:
    """One graph with zeros in every padded slot, so that junk (even nan) cannot spread."""
    node, edge = graph.node_mask, graph.edge_mask
    rows = lambda x: None if x is None else jnp.where(node[:, None], x, 0)
    return graph.replace(
        velocity=rows(graph.velocity),
        charge=None if graph.charge is None else jnp.where(node, graph.charge, 0),
        node_feature=rows(graph.node_feature),
        position=rows(graph.position),
        atomic_number=jnp.where(node, graph.atomic_number, 0),
        senders=jnp.where(edge, graph.senders, 0),
        receivers=jnp.where(edge, graph.receivers, 0),
        edge_type=jnp.where(edge, graph.edge_type, 0),
    )
