"""Accuracy for time: the same 15 minutes on the same cores, the same molecules, every model.

    pip install -e ".[qm9,bench]"
    python benchmarks/race.py --entry=schnet-pyg          each entry alone, one after the other
    python benchmarks/race.py --entry=demetar
    python benchmarks/race.py --list

Each entry trains on HOMO of QM9, split `dimenet`, L1 on standardised targets, and stops after
`--minutes` of wall-clock. Peers: their published peak rate, Adam, linear warm-up over 2 % of
the time and a cosine to 0 at its end (their own schedules are for days); their clock stands
still while they are evaluated, and starts when data and model are there. Ours: `demetar.main`,
whose clock runs from its card on, compiling and evaluating included. The last weights are the
result, on the validation split: our settings were chosen on it, those of the peers are their
authors'. `demetar.main` also tests, as it always does, after its time; nothing here reads it.

Writes benchmarks/results/race/<entry>.json; `speed_page.py` draws them.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

from data_pipelines.json_text import json_text
from demetar.speed.machine import processor
from demetar.training import runtime

REPOSITORY = pathlib.Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "race"
BATCH_SIZE = 64

# Config, and steps: no more than fit into 15 minutes here, by the rate of a short run before.
OURS = {
    "demetar": ("configs/qm9.py:quick", 15_000),
    "egnn-demetar": ("configs/qm9.py:egnn,quick", 3_200),
}


def race_peer(name: str, minutes: float, seed: int) -> dict:
    """Trains a peer of `torch_peers` for `minutes` of its own clock."""
    import torch
    from ours import load_qm9
    from torch_peers import CUTOFF, PEERS

    runtime.keep_freed_memory()  # as ours does: without it the transformer is half as fast
    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count())
    peer = PEERS[name]()
    dataset = load_qm9(peer.edges, CUTOFF)
    arrays, train = dataset.arrays, dataset.split["train"]
    homo_G = arrays.graph_labels["homo"]
    mean, std = homo_G[train].mean(), homo_G[train].std()
    target_G = torch.from_numpy(((homo_G - mean) / std).astype(np.float32))
    optimizer = torch.optim.Adam(peer.model.parameters(), lr=peer.learning_rate)
    rng, budget = np.random.default_rng(seed), 60 * minutes
    curve, seconds, molecules, step = [], 0.0, 0, 0
    order = rng.permutation(train)

    def mae(graphs) -> float:
        peer.model.eval()
        with torch.no_grad():
            errors = [
                (peer.predict(peer.assemble(arrays, part)) - target_G[part]).abs()
                for part in np.array_split(graphs, max(1, len(graphs) // 256))
            ]
        peer.model.train()
        return float(torch.cat(errors).mean() * std)

    # All that a first call builds (compiled programs, kernels) is built before the clock starts.
    peer.predict(peer.assemble(arrays, train[:BATCH_SIZE])).sum().backward()
    points = [budget * k / 6 for k in range(1, 6)]
    while seconds < budget:
        start = time.perf_counter()
        if len(order) < BATCH_SIZE:
            order = rng.permutation(train)
        graphs, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        done = seconds / budget
        rate = min(1.0, done / 0.02 + 1e-3) * 0.5 * (1 + np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = peer.learning_rate * rate
        optimizer.zero_grad(set_to_none=True)
        loss = (peer.predict(peer.assemble(arrays, graphs)) - target_G[graphs]).abs().mean()
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        step, molecules = step + 1, molecules + BATCH_SIZE
        if points and seconds > points[0]:
            points.pop(0)
            value = mae(dataset.split["validation"][:1_000])
            curve.append({"seconds": seconds, "step": step, "mae": value, "count": 1_000})
            print(f"{seconds:6.0f} s  step {step}  validation MAE {value:.1f} meV", flush=True)
    final = mae(dataset.split["validation"])
    curve.append({"seconds": seconds, "step": step, "mae": final, "count": 10_000})
    return {
        "parameters": peer.num_parameters,
        "learning_rate": peer.learning_rate,
        "steps": step,
        "molecules_per_second": molecules / seconds,
        "seconds": seconds,
        "validation_mae_mev": final,
        "curve": curve,
        "torch": torch.__version__,
    }


def race_ours(name: str, minutes: float, seed: int) -> dict:
    """Runs `demetar.main` and reads what it wrote."""
    config, steps = OURS[name]
    steps = round(steps * minutes / 15)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        command = [
            sys.executable, "-m", "demetar.main", f"--config={config}", f"--workdir={workdir}",
            f"--config.seed={seed}", f"--config.train.num_steps={steps}",
            f"--config.train.eval_every={steps // 12}",
            "--config.data.split=dimenet", f"--config.data.batch_size={BATCH_SIZE}",
            "--config.log.every_steps=500", "--config.checkpoint.every_steps=1000000",
        ]  # fmt: skip
        subprocess.run(command, cwd=REPOSITORY, check=True)
        log = (workdir / "logs" / "process-0.log").read_text()
        result = json.loads((workdir / "result.json").read_text())
        parameters = int(re.search(r"Total: ([\d,]+)", log)[1].replace(",", ""))
    clock = lambda line: datetime.datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")
    lines = log.splitlines()
    card = next(line for line in lines if " buckets " in line)
    start = clock(card)
    curve = []
    for line in lines:
        found = re.search(r"step (\d+)  validation MAE homo ([\d.]+) meV", line)
        if found:
            seconds = (clock(line) - start).total_seconds()
            step, mae = int(found[1]), float(found[2])
            curve.append({"seconds": seconds, "step": step, "mae": mae, "count": 10_000})
    last = curve[-1]
    return {
        "parameters": parameters,
        "config": config,
        "learning_rate": result["config"]["optim"]["learning_rate"],
        "steps": steps,
        "molecules_per_second": steps * BATCH_SIZE / last["seconds"],
        "seconds": last["seconds"],
        "validation_mae_mev": last["mae"],
        "curve": curve,
        "git_commit": result["git_commit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entry")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.list or not options.entry:
        from torch_peers import PEERS

        print("\n".join((*OURS, *PEERS)))
        return
    race = race_ours if options.entry in OURS else race_peer
    result = {
        "entry": options.entry,
        "command": f"python benchmarks/race.py --entry={options.entry}",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "minutes": options.minutes,
        "seed": options.seed,
        "batch_size": BATCH_SIZE,
        "split": "dimenet",
        **race(options.entry, options.minutes, options.seed),
    }
    print({k: v for k, v in result.items() if k != "curve"})
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{options.entry}.json").write_text(json_text(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
