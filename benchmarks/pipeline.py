"""How many molecules a second one process assembles into padded batches, beside the limit.

    python benchmarks/pipeline.py --json=benchmarks/results/pipeline.json

Draws the batches of `configs/qm9.py`'s plans through Grain, as training does, without a
model. The limit is copying the same bytes in memory.
"""

import json
import os
import platform
import time

import numpy as np
from absl import app, flags

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan
from data_pipelines.dataset import load_dataset

_JSON = flags.DEFINE_string("json", "", "Where to write the result; empty: only print it.")
_STEPS = flags.DEFINE_integer("steps", 3000, "Batches to draw of each kind.")
BATCH_SIZE = 128


def measure(edges: str) -> dict:
    dataset = load_dataset(
        name="qm9",
        source="qm9pack",
        path="",
        cache_dir="",
        targets=("homo",),
        split="dimenet",
        edges=edges,
        edge_cutoff=3.0,
        buckets=(),
    )
    train = dataset.split["train"]
    plan = BatchPlan(dataset.arrays.sizes, train, dataset.buckets, BATCH_SIZE, seed=0)
    batches = batching.batches(
        dataset.arrays, plan, slice(0, BATCH_SIZE), range(_STEPS.value), num_threads=1
    )
    graphs = size = 0
    start = time.perf_counter()
    for _, batch in batches:
        graphs += int(batch.graph_mask.sum())
        fields = (getattr(batch, name) for name in batch.__dataclass_fields__)
        size += sum(x.nbytes for x in fields if x is not None)
    seconds = time.perf_counter() - start
    source, target = (
        np.ones(size // _STEPS.value, np.uint8),
        np.zeros(size // _STEPS.value, np.uint8),
    )
    start = time.perf_counter()
    for _ in range(200):
        np.copyto(target, source)
    copy_seconds = (time.perf_counter() - start) / 200 * _STEPS.value
    return {
        "molecules_per_second": round(graphs / seconds),
        "share_of_copy_speed": round(copy_seconds / seconds, 4),
        "node_efficiency": round(plan.node_efficiency, 4),
        "buckets": [[b.num_nodes, b.num_edges] for b in plan.buckets],
    }


def main(argv) -> None:
    del argv
    result = {
        "command": "python benchmarks/pipeline.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, NumPy {np.__version__}",
        "batch_size": BATCH_SIZE,
        "steps": _STEPS.value,
        "edges": {kind: measure(kind) for kind in ("bonds", "cutoff", "complete")},
    }
    print(json.dumps(result, indent=1))
    if _JSON.value:
        with open(_JSON.value, "w") as stream:
            json.dump(result, stream, indent=1)


if __name__ == "__main__":
    app.run(main)
