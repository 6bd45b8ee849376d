"""What each change bought: the step before and after it, in turn, in one run.

    python benchmarks/changes.py --json=benchmarks/results/changes.json

For each change, two versions of one config's step are compiled, one with the change taken back
(by the config, or by putting the old function in its place), and measured alternately: median
milliseconds of a whole step of one bucket, without batch assembly, logging or saving. Beside it
what the profile or the arithmetic let expect.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
from unittest import mock

import jax.numpy as jnp
from ours import Run, keep

from demetar.config.command_line import load_config
from demetar.models import demetar, ops
from demetar.speed.machine import processor
from demetar.training import runtime

QUICK, WIDE, EGNN = "qm9:quick", "qm9:wide", "qm9:egnn"
TWO = {"mesh.cpu_devices": 2}


def gaussians_by_linspace(distance, num_radial, cutoff):
    """The radial basis as it was: centres computed where they are used."""
    centres_K = jnp.linspace(0.0, cutoff, num_radial, dtype=distance.dtype)
    spacing = cutoff / (num_radial - 1)
    return jnp.exp(-0.5 * ((distance[..., None] - centres_K) / spacing) ** 2)


# name: config, changes of before, what is put in the place of what, changes of after, expectation
CHANGES = {
    "attention: gradient written out": (
        QUICK, TWO, [(ops, "attend", ops.plain_attend)], TWO,
        "products with transposed operands take 5 of 38 ms: 10 to 15 % less",
    ),
    "dense layers join the rows of a batch": (
        QUICK, TWO, [(ops, "matmul", ops.plain_matmul)], TWO,
        "the gradient of products over [B, N, D] runs at half the speed: a third less",
    ),
    "radial basis: centres are constants": (
        QUICK, TWO, [(demetar, "gaussian_basis", gaussians_by_linspace)], TWO,
        "the exponential is fused with linspace: 10 % less",
    ),
    "environment of atoms and edges (for accuracy)": (
        QUICK, TWO | {"model.environment": False}, [], TWO,
        "twice the exponentials of the pairs' biases: 10 % more time, for better features",
    ),
    "two virtual devices instead of one": (
        QUICK, {"mesh.cpu_devices": 1}, [], TWO, "small loops on both cores: 30 % less",
    ),
    "EGNN: 12 micro-batches of 8": (
        EGNN, TWO, [], TWO | {"train.accumulation": 12},
        "7 layers of pairs are 550 MB a step: from the caches instead of memory, half",
    ),
    "EGNN: messages computed again in the backward pass": (
        EGNN, TWO | {"train.accumulation": 12}, [],
        TWO | {"train.accumulation": 12, "model.remat": True},
        "a third more operations, a seventh of the memory to pass through: faster",
    ),
    "8 x 256: 4 micro-batches of 32": (
        WIDE, TWO, [], TWO | {"train.accumulation": 4}, "as EGNN, but dense layers dominate: less",
    ),
}  # fmt: skip


def prepared(text: str, changes: dict, patches, bucket: int) -> Run:
    """A run whose step is compiled under `patches`."""
    with contextlib.ExitStack() as stack:
        for module, name, function in patches:
            stack.enter_context(mock.patch.object(module, name, function))
        run = Run(load_config(text, changes))
        run.steps_of(bucket, 0.0)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    options = parser.parse_args()
    rows, bucket = {}, 2  # of QM9: up to 19 atoms
    for name, (text, before, patches, after, expected) in CHANGES.items():
        # Virtual devices are made once a process: the mesh takes as many as it is told.
        one = before.get("mesh.cpu_devices") == 1
        before = (before | {"mesh.data": 1, "mesh.cpu_devices": 2}) if one else before
        old = prepared(text, before, patches, bucket)
        new = prepared(text, after, [], bucket)
        times = {"before": [], "after": []}
        for _ in range(options.rounds):
            for kind, run in (("before", old), ("after", new)):
                times[kind].append(1e3 * run.steps_of(bucket, options.seconds))
        row = {kind: statistics.median(values) for kind, values in times.items()}
        rows[name] = row | {"ratio": row["after"] / row["before"], "expected": expected}
        print(f"{name}: {row['before']:.1f} -> {row['after']:.1f} ms", flush=True)
    result = {
        "command": "python benchmarks/changes.py",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "changes": rows,
    }
    keep(result, options.json)


if __name__ == "__main__":
    runtime.keep_freed_memory()
    main()
