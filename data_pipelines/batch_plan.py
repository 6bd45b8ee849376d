"""The batch plan: a pure function from a step to a size bucket and a list of graphs.

Every process computes the same plan from (sizes, batch size, buckets, seed) and loads only
its own slice of each step, so a run resumes exactly on any number of hosts: the position in
the data *is* the step. Nothing about it is ever saved; processes compare its fingerprint.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.ranges import COUNT, check_range

MAX_BUCKETS = 6
FILL = -1  # a slot of a batch that holds no graph


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One compiled shape: the most nodes and edges that a graph in it may have."""

    num_nodes: int
    num_edges: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Nodes and edges of every graph of a data set, int64 [G] each."""

    num_nodes: np.ndarray
    num_edges: np.ndarray


def choose_buckets(sizes: Sizes, max_buckets: int = MAX_BUCKETS) -> tuple[Bucket, ...]:
    """The at most `max_buckets` node limits that waste the fewest node slots.

    Exact, by dynamic programming over the distinct graph sizes (27 for QM9). The edge limit
    of a bucket is the most edges among its graphs.
    """
    limits, counts = np.unique(sizes.num_nodes, return_counts=True)
    num_limits = len(limits)
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[k, j]: node slots of the first j sizes in k buckets, the last ending at limits[j-1].
    cost = np.full((max_buckets + 1, num_limits + 1), np.inf)
    cut = np.zeros((max_buckets + 1, num_limits + 1), int)
    cost[:, 0] = 0
    for k in range(1, max_buckets + 1):
        for j in range(1, num_limits + 1):
            options = cost[k - 1, :j] + (total[j] - total[:j]) * limits[j - 1]
            cut[k, j] = np.argmin(options)
            cost[k, j] = options[cut[k, j]]
    chosen, j = [], num_limits
    for k in range(max_buckets, 0, -1):
        if j == 0:
            break
        chosen.append(int(limits[j - 1]))
        j = cut[k, j]
    return buckets_with_limits(sizes, sorted(chosen))


def buckets_with_limits(sizes: Sizes, node_limits) -> tuple[Bucket, ...]:
    """Buckets with the given node limits and the edge limits that the data need."""
    for limit in node_limits:
        check_range("A number of config.data.buckets", limit, COUNT)
    limits = sorted(set(int(limit) for limit in node_limits))
    if not 1 <= len(limits) <= MAX_BUCKETS:
        raise UserError(
            f"config.data.buckets names {len(limits)} buckets; between 1 and {MAX_BUCKETS} are "
            "possible, because each is one compiled step."
        )
    bucket_G = np.searchsorted(limits, sizes.num_nodes)
    return tuple(
        Bucket(limit, int(max(1, sizes.num_edges[bucket_G == b].max(initial=0))))
        for b, limit in enumerate(limits)
    )


class BatchPlan:
    """Maps a global step to `(bucket number, graphs [B])`, for ever or for one pass.

    An epoch visits every graph once. Within a bucket graphs are shuffled and cut into
    batches; the last batch of a bucket is filled up with `FILL`. Then the batches of all
    buckets are shuffled together.

    Args:
      sizes: of all graphs of the data set.
      graphs: [g] the positions of the graphs to visit (a split).
      buckets: ascending.
      batch_size: B, over all devices and processes.
      seed: of the shuffling; `None` keeps the order given (evaluation).
    """

    def __init__(self, sizes: Sizes, graphs, buckets, batch_size: int, seed: int | None):
        self.buckets = tuple(buckets)
        self.batch_size = batch_size
        self.seed = seed
        graphs = np.asarray(graphs, np.int64)
        if len(graphs) == 0:
            raise UserError("There are no graphs to visit: choose a split that has some.")
        limits = [b.num_nodes for b in self.buckets]
        bucket_g = np.searchsorted(limits, sizes.num_nodes[graphs])
        self._check_fit(sizes, graphs, bucket_g)
        self._graphs = [graphs[bucket_g == b] for b in range(len(self.buckets))]
        self.num_graphs = len(graphs)
        self.batches_per_bucket = [-(-len(g) // batch_size) for g in self._graphs]
        self.steps_per_epoch = sum(self.batches_per_bucket)
        used = sizes.num_nodes[graphs].sum()
        slots = sum(
            count * batch_size * b.num_nodes
            for count, b in zip(self.batches_per_bucket, self.buckets, strict=True)
        )
        self.node_efficiency = float(used / slots)

    def _check_fit(self, sizes: Sizes, graphs, bucket_g) -> None:
        too_many_nodes = bucket_g == len(self.buckets)
        limit_edges = np.array([b.num_edges for b in self.buckets] + [0])[bucket_g]
        misfits = graphs[too_many_nodes | (sizes.num_edges[graphs] > limit_edges)]
        if len(misfits):
            worst = misfits[np.argmax(sizes.num_nodes[misfits])]
            largest = self.buckets[-1]
            raise UserError(
                f"{len(misfits)} graphs fit no bucket; the largest, number {worst} of the data "
                f"set, has {sizes.num_nodes[worst]} nodes and {sizes.num_edges[worst]} edges, and "
                f"the largest bucket holds {largest.num_nodes} and {largest.num_edges}. Raise "
                "the last number of config.data.buckets, or leave it empty to choose them."
            )

    def __getitem__(self, step: int) -> tuple[int, np.ndarray]:
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch if self.seed is not None else 0)[position]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a plan lives as long as its run
    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        # RandomState, because NumPy promises that its streams never change between versions.
        rng = None if self.seed is None else np.random.RandomState([self.seed, epoch])
        batches = []
        for b, graphs in enumerate(self._graphs):
            order = graphs if rng is None else graphs[rng.permutation(len(graphs))]
            fill = np.full(-len(order) % self.batch_size, FILL)
            rows = np.concatenate([order, fill]).reshape(-1, self.batch_size)
            batches += [(b, row) for row in rows]
        if rng is None:
            return batches
        return [batches[k] for k in rng.permutation(len(batches))]

    def fingerprint(self) -> str:
        """SHA-256 of all that the order depends on; equal plans have equal ones."""
        digest = hashlib.sha256(repr((self.buckets, self.batch_size, self.seed)).encode())
        for graphs in self._graphs:
            digest.update(graphs.tobytes() + b"|")
        return digest.hexdigest()
