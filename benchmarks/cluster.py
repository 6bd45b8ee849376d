"""Two processes against one, and what saving costs; ratios measured in one run.

    python benchmarks/cluster.py [--json=benchmarks/results/cluster.json]

Processes: one with one core, and two with one core each, on the real QM9, the same global batch,
in turn, for `configs/qm9.py:quick` and for the model of `configs/qm9.py`. Beside them two jobs that
have nothing to do with each other, one core and half of the batch each: what this machine's two
cores could give at best. Molecules a second are the median over the progress lines of the second
half of the steps, when all is compiled. Two cores are needed.

Saving: the state of `configs/qm9.py` (10 million parameters), real steps of a small batch. How
long the loop stands still for a save, and how much longer the same steps take beside one.
"""

import argparse
import os
import pathlib
import platform
import re
import statistics
import tempfile
import time

import jax
from ours import REPOSITORY, keep

from demetar.config.command_line import load_config
from demetar.tools.local_job import LocalJob
from demetar.tools.resume_check import finish
from demetar.training import runtime
from demetar.training.checkpoints import Checkpoints
from demetar.training.experiment import build_experiment
from demetar.training.progress import Progress
from demetar.training.trainer import Trainer

_TURNS = 2  # after one that fills the cache of compiled programs

# Name -> config, global batch, steps, steps between progress lines, further flags.
_JOBS = {
    "quick": ("configs/qm9.py:quick", 64, 300, 15, []),
    "full": ("configs/qm9.py", 32, 24, 2, ["--config.data.buckets=(29,)"]),
}


def start(workdir: pathlib.Path, name: str, count: int, core: int, share: int) -> LocalJob:
    """A job on `count` cores from `core` on, with a `share`-th of the batch."""
    config, batch, steps, every, more = _JOBS[name]
    arguments = [
        f"--workdir={workdir}",
        f"--config={REPOSITORY}/{config}",
        "--config.mesh.cpu_devices=1",
        f"--config.data.batch_size={batch // share}",
        f"--config.log.every_steps={every}",
        f"--config.checkpoint.stop_at={steps}",
        "--config.checkpoint.every_steps=1000000",
        *more,
    ]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[core : core + count])
    job = LocalJob(arguments, count, quiet=True)
    os.sched_setaffinity(0, cores)
    return job


def rate(workdir: pathlib.Path, name: str) -> float:
    """Molecules a second in the second half of a run."""
    log = (workdir / "logs" / "process-0.log").read_text()
    found = re.findall(r"step (\d+)/.* (\d+) molecules/s", log)
    return statistics.median(float(r) for step, r in found if int(step) > _JOBS[name][2] / 2)


def scaling(folder: pathlib.Path, name: str) -> dict:
    """Rates of one process, of two, and of two jobs apart."""
    rates = {"one": [], "two": [], "two_apart": []}
    for turn in range(1 + _TURNS):
        for kind, jobs in (
            ("one", [(1, 0, 1)]),
            ("two", [(2, 0, 1)]),
            ("two_apart", [(1, 0, 2), (1, 1, 2)]),
        ):
            workdirs = [folder / f"{name}-{turn}-{kind}-{n}" for n in range(len(jobs))]
            running = [start(w, name, *job) for w, job in zip(workdirs, jobs, strict=True)]
            for job in running:
                finish(job)
            found = sum(rate(workdir, name) for workdir in workdirs)
            print(f"{name}, turn {turn}: {kind} {found:.0f} molecules/s", flush=True)
            if turn:
                rates[kind].append(found)
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    return {
        "config": _JOBS[name][0],
        "batch": _JOBS[name][1],
        "molecules_per_second": rates,
        "ratio_two_to_one": medians["two"] / medians["one"],
        "ratio_two_apart_to_one": medians["two_apart"] / medians["one"],
    }


def saving(folder: pathlib.Path) -> dict:
    """Seconds that the loop stands still for a save, and that the steps beside it take longer."""
    changes = {"data.edges": "bonds", "data.batch_size": 8}  # short steps: many samples
    changes |= {"data.buckets": (29,), "model.edge_attention": "full"}
    config = load_config("qm9", changes)
    runtime.configure(config)
    experiment = build_experiment(config)
    trainer, state = Trainer(experiment), experiment.create_state()
    bucket, graphs = trainer.gather(0)
    batch = trainer.to_devices(graphs)
    checkpoints = Checkpoints(folder, keep_last=2)
    progress = Progress.new(len(experiment.dataset.targets))

    def steps(number: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(number):
            state, sums = trainer.step(state, bucket, batch)
            float(sums.loss)
            checkpoints.poll()
        return time.perf_counter() - start

    steps(10)
    number = max(10, round(10 / (steps(10) / 10)))  # about ten seconds: longer than a save takes
    blocked, slower = [], []
    for _ in range(6):
        plain = steps(number)
        start = time.perf_counter()
        checkpoints.save(state, experiment.identity, progress)
        blocked.append(time.perf_counter() - start)
        beside = steps(number)
        checkpoints.wait()
        slower.append(blocked[-1] + beside - plain)
        print(f"save: stood still {blocked[-1]:.3f} s, cost {slower[-1]:.2f} s in all")
    checkpoints.close()
    leaves = jax.tree.leaves(state)
    return {
        "state_megabytes": sum(x.nbytes for x in leaves) / 1e6,
        "seconds_stood_still": blocked,
        "longest": max(blocked),
        "seconds_a_save_costs": slower,
        "share_of_a_minute": statistics.median(slower) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "command": "python benchmarks/cluster.py",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, gloo",
            "processes": {name: scaling(pathlib.Path(folder), name) for name in _JOBS},
            "saving": saving(pathlib.Path(folder) / "saving"),
        }
    keep(result, options.json)


if __name__ == "__main__":
    main()
