"""From the batch plan to padded numpy graphs, through Grain's prefetching threads.

One Grain element is one batch: the plan's entry, gathered from memory-mapped arrays. (One
element per molecule is 20 times slower.) The pipeline stays a `MapDataset`, random access,
to its end, so it starts at any step and needs no checkpoint of its own.
"""

import dataclasses
import functools
from collections.abc import Iterator

import grain
import numpy as np

from data_pipelines.batch_plan import BatchPlan, Bucket, Sizes
from data_pipelines.edges import PairEdges, StoredEdges, row_numbers
from data_pipelines.graph import Graph


@dataclasses.dataclass(frozen=True)
class GraphArrays:
    """All graphs of a data set, ready to be gathered: atoms, edges and labels.

    Attributes:
      index: [G] int32, published numbers.
      node_offset: [G + 1] int64.
      atomic_number: [nodes] uint8.
      position: [nodes, 3] float.
      edges: of the graphs.
      graph_labels: name of a target -> [G] float; NaN where a label is missing.
      node_labels: name of a target -> [nodes] or [nodes, 3] float; NaN likewise.
      velocity: [nodes, 3] float, or None.
      charge: [nodes] float, or None.
      node_feature: [nodes, F] numbers, or None.
      graph_feature: [G, P] float, or None.
      dtype: of the floating-point numbers of a batch.
    """

    index: np.ndarray
    node_offset: np.ndarray
    atomic_number: np.ndarray
    position: np.ndarray
    edges: StoredEdges | PairEdges
    graph_labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    node_labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    velocity: np.ndarray | None = None
    charge: np.ndarray | None = None
    node_feature: np.ndarray | None = None
    graph_feature: np.ndarray | None = None
    dtype: np.dtype = np.dtype(np.float64)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Nodes and edges of each graph."""
        return Sizes(np.diff(self.node_offset), self.edges.counts)

    @functools.cached_property
    def incomplete(self) -> frozenset[str]:
        """Targets of which at least one label is missing."""
        columns = self.graph_labels | self.node_labels
        return frozenset(name for name, column in columns.items() if np.isnan(column).any())

    def nodes_of(self, graphs_g: np.ndarray) -> np.ndarray:
        """Row numbers of the nodes of these graphs, one graph after the other."""
        return row_numbers(self.node_offset[graphs_g], self.sizes.num_nodes[graphs_g])


def gather(arrays: GraphArrays, graphs_B: np.ndarray, bucket: Bucket) -> Graph:
    """The graphs at these positions as one padded batch; `FILL` gives an empty graph."""
    real_B = graphs_B >= 0
    g_B = np.where(real_B, graphs_B, 0)

    def padded(start_B, count_B, slots):
        """Row numbers [B, slots] into a flat array, and which slots hold a row."""
        mask = np.arange(slots) < np.where(real_B, count_B, 0)[:, None]
        return np.where(mask, start_B[:, None] + np.arange(slots), 0), mask

    first_B = arrays.node_offset[g_B]
    node, node_mask = padded(first_B, arrays.node_offset[g_B + 1] - first_B, bucket.num_nodes)
    start_B, count_B, rows = arrays.edges.of(g_B)
    edge, edge_mask = padded(start_B, count_B, bucket.num_edges)
    edges_BxEx3 = np.zeros((*edge.shape, 3), np.int32)
    if len(rows):
        edges_BxEx3 = np.where(edge_mask[..., None], rows[edge], 0).astype(np.int32)

    def masked(values, mask):
        """In the type of a batch, 0 where there is nothing."""
        mask = mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))
        return np.where(mask, values, 0).astype(arrays.dtype)

    def per_node(values):
        return None if values is None else masked(values[node], node_mask)

    labels, label_mask = {}, {}
    for rows, real, columns in (
        (g_B, real_B, arrays.graph_labels),
        (node, node_mask, arrays.node_labels),
    ):
        for name, column in columns.items():
            values, mask = column[rows], real
            if name in arrays.incomplete:
                missing = np.isnan(values)
                mask = real & ~(missing.any(axis=-1) if values.ndim > real.ndim else missing)
                label_mask[name] = mask
            labels[name] = masked(values, mask)
    return Graph(
        position=per_node(arrays.position),
        atomic_number=np.where(node_mask, arrays.atomic_number[node], 0).astype(np.int32),
        node_mask=node_mask,
        senders=edges_BxEx3[..., 0],
        receivers=edges_BxEx3[..., 1],
        edge_type=edges_BxEx3[..., 2],
        edge_mask=edge_mask,
        graph_mask=real_B,
        index=np.where(real_B, arrays.index[g_B], 0).astype(np.int32),
        velocity=per_node(arrays.velocity),
        charge=per_node(arrays.charge),
        node_feature=per_node(arrays.node_feature),
        graph_feature=None
        if arrays.graph_feature is None
        else masked(arrays.graph_feature[g_B], real_B),
        labels=labels,
        label_mask=label_mask,
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
