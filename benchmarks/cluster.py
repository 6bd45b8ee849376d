"""Two processes against one, and what saving costs; ratios measured in one run.

    python benchmarks/cluster.py [--json=benchmarks/results/cluster.json]

Processes: one with one core, and two with one core each, on the real QM9, the same global batch,
in turn, for `configs/qm9.py:quick` and for the model of `configs/qm9.py`. Beside them two jobs that
have nothing to do with each other, one core and half of the batch each: what this machine's two
cores could give at best. Molecules a second are the median over the progress lines of the second
half of the steps, when all is compiled. Two cores are needed.

Saving: the state of `configs/qm9.py` (9.8 million parameters), real steps of a small batch. How
long the loop stands still for a save, and how much longer the same steps take beside one.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import re
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import flags

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan
from demetar.local import LocalJob
from demetar.train import compiled_train_step, new_progress
from demetar.training import runtime, sharding
from demetar.training.checkpoints import Checkpoints
from demetar.training.experiment import build_experiment
from demetar.verify_resume import finish

REPOSITORY = pathlib.Path(__file__).parents[1]
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
    config = load_config(REPOSITORY / "configs" / "qm9.py")
    config.data.update({"edges": "bonds", "batch_size": 8})  # short steps: many samples
    config.model.edge_attention = "full"
    runtime.configure(config)
    experiment = build_experiment(config)
    mesh, size = experiment.mesh, config.data.batch_size
    buckets = experiment.dataset.buckets[-1:]
    plan = BatchPlan(
        experiment.arrays.sizes, experiment.dataset.split["train"], buckets, size, seed=0
    )
    step = compiled_train_step(experiment)
    state = experiment.create_state()
    batch = batching.gather(experiment.arrays, plan[0][1], buckets[0])
    batch = sharding.to_devices(batch, mesh, size)
    checkpoints = Checkpoints(folder, keep_last=2)
    meta = experiment.identity | {"progress": new_progress(1)}

    def steps(number: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(number):
            state, sums = step(0, state, batch, sharding.flags(mesh, False), np.float32(1))
            float(sums.loss)
            checkpoints.poll()
        return time.perf_counter() - start

    steps(10)
    number = max(10, round(10 / (steps(10) / 10)))  # about ten seconds: longer than a save takes
    blocked, slower = [], []
    for _ in range(6):
        plain = steps(number)
        start = time.perf_counter()
        checkpoints.save(state, meta)
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


def load_config(file: pathlib.Path):
    """The config of a file; it is Python, and executed."""
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "command": "python benchmarks/cluster.py",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU, gloo",
            "processes": {name: scaling(pathlib.Path(folder), name) for name in _JOBS},
            "saving": saving(pathlib.Path(folder) / "saving"),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
