"""From the batch plan to padded numpy graphs, through Grain's prefetching threads.

One Grain element is one batch: the plan's entry, gathered from memory-mapped arrays. (One
element per molecule is 20 times slower.) The pipeline stays a `MapDataset`, random access,
to its end, so it starts at any step and needs no checkpoint of its own.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from data_pipelines.batch_plan import BatchPlan, Bucket, Sizes
from data_pipelines.graph import Graph


@dataclasses.dataclass(frozen=True)
class GraphArrays:
    """All graphs of a data set, ready to be gathered: atoms, edges and targets.

    Attributes:
      index: [G] int32.
      node_offset: [G + 1] int64.
      atomic_number: [atoms] uint8.
      position: [atoms, 3] float.
      edge_offset: [G + 1] int64.
      edges: [edges, 3] uint8, rows (sender, receiver, BondType).
      target: [G, T] float, or [atoms, 3] where every node has its own; its type is also that
        of the positions of a batch.
      velocity: [atoms, 3] float, or None.
      charge: [atoms] float, or None.
    """

    index: np.ndarray
    node_offset: np.ndarray
    atomic_number: np.ndarray
    position: np.ndarray
    edge_offset: np.ndarray
    edges: np.ndarray
    target: np.ndarray
    velocity: np.ndarray | None = None
    charge: np.ndarray | None = None

    @property
    def target_per_node(self) -> bool:
        return len(self.target) != len(self.index)

    @property
    def sizes(self) -> Sizes:
        return Sizes(np.diff(self.node_offset), np.diff(self.edge_offset))


def gather(arrays: GraphArrays, graphs_B: np.ndarray, bucket: Bucket) -> Graph:
    """The graphs at these positions as one padded batch; `FILL` gives an empty graph."""
    real_B = graphs_B >= 0
    g_B = np.where(real_B, graphs_B, 0)

    def rows_of(offset_G, slots):
        """Row numbers [B, slots] into a flat array, and which slots hold a row."""
        start_B = offset_G[g_B]
        count_B = np.where(real_B, offset_G[g_B + 1] - start_B, 0)
        mask = np.arange(slots) < count_B[:, None]
        return np.where(mask, start_B[:, None] + np.arange(slots), 0), mask

    node, node_mask = rows_of(arrays.node_offset, bucket.num_nodes)
    edge, edge_mask = rows_of(arrays.edge_offset, bucket.num_edges)
    edges_BxEx3 = np.zeros((*edge.shape, 3), np.int32)
    if len(arrays.edges):
        edges_BxEx3 = np.where(edge_mask[..., None], arrays.edges[edge], 0).astype(np.int32)
    dtype = arrays.target.dtype

    def per_node(values):
        if values is None:
            return None
        mask = node_mask.reshape(*node_mask.shape, *[1] * (values.ndim - 1))
        return np.where(mask, values[node], 0).astype(dtype)

    if arrays.target_per_node:
        target = per_node(arrays.target)
    else:
        target = np.where(real_B[:, None], arrays.target[g_B], 0).astype(dtype)
    return Graph(
        position=per_node(arrays.position),
        atomic_number=np.where(node_mask, arrays.atomic_number[node], 0).astype(np.int32),
        node_mask=node_mask,
        senders=edges_BxEx3[..., 0],
        receivers=edges_BxEx3[..., 1],
        edge_type=edges_BxEx3[..., 2],
        edge_mask=edge_mask,
        target=target,
        graph_mask=real_B,
        index=np.where(real_B, arrays.index[g_B], 0).astype(np.int32),
        velocity=per_node(arrays.velocity),
        charge=per_node(arrays.charge),
    )


class _Batches:
    """The random-access source that Grain wraps: step -> (bucket number, Graph)."""

    def __init__(self, arrays: GraphArrays, plan: BatchPlan, rows: np.ndarray, num_steps: int):
        self._arrays, self._plan, self._rows, self._num_steps = arrays, plan, rows, num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> tuple[int, Graph]:
        bucket, graphs_B = self._plan[step]
        return bucket, gather(self._arrays, graphs_B[self._rows], self._plan.buckets[bucket])


def batches(
    arrays: GraphArrays,
    plan: BatchPlan,
    rows: np.ndarray,
    steps: range,
    num_threads: int = 1,
    prefetch: int = 8,
) -> Iterator[tuple[int, Graph]]:
    """This process's rows of each step's batch, in order of steps, prefetched by threads."""
    dataset = grain.MapDataset.source(_Batches(arrays, plan, rows, steps.stop))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(dataset[steps.start :].to_iter_dataset(options))


def stacked(batches: list[tuple[int, Graph]]) -> tuple[int, Graph]:
    """Several batches of one bucket as one with a leading axis; a single one stays as it is."""
    if len(batches) == 1:
        return batches[0]
    join = lambda *x: None if x[0] is None else np.stack(x)
    fields = Graph.__dataclass_fields__
    graphs = [graph for _, graph in batches]
    return batches[0][0], Graph(**{f: join(*(getattr(g, f) for g in graphs)) for f in fields})
