"""Ten million molecules: how long a run takes to start, and how much memory it holds.

    python benchmarks/large.py [--copies=77] --json=benchmarks/results/large.json

QM9, repeated with noise on the positions (77 copies: 10,073,987 molecules), prepared once; then
`qm9:quick` with edges up to 3 angstrom is started three times, each in a process of its own, and
stopped after some steps. The second and third start find everything prepared. The third is killed
with SIGKILL and started again: the molecules of its steps must be those of the second. Memory is
that of the process: what it has for itself, and what it has read of the prepared files, which the
system takes back when it needs to.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from ours import REPOSITORY, keep

from data_pipelines import registry
from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import Dataset, make_buckets, training_mean
from data_pipelines.edges import load_edges
from data_pipelines.json_text import json_text
from data_pipelines.prepared import default_cache_dir, prepare, write
from data_pipelines.qm9 import DEFAULTS as QM9_DEFAULTS
from data_pipelines.qm9 import preparation
from data_pipelines.qm9.preparation import MoleculeArrays
from data_pipelines.qm9.properties import COLUMNS, ELEMENTS, HARTREE_IN_MEV
from data_pipelines.targets import Target
from demetar.records.graph_log import read_graph_log
from demetar.speed.machine import processor

HOMO = Target("homo", "meV", "e_HOMO", readout="cls")
NOISE = 0.01  # angstrom, of each coordinate
STEPS = 40


def _build(folder: pathlib.Path, copies: int) -> None:
    one, passport = preparation.load("qm9pack")
    rng = np.random.default_rng(0)
    number, atoms = len(one.index), len(one.atomic_number)
    position = np.empty((copies * atoms, 3), np.float32)
    for k in range(copies):
        noise = rng.normal(scale=NOISE, size=(atoms, 3)).astype(np.float32)
        position[k * atoms : (k + 1) * atoms] = one.position + noise
    offset = lambda x: np.concatenate([[0], np.cumsum(np.tile(np.diff(x), copies))])
    arrays = {
        "node_offset": offset(one.node_offset),
        "atomic_number": np.tile(one.atomic_number, copies),
        "position": position,
        "bond_offset": offset(one.bond_offset),
        "bonds": np.tile(one.bonds, (copies, 1)),
        "homo": np.tile(one.properties[:, COLUMNS.index("homo")] * HARTREE_IN_MEV, copies),
    }
    write(folder, arrays, {"copies": copies, "of": passport["content_sha256"], "molecules": number})


def load(*, copies: int, edges: str, edge_cutoff: float, cache_dir: str = "", buckets=(), **other):
    """The repeated QM9 as a data set."""
    del other
    folder = pathlib.Path(cache_dir or default_cache_dir()) / "repeated" / str(copies)
    arrays, passport = prepare(folder, lambda building: _build(building, copies), "5 GB")
    homo = arrays.pop("homo")
    index = np.arange(len(homo), dtype=np.int32)
    molecules = MoleculeArrays(index=index, properties=homo[:, None], **arrays)
    graphs = GraphArrays(
        index=index,
        node_offset=molecules.node_offset,
        atomic_number=molecules.atomic_number,
        position=molecules.position,
        edges=load_edges(molecules, edges, edge_cutoff, passport, cache_dir),
        graph_labels={"homo": homo},
    )
    order = np.random.RandomState(0).permutation(len(index))
    split = {"train": order[20_000:], "validation": order[:10_000], "test": order[10_000:20_000]}
    return Dataset(
        name="repeated", items="molecules", elements=ELEMENTS, arrays=graphs, targets=(HOMO,),
        split=split, split_name="random", buckets=make_buckets(graphs, buckets), passport=passport,
        about={"data": f"{len(index):,} molecules"},
        baselines=training_mean({"homo": homo}, split["train"]),
    )  # fmt: skip


def train(copies: int, workdir: str, stop_at: int) -> None:
    """A run of `stop_at` steps; prints its memory at the end, as JSON."""
    from demetar.config.command_line import load_config
    from demetar.exits import Preempted
    from demetar.job.job import Job
    from demetar.train import train_and_evaluate
    from demetar.training import runtime

    defaults = QM9_DEFAULTS | {"copies": copies}
    registry.DATASETS["repeated"] = registry.Source(load, defaults)
    changes = {"data.name": "repeated", "data.copies": copies, "data.edges": "cutoff"}
    changes |= {"checkpoint.stop_at": stop_at, "checkpoint.every_steps": 10, "log.graphs": True}
    changes |= {"log.every_steps": 10, "log.writers": ()}
    config = load_config("qm9:quick", changes)
    runtime.configure(config)
    with contextlib.suppress(Preempted):  # by stop_at
        train_and_evaluate(config, pathlib.Path(workdir), Job.alone())
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    wanted = ("VmHWM", "RssAnon", "RssFile")
    print(json_text({name: int(fields[name].split()[0]) * 1024 for name in wanted}))


def start(copies: int, workdir: pathlib.Path, stop_at: int, kill_after: int = 0) -> dict:
    """One start: seconds to its first step, memory at its end; killed after a step, if asked."""
    command = [
        sys.executable, __file__, f"--copies={copies}", f"--train={workdir}", f"--stop={stop_at}",
    ]  # fmt: skip
    begin, first = time.perf_counter(), None
    job = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in job.stderr:
        said.append(line)
        if line.startswith("First step after") and first is None:
            first = time.perf_counter() - begin
        if kill_after and line.startswith(f"step {kill_after}/"):
            job.kill()
    output = job.stdout.read()
    if job.wait() and not kill_after:
        sys.exit("".join(said[-20:]))
    memory = json.loads(output.splitlines()[-1]) if not kill_after else {}
    print(f"first step after {first:.1f} s {memory}", flush=True)
    return {"seconds_to_first_step": first} | memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=77, help="of QM9")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--stop", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.copies, options.train, options.stop)
        return
    cache = default_cache_dir()
    made = (cache / "repeated" / str(options.copies), cache / "edge_counts")
    known = set(made[1].glob("*"))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as after:
        after.callback(shutil.rmtree, made[0], ignore_errors=True)
        after.callback(lambda: [_remove(x) for x in set(made[1].glob("*")) - known])
        runs = [pathlib.Path(folder) / name for name in ("cold", "warm", "killed")]
        cold = start(options.copies, runs[0], 10)
        warm = start(options.copies, runs[1], STEPS)
        start(options.copies, runs[2], STEPS, kill_after=STEPS // 2)
        again = start(options.copies, runs[2], STEPS)
        seen = [read_graph_log(run) for run in runs[1:]]
    result = {
        "command": f"python benchmarks/large.py --copies={options.copies}",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "molecules": options.copies * 130_831,
        "cold": cold,
        "warm": warm,
        "resumed": again,
        "same_molecules_in_each_step": seen[0] == seen[1] and len(seen[0]) == STEPS,
    }
    keep(result, options.json)


def _remove(path: pathlib.Path) -> None:
    """A folder or a lock."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


if __name__ == "__main__":
    main()
