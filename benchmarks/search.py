"""The search for a recipe: short runs of one config with something changed, validation alone.

    python benchmarks/search.py                         all trials of `TRIALS` that have no line yet
    python benchmarks/search.py --trials "the recipe" AdamW --at-once=2
    python benchmarks/search.py --list

A trial is a run of `demetar.main` with a schedule as long as its steps, that stops, by
`config.checkpoint.stop_at`, before a run would evaluate test: no number here has seen it. Each adds
one line to benchmarks/results/search.jsonl. A trial that was killed goes on where it was.

`--at-once=2` runs two trials side by side with one device each. What they reach is the same (the
arithmetic depends on steps, and on devices by rounding only); molecules/s are then of one core
beside a busy one, and compare only with lines of the same `at_once`.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import threading

from data_pipelines.json_text import json_text

ROOT = pathlib.Path(__file__).parents[1]
RUNS = ROOT / "runs" / "search"
RESULTS = ROOT / "benchmarks" / "results" / "search.jsonl"
CONFIG = "qm9:quick"

# Where the search began: Muon and one target, read out of [CLS].
_BEGIN = {
    "data.targets": "('homo',)",
    "model.readout": "auto",
    "optim.learning_rate": 2.4e-3,
    "optim.weight_decay": 0.01,
}
_THREE = _BEGIN | {"data.targets": "('homo','lumo','gap')"}
_FAST = _THREE | {"optim.learning_rate": 3.4e-3, "optim.weight_decay": 0.05}
# Name -> what differs from `CONFIG` as it is now.
TRIALS = {
    "begin": _BEGIN,
    "three targets": _THREE,
    "rate 3.4e-3": _BEGIN | {"optim.learning_rate": 3.4e-3},
    "decay 0.05": _BEGIN | {"optim.weight_decay": 0.05},
    "fast": _FAST,
    "fast, rate 4.8e-3": _FAST | {"optim.learning_rate": 4.8e-3},
    "fast, decay 0.15": _FAST | {"optim.weight_decay": 0.15},
    "fast, mean": _FAST | {"model.readout": "mean"},
    "fast, batch 32": _FAST | {"data.batch_size": 32, "train.num_steps": 6_000},
    "fast, MLP 4": _FAST | {"model.mlp_ratio": 4},
    # From here on what differs from the recipe that the search has found: what each part is worth.
    "the recipe": {},
    "one target": {"data.targets": "('homo',)"},
    "AdamW": {
        "optim.name": "adamw",
        "optim.learning_rate": 1.2e-3,
        "optim.weight_decay": 0.01,
    },
    "no directions": {"model.directions": 0},
    "no edge angles": {"model.edge_angles": False},
    "no environment": {"model.environment": False},
    "no pair bias": {"model.pair_bias": False},
    "no edge atoms": {"model.edge_atoms": False},
    "no edges": {"model.cross_attention": False, "model.edge_angles": False},
    "3 joint layers": {"model.joint_layers": 3},
    "8 heads": {"model.num_heads": 8},
    "width 128": {"model.width": 128},
    "average 0.998": {"optim.ema_decay": 0.998},
    "linear": {"optim.schedule": "linear"},
    "twelve targets": {
        "data.targets": "('homo','lumo','gap','mu','alpha','r2','zpve','U0','U','H','G','Cv')",
        "model.readout": "auto",
    },
}


def run(name: str, steps: int, seed: int, at_once: int, commit: str) -> dict:
    """One trial, or the rest of one, of a commit; its line."""
    from demetar.exits import EXIT_PREEMPTED
    from demetar.records.files import read_jsonl
    from demetar.speed.machine import processor

    flags = _flags(name, steps, seed, at_once)
    workdir = RUNS / f"{name.replace(' ', '-')}-{steps}-{seed}"
    said = workdir.with_name(f"{workdir.name}.log")  # a name may have dots
    command = ["-m", "demetar.main", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    RUNS.mkdir(parents=True, exist_ok=True)
    with said.open("a") as log:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log)
    if done.returncode != EXIT_PREEMPTED:
        raise RuntimeError(f"{name!r} ended with {done.returncode}; see {said}")
    lines = read_jsonl(workdir / "metrics.jsonl")
    scores = [x["homo_mae"] for x in lines if x["split"] == "validation"]
    trained = [x for x in lines if x["split"] == "train"]
    rates = re.findall(r"(\d+) molecules/s,", said.read_text())
    return {
        "trial": name,
        "steps": flags["train.num_steps"],
        "seed": seed,
        "validation_homo_mev": round(min(scores), 2),
        "train_homo_mev": round(trained[-1]["homo_mae"], 2),
        "molecules_per_second": statistics.median(map(int, rates)),
        "at_once": at_once,
        "changes": TRIALS[name],
        "command": shlex.join(["python", *command]).replace(f"{ROOT}/", ""),
        "git_commit": commit,
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }


def _flags(name: str, steps: int, seed: int, at_once: int) -> dict:
    flags = {"train.num_steps": steps} | TRIALS[name]
    steps = flags["train.num_steps"]
    return flags | {
        "seed": seed,
        "train.eval_every": steps,
        "checkpoint.every_steps": 1_000,
        "checkpoint.stop_at": steps,
        "mesh.cpu_devices": max(1, os.cpu_count() // at_once),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", nargs="+", metavar="NAME", choices=TRIALS, default=[*TRIALS])
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="what has a line, best first")
    options = parser.parse_args()
    from demetar.records.files import read_jsonl
    from demetar.training.provenance import git_commit

    known = read_jsonl(RESULTS)
    if options.list:
        for x in sorted(known, key=lambda x: (x["steps"], x["validation_homo_mev"])):
            print(f"{x['validation_homo_mev']:7.2f} meV  {x['steps']:6} steps  {x['trial']}")
        return
    seen = {(x["trial"], x["steps"], x["seed"]) for x in known}
    steps_of = lambda name: TRIALS[name].get("train.num_steps", options.steps)
    todo = [x for x in options.trials if (x, steps_of(x), options.seed) not in seen]
    one_writes, commit = threading.Lock(), git_commit()  # before results change the checkout

    def work(name: str) -> None:
        line = run(name, options.steps, options.seed, options.at_once, commit)
        with one_writes, RESULTS.open("a") as file:
            file.write(json_text(line) + "\n")
        print(json_text({k: line[k] for k in ("trial", "validation_homo_mev", "train_homo_mev")}))
        sys.stdout.flush()

    with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
        for done in [pool.submit(work, name) for name in todo]:
            done.result()


if __name__ == "__main__":
    main()
