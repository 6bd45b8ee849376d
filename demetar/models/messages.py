"""Where messages between nodes live: one for each direction of each edge, in one of two layouts.

`Pairs` keeps them as a matrix [N, N, ...], receiver first: what a node sends is a row that is
broadcast, what it receives a sum along a row; nothing is gathered or scattered. Best where most
pairs are edges, as in molecules and complete graphs: 12 to 49 times as fast as a scatter there
on a CPU. `Listed` keeps them in a list [2E, ...], with gathers and segment sums: memory and time
grow with the number of edges, however many nodes there are.

Both give the same numbers. `messages_of` takes a matrix where at least half of all pairs are
edges, by the padded shapes.
"""

import contextlib
import contextvars
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from demetar.graph import Array, Graph
from demetar.models.layers import select_rows

_least_fill = contextvars.ContextVar("least_fill", default=0.5)  # of a matrix


@contextlib.contextmanager
def least_fill(share: float):
    """Inside, what is traced takes a matrix from this share of pairs on; 0: always, inf: never.

    For counting what a model needs (a matrix also holds pairs that are no edges), comparing
    and testing.
    """
    token = _least_fill.set(share)
    try:
        yield
    finally:
        _least_fill.reset(token)


class Messages(Protocol):
    """What models need of a layout; M stands for its dimensions, [N, N] or [2E].

    Attributes:
      mask: [M, 1] float, 1 for messages that are sent.
      count_Nx1: how many each node receives.
    """

    mask: Array

    @property
    def count_Nx1(self) -> Array: ...

    def to_receiver(self, x_NxD: Array) -> Array:
        """Of each message, the row of its receiver: something that broadcasts to [M, D]."""

    def to_sender(self, x_NxD: Array) -> Array:
        """Of each message, the row of its sender."""

    def sum_at_receiver(self, x_MxD: Array, weight_Mx1: Array) -> Array:
        """`sum over messages to i of weight x`, `[N, D]`."""


@flax.struct.dataclass
class Pairs:
    """Messages [N, N]: entry (i, j) goes from j to i."""

    mask: Array

    @property
    def count_Nx1(self) -> Array:
        return self.mask.sum(axis=1)

    def to_receiver(self, x_NxD: Array) -> Array:
        return x_NxD[:, None]

    def to_sender(self, x_NxD: Array) -> Array:
        return x_NxD[None]

    def sum_at_receiver(self, x_MxD: Array, weight_Mx1: Array) -> Array:
        return jnp.einsum("nm,nmd->nd", weight_Mx1[..., 0], x_MxD)


@flax.struct.dataclass
class Listed:
    """Messages [2E]: both directions of each edge, one half after the other."""

    mask: Array
    receiver_M: Array
    sender_M: Array
    num_nodes: int = flax.struct.field(pytree_node=False)

    @property
    def count_Nx1(self) -> Array:
        return self.sum_at_receiver(jnp.ones_like(self.mask), self.mask)

    def to_receiver(self, x_NxD: Array) -> Array:
        return x_NxD[self.receiver_M]

    def to_sender(self, x_NxD: Array) -> Array:
        return x_NxD[self.sender_M]

    def sum_at_receiver(self, x_MxD: Array, weight_Mx1: Array) -> Array:
        wide = jnp.promote_types(x_MxD.dtype, jnp.float32)  # sums of many small numbers
        weighted_MxD = x_MxD.astype(wide) * weight_Mx1.astype(wide)
        sum_NxD = jax.ops.segment_sum(weighted_MxD, self.receiver_M, self.num_nodes)
        return sum_NxD.astype(jnp.promote_types(x_MxD.dtype, weight_Mx1.dtype))


def messages_of(graph: Graph) -> Messages:
    """The messages of one graph without padding values."""
    num_nodes, num_edges = len(graph.node_mask), len(graph.edge_mask)
    dtype = graph.position.dtype
    if 2 * num_edges >= _least_fill.get() * num_nodes**2:
        number_N = jnp.arange(num_nodes)
        one_hot = lambda ends_E: ((ends_E[:, None] == number_N) & graph.edge_mask[:, None]).astype(
            dtype
        )
        half_NxN = select_rows(one_hot(graph.receivers).T, one_hot(graph.senders))
        return Pairs((half_NxN + half_NxN.T)[..., None])
    both = lambda a, b: jnp.concatenate([a, b])
    return Listed(
        both(graph.edge_mask, graph.edge_mask)[:, None].astype(dtype),
        both(graph.receivers, graph.senders),
        both(graph.senders, graph.receivers),
        num_nodes,
    )
