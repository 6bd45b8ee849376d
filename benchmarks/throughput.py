"""How fast our own configs train here, and what share of the machine that is.

    python benchmarks/throughput.py --json=benchmarks/results/throughput-<machine>.json

For each config: graphs a second of whole training steps (batch assembly, transfer, forward,
backward, optimizer) and of prediction alone; operations of the model, real atoms alone, as a
share of the machine's measured matrix-product peak; data wait and padding. Medians over rounds
in which the configs take turns. Beside them the time from the start of the command to its first
step, with warm caches.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from ours import REPOSITORY, Run, keep

from demetar.config.command_line import load_config
from demetar.speed.machine import Peak, processor
from demetar.training import runtime

# Name -> config, changes.
CONFIGS = {
    "qm9 quick": ("configs/qm9.py:quick", {}),
    "qm9 wide (8 x 256)": (
        "configs/qm9.py:wide",
        {"mesh.cpu_devices": 2, "train.accumulation": 4},
    ),
    "qm9 egnn (7 x 128)": (
        "configs/qm9.py:egnn",
        {"mesh.cpu_devices": 2, "train.accumulation": 12},
    ),
}


def first_step_seconds(folder: pathlib.Path) -> float:
    """From the start of the command to its first step, the second time that it runs."""
    for turn in range(2):
        command = [
            sys.executable, "-m", "demetar.main", "--config=configs/qm9.py:quick",
            f"--workdir={folder}/{turn}", "--config.checkpoint.stop_at=1",
        ]  # fmt: skip
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if line.startswith("First step after"):
                seconds = time.perf_counter() - start
        process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, nargs="?", const=pathlib.Path("/dev/stdout"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = first_step_seconds(pathlib.Path(folder))
    runs = {name: Run(load_config(*config)) for name, config in CONFIGS.items()}
    for run in runs.values():
        run.warm_up()
    found = {name: {"train": [], "forward": []} for name in CONFIGS}
    for turn in range(options.rounds):
        for name, run in runs.items():
            found[name]["train"].append(run.train(options.seconds))
            found[name]["forward"].append(run.forward(options.seconds / 2))
            rate = found[name]["train"][-1].rate
            print(f"round {turn + 1}/{options.rounds}: {name} {rate:.0f} graphs/s", flush=True)
    config = load_config(*CONFIGS["qm9 quick"])
    peak = Peak(runtime.cache_dir(config), "float32")
    rows = {}
    for name, run in runs.items():
        laps = found[name]["train"]
        median = lambda field: statistics.median(getattr(lap, field) for lap in laps)  # noqa: B023
        rates = [lap.rate for lap in laps]
        rows[name] = {
            "parameters": run.num_parameters,
            "batch": run.plan.batch_size,
            "train_per_second": median("rate"),
            "spread": (max(rates) - min(rates)) / median("rate"),
            "forward_per_second": statistics.median(found[name]["forward"]),
            "gflops": median("flops") / 1e9,
            "share_of_peak": peak.share(median("flops")),
            "data_wait": median("wait"),
            "fill_of_node_slots": run.plan.node_efficiency,
            "buckets": [[b.num_nodes, b.num_edges] for b in run.plan.buckets],
        }
    result = {
        "command": "python benchmarks/throughput.py",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "peak_gflops": peak.flops / 1e9,
        "memory_gb_per_s": peak.machine.bytes_per_s / 1e9,
        "measured_on": peak.machine.description,
        "peak_source": peak.machine.source,
        "first_step_seconds_warm": started,
        "configs": rows,
    }
    keep(result, options.json)


if __name__ == "__main__":
    main()
