"""Throughput beside peers: the same molecules, in turn, on the same cores.

    pip install -e ".[qm9,bench]"
    python benchmarks/peers.py --json=benchmarks/results/peers.json

Every entry lives in a process of its own and waits; one at a time is told to work for some
seconds, all entries in turn, round after round, so that what the machine does meanwhile hits
all alike. A training step is all of it: assembling the batch, forward, backward, optimizer.
Forward is prediction alone, without gradients, batch assembled each time. All use all cores.
Medians over rounds; spread is (largest - smallest) / median. An entry that does not install
stays blank with the reason.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from data_pipelines.json_text import json_text
from demetar.speed.machine import processor
from demetar.training import runtime

REPOSITORY = pathlib.Path(__file__).parents[1]

# Name -> config, and molecules of a micro-batch: so many that what they need stays in the caches.
OURS = {
    "egnn-demetar": ("qm9:egnn", 8),  # 7 x 128
    "demetar-8x256": ("qm9:wide", 32),  # torchmd-net's size
    "demetar-quick": ("qm9:quick", 64),
}
# Peers that also run with our setting of the allocator (`runtime.keep_freed_memory`). As they
# come, the page faults of large batches cost them up to half of their rate.
KEPT = {"egnn-pytorch-kept": "egnn-pytorch", "et-torchmdnet-kept": "et-torchmdnet"}
_TRANSFORMER = "DEMETAr 8 x 256 to the equivariant transformer 8 x 256"
# ratio -> (ours, theirs)
RATIOS = {
    "EGNN 7 x 128": ("egnn-demetar", "egnn-pytorch"),
    "EGNN 7 x 128, theirs through torch.compile": ("egnn-demetar", "egnn-pytorch-compiled"),
    "EGNN 7 x 128, theirs keeping freed memory": ("egnn-demetar", "egnn-pytorch-kept"),
    _TRANSFORMER: ("demetar-8x256", "et-torchmdnet"),
    f"{_TRANSFORMER}, theirs keeping freed memory": ("demetar-8x256", "et-torchmdnet-kept"),
}


class OurWorker:
    """One of ours, through the project's own pipeline and step."""

    def __init__(self, name: str, batch_size: int):
        from ours import Run

        from demetar.config.command_line import load_config

        text, micro_batch = OURS[name]
        changes = {
            "data.batch_size": batch_size,
            "train.accumulation": max(1, batch_size // micro_batch),
            "mesh.cpu_devices": os.cpu_count(),
        }
        self._run = Run(load_config(text, changes))
        self._run.warm_up()
        self.num_parameters = self._run.num_parameters

    def train(self, seconds: float) -> float:
        return self._run.train(seconds).rate

    def forward(self, seconds: float) -> float:
        return self._run.forward(seconds)


class PeerWorker:
    """One of `torch_peers`."""

    def __init__(self, name: str, batch_size: int):
        import torch
        from ours import load_qm9
        from torch_peers import CUTOFF, PEERS

        if name in KEPT:
            runtime.keep_freed_memory()
        torch.set_num_threads(os.cpu_count())
        torch.manual_seed(0)
        self._torch, self._size = torch, batch_size
        self._peer = PEERS[KEPT.get(name, name)]()
        self.num_parameters = self._peer.num_parameters
        dataset = load_qm9(self._peer.edges, CUTOFF)
        self._arrays = dataset.arrays
        self._order = np.random.default_rng(0).permutation(dataset.split["train"])
        self._target = torch.from_numpy(dataset.arrays.graph_labels["homo"].astype(np.float32))
        self._optimizer = torch.optim.Adam(self._peer.model.parameters(), lr=1e-4)
        self._place = 0

    def _batch(self):
        self._place = (self._place + 1) % (len(self._order) // self._size)
        graphs = self._order[self._place * self._size :][: self._size]
        return graphs, self._peer.assemble(self._arrays, graphs)

    def _step(self):
        graphs, batch = self._batch()
        self._optimizer.zero_grad(set_to_none=True)
        loss = (self._peer.predict(batch) - self._target[graphs]).abs().mean()
        loss.backward()
        self._optimizer.step()

    def _predict(self):
        with self._torch.no_grad():
            self._peer.predict(self._batch()[1])

    def _rate(self, work, seconds: float) -> float:
        work()  # its memory may have to come back first
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            work()
            count += self._size
        rate = count / (time.perf_counter() - start)
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # for those whose turn it is now
        return rate

    def train(self, seconds: float) -> float:
        return self._rate(self._step, seconds)

    def forward(self, seconds: float) -> float:
        return self._rate(self._predict, seconds)


def serve(name: str, batch_size: int) -> None:
    """A worker: builds and warms up, says its size, then works as its input says."""
    out, sys.stdout = sys.stdout, sys.stderr  # only answers may go to the pipe
    worker = (OurWorker if name in OURS else PeerWorker)(name, batch_size)
    worker.train(2.0)
    worker.forward(2.0)
    print(json_text({"parameters": worker.num_parameters}), file=out, flush=True)
    for line in sys.stdin:
        kind, seconds = line.split()
        print(json_text(getattr(worker, kind)(float(seconds))), file=out, flush=True)


class Entry:
    """A worker's process, seen from the one that asks."""

    def __init__(self, name: str, batch_size: int):
        command = [sys.executable, __file__, f"--serve={name}", f"--batch={batch_size}"]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=REPOSITORY,
        )
        self.parameters = self._answer()["parameters"]

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise RuntimeError(said[-1] if said else "ended without a word")
        return json.loads(line)

    def ask(self, kind: str, seconds: float) -> float:
        self._process.stdin.write(f"{kind} {seconds}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(names, batch_size: int, rounds: int, seconds: float) -> dict:
    """Rates of all entries at one batch size."""
    entries, rows = {}, {}
    for name in names:
        try:
            entries[name] = Entry(name, batch_size)
            rows[name] = {"parameters": entries[name].parameters, "train": [], "forward": []}
        except RuntimeError as error:
            rows[name] = {"blank": str(error)}
        print(f"batch {batch_size}: {name} {'' if name in entries else rows[name]}", flush=True)
    for turn in range(rounds):
        for name, entry in entries.items():
            for kind in ("train", "forward"):
                rows[name][kind].append(entry.ask(kind, seconds))
            last = {kind: round(rows[name][kind][-1], 1) for kind in ("train", "forward")}
            print(f"batch {batch_size}, round {turn + 1}/{rounds}: {name} {last}", flush=True)
    for name, entry in entries.items():
        entry.close()
        for kind in ("train", "forward"):
            rates = rows[name].pop(kind)
            median = statistics.median(rates)
            spread = (max(rates) - min(rates)) / median
            rows[name][kind] = {"median": median, "spread": spread, "rates": rates}
    return rows


def ratios(rows: dict) -> dict:
    """Ours over theirs, median by median, where both are there."""
    found = {}
    for name, (ours, theirs) in RATIOS.items():
        if "train" in rows.get(ours, {}) and "train" in rows.get(theirs, {}):
            found[name] = {
                kind: rows[ours][kind]["median"] / rows[theirs][kind]["median"]
                for kind in ("train", "forward")
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, nargs="?", const=pathlib.Path("/dev/stdout"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[96, 128])
    parser.add_argument("--only", nargs="+", help="names of entries")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.batch)
    import torch
    from torch_peers import PEERS, check_egnn

    names = options.only or [*OURS, *PEERS, *KEPT]
    result = {
        "command": "python benchmarks/peers.py",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "egnn_pytorch_to_official_relative": check_egnn(),
        "seconds": options.seconds,
        "batches": {},
    }
    for size in options.batches:
        rows = compare(names, size, options.rounds, options.seconds)
        result["batches"][str(size)] = {"entries": rows, "ratios": ratios(rows)}
    text = json_text(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
