"""How the cost of a step grows: with atoms of a graph, batch, width and depth.

    python benchmarks/growth.py --json=benchmarks/results/growth.json

Forward and backward of one batch, on one device with all cores, medians. There are no molecules
of 512 atoms in QM9: the graphs here are made up, points at random at the density of QM9's
molecules (0.1 atoms a cubic angstrom), no two closer than 0.9 angstrom, edges up to 3 angstrom.
So that each call does similar work, a batch has 1024 atoms in all, whatever the graph's size.
An exponent p is the slope of log(time of a graph) against log(size) over the three largest
sizes: 1 is linear, 2 quadratic.
"""

import argparse
import os
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from ours import keep

from data_pipelines.batch_plan import Bucket
from data_pipelines.graph import Graph
from data_pipelines.prepared import default_cache_dir
from data_pipelines.targets import Target
from demetar.models import create_model
from demetar.speed.machine import Peak, processor
from demetar.training import runtime

ATOMS = (8, 16, 32, 64, 128, 256, 512)
ATOMS_OF_BATCH = 1024
ELEMENTS = (1, 6, 7, 8)
CUTOFF, DENSITY, CLOSEST = 3.0, 0.1, 0.9

_DEMETAR = dict(
    name="demetar", readout="cls", width=64, num_heads=8, edge_layers=1, node_layers=1,
    joint_layers=2, mlp_ratio=2, num_radial=32, edge_attention="none", dtype="float32",
)  # fmt: skip
_EGNN = dict(name="egnn", readout="sum", width=64, num_layers=4, attention=True, dtype="float32")
# Name -> model, whether all pairs are edges.
BY_ATOMS = {
    "DEMETAr, all pairs": (_DEMETAR, False),
    "DEMETAr, along edges": (_DEMETAR | {"attention": "edges"}, False),
    "EGNN, all pairs": (_EGNN, True),
    "EGNN, along edges": (_EGNN, False),
}
# The model of qm9:quick, without its angles, at 19 atoms; what is varied -> values.
QUICK = _DEMETAR | dict(width=96, num_heads=16, edge_attention="full", environment=True)
SWEEPS = {
    "batch": (8, 16, 32, 64, 128, 256),
    "width": (32, 64, 128, 256, 512),
    "depth": (2, 4, 8, 16),  # joint layers, beside one of nodes and one of edges
}


def random_graph(rng: np.random.Generator, num_atoms: int, complete: bool):
    """Positions and edges of one made-up molecule."""
    side = (num_atoms / DENSITY) ** (1 / 3)
    points = np.zeros((0, 3))
    while len(points) < num_atoms:
        point = rng.uniform(0, side, 3)
        if len(points) == 0 or np.linalg.norm(points - point, axis=1).min() > CLOSEST:
            points = np.vstack([points, point])
    i, j = np.triu_indices(num_atoms, 1)
    near = complete | (np.linalg.norm(points[i] - points[j], axis=1) < CUTOFF)
    return points, i[near], j[near]


def make_batch(num_atoms: int, size: int, complete: bool) -> Graph:
    rng = np.random.default_rng(num_atoms)
    graphs = [random_graph(rng, num_atoms, complete) for _ in range(size)]
    num_edges = max(len(i) for _, i, _ in graphs)
    bucket = Bucket(num_atoms, num_edges)
    shape = (size, bucket.num_edges)
    senders, receivers, mask = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, bool)
    for row, (_, i, j) in enumerate(graphs):
        senders[row, : len(i)], receivers[row, : len(i)], mask[row, : len(i)] = i, j, True
    return Graph(
        position=np.stack([points for points, _, _ in graphs]).astype(np.float32),
        atomic_number=rng.choice(ELEMENTS, (size, num_atoms)).astype(np.int32),
        node_mask=np.ones((size, num_atoms), bool),
        senders=senders.astype(np.int32),
        receivers=receivers.astype(np.int32),
        edge_type=mask.astype(np.int32),
        edge_mask=mask,
        graph_mask=np.ones(size, bool),
        index=np.arange(size, dtype=np.int32),
    )


def seconds_of(options: dict, batch: Graph, seconds: float) -> float:
    """Median time of forward and backward over a batch."""
    energy = Target("energy", "eV", readout="cls")
    model = create_model(targets=(energy,), facts={"elements": ELEMENTS}, **options)
    one = jax.tree.map(lambda x: x[0], batch)
    params = model.init(jax.random.key(0), one)["params"]

    def loss(params, batch):
        predict = lambda graph: model.apply({"params": params}, graph)["energy"]
        return (jax.vmap(predict)(batch) ** 2).sum()

    return median_seconds(jax.jit(jax.grad(loss)), params, batch, seconds)


def median_seconds(step: Callable, params, batch: Graph, seconds: float) -> float:
    """Of a call of a compiled function."""
    batch = jax.device_put(batch)
    jax.block_until_ready(step(params, batch))
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        begin = time.perf_counter()
        jax.block_until_ready(step(params, batch))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def exponent(sizes, times) -> float:
    """Slope of log(time) against log(size) over the three largest sizes."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(times[-3:]), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    runtime.keep_freed_memory()
    by_atoms = {}
    for name, (model, complete) in BY_ATOMS.items():
        times, edges = [], []
        for num_atoms in ATOMS:
            size = ATOMS_OF_BATCH // num_atoms
            batch = make_batch(num_atoms, size, complete)
            times.append(seconds_of(model, batch, options.seconds) / size)
            edges.append(float(batch.edge_mask.sum() / size))
            print(f"{name}: {num_atoms} atoms, {1e3 * times[-1]:.3f} ms a graph", flush=True)
        by_atoms[name] = {
            "atoms": ATOMS,
            "edges": edges,
            "seconds_a_graph": times,
            "exponent": exponent(ATOMS, times),
        }
    sweeps = {}
    for kind, values in SWEEPS.items():
        times = []
        for value in values:
            changes = {
                "batch": {},
                "width": {"width": value},
                "depth": {"joint_layers": value},
            }[kind]
            size = value if kind == "batch" else 64
            batch = make_batch(19, size, complete=False)
            times.append(seconds_of(QUICK | changes, batch, options.seconds))
            print(f"{kind} {value}: {1e3 * times[-1]:.2f} ms", flush=True)
        sweeps[kind] = {
            "values": values,
            "seconds_a_batch": times,
            "exponent": exponent(values, times),
        }
    peak = Peak(default_cache_dir(), "float32")
    result = {
        "command": "python benchmarks/growth.py",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "peak_gflops": peak.flops / 1e9,
        "by_atoms": by_atoms,
        "sweeps": sweeps,
    }
    keep(result, options.json)


if __name__ == "__main__":
    main()
