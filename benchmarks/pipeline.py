"""How many molecules a second one process assembles into padded batches, beside the limit.

    python benchmarks/pipeline.py --json=benchmarks/results/pipeline.json

Draws the batches of `configs/qm9.py`'s plans through Grain, as training does, without a
model. The limit is copying the same bytes in memory.
"""

import argparse
import os
import pathlib
import platform
import time

import jax
import numpy as np
from ours import keep, load_qm9

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan

BATCH_SIZE = 128


def measure(edges: str, steps: int) -> dict:
    """Rates with these edges."""
    dataset = load_qm9(edges)
    train = dataset.split["train"]
    plan = BatchPlan(dataset.arrays.sizes, train, dataset.buckets, BATCH_SIZE, seed=0)
    batches = batching.batches(
        dataset.arrays, plan, np.arange(BATCH_SIZE), range(steps), num_threads=1
    )
    graphs = size = 0
    start = time.perf_counter()
    for _, batch in batches:
        graphs += int(batch.graph_mask.sum())
        size += sum(x.nbytes for x in jax.tree.leaves(batch))
    seconds = time.perf_counter() - start
    source, target = np.ones(size // steps, np.uint8), np.zeros(size // steps, np.uint8)
    start = time.perf_counter()
    for _ in range(200):
        np.copyto(target, source)
    copy_seconds = (time.perf_counter() - start) / 200 * steps
    return {
        "molecules_per_second": round(graphs / seconds),
        "share_of_copy_speed": round(copy_seconds / seconds, 4),
        "node_efficiency": round(plan.node_efficiency, 4),
        "buckets": [[b.num_nodes, b.num_edges] for b in plan.buckets],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=3000, help="batches to draw of each kind")
    options = parser.parse_args()
    result = {
        "command": "python benchmarks/pipeline.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, NumPy {np.__version__}",
        "batch_size": BATCH_SIZE,
        "steps": options.steps,
        "edges": {kind: measure(kind, options.steps) for kind in ("bonds", "cutoff", "complete")},
    }
    keep(result, options.json)


if __name__ == "__main__":
    main()
