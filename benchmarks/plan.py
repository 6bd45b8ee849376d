"""Plans for machines that are not here, and the same prediction checked against this CPU.

    python benchmarks/plan.py --check       predicted against measured steps, on one core
    pip install -e ".[qm9,plan-gpu,plan-tpu]"
    python benchmarks/plan.py --plans       those that are missing
    python benchmarks/plan.py --page        the page alone

The check: three numbers, seconds of a matrix product's operation, of an exponential and of a byte,
come from the profile of one config. From them and from the kernels of the compiled programs follow
the steps of the others.
Writes benchmarks/results/plan-check.json, benchmarks/results/plans.json, docs/results/plan.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import scipy.optimize

from data_pipelines.json_text import json_text
from demetar.speed.kernels import Kernel, kernels_of
from demetar.speed.program import Program
from demetar.speed.timeline import Rates, predict

ROOT = pathlib.Path(__file__).parents[1]
CHECK = ROOT / "benchmarks" / "results" / "plan-check.json"
PLANS = ROOT / "benchmarks" / "results" / "plans.json"
PAGE = ROOT / "docs" / "results" / "plan.md"

# Config -> graphs of a batch; the first one gives the three numbers.
CHECKED = {
    "qm9:egnn": 8,
    "qm9:quick": 64,
    "qm9": 16,
    "qm9:wide": 16,
    "qm9:schnet": 32,
    "qm9:nmp": 20,
    "nbody": 100,
    "nbody:velocity": 100,
    "nbody:egnn": 100,
}
_STEPS = 12
_CACHE, _CACHED = 2 * 2**20, 0.4  # of `Rates`, for a core of this machine; chosen by these configs

# Config, topology, graphs of a batch on each chip, further flags.
PLANNED = [
    *(("qm9", "h100:1x1", batch, ()) for batch in (16, 128)),
    ("qm9", "h100:1x1", 128, ("--config.model.dtype=bfloat16",)),
    ("qm9", "h100:1x8", 128, ("--config.mesh.gradient_groups=1",)),
    *(("qm9", place, 128, ()) for place in ("h100:1x8", "h100:32x8")),
    *(("qm9:wide", place, 128, ()) for place in ("h100:1x8", "h100:32x8")),
    ("qm9:wide", "h100:32x8", 16, ()),
    *(("qm9:large", place, 128, ()) for place in ("h100:1x8", "h100:32x8")),
    ("qm9:large", "h100:32x8", 128, ("--config.mesh.fsdp=1", "--config.mesh.model=1")),
    ("qm9:large", "h100:32x8", 512, ("--config.mesh.fsdp=1", "--config.mesh.model=1")),
    *(("qm9", place, 128, ()) for place in ("v5e:1x1", "v5e:2x4", "v5p:2x2x2")),
    ("nbody", "h100:1x1", 100, ()),
]


# --- the check -----------------------------------------------------------------------------------


def measure(config_name: str) -> dict:
    """A step of the largest bucket on one device: seconds, and what its program does."""
    import jax

    from demetar.config.command_line import load_config
    from demetar.speed.machine import processor
    from demetar.speed.trace import read_trace, self_times
    from demetar.training import runtime
    from demetar.training.experiment import build_experiment
    from demetar.training.provenance import git_commit
    from demetar.training.trainer import Trainer

    changes = {"mesh.cpu_devices": 1, "data.batch_size": CHECKED[config_name]}
    config = load_config(config_name, changes)
    config.train.accumulation = 1
    runtime.configure(config)
    # A program that is read back from the cache has no text.
    jax.config.update("jax_enable_compilation_cache", False)
    trainer = Trainer(build_experiment(config))
    largest = len(trainer.plan.buckets) - 1
    step = next(k for k in range(10**6) if trainer.plan[k][0] == largest)
    kernels = kernels_of(Program(trainer.program(largest).as_text()))
    batch = trainer.to_devices(trainer.gather(step)[1])
    state = trainer.experiment.create_state()
    times = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        state, sums = trainer.step(state, largest, batch)
        jax.block_until_ready((state, sums))
        times.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_STEPS):
                state, sums = trainer.step(state, largest, batch)
            jax.block_until_ready((state, sums))
        spent = self_times(read_trace(pathlib.Path(folder)))
    return {
        "graphs": config.data.batch_size,
        "seconds": statistics.median(times[2:]),
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
        # Of each kernel, all its turns, under the profiler.
        "seconds_of": {k.name: spent.get(k.name, 0.0) / 1e6 / _STEPS for k in kernels},
        "machine": f"{processor()}, one core",
        "git_commit": git_commit(),
    }


def calibrate(kernels: list[Kernel], seconds_of: dict[str, float]) -> Rates:
    """Seconds of an operation of a product, of an exponential and of a byte, from a profile."""
    moved = lambda k: k.bytes * (_CACHED if k.bytes <= _CACHE else 1)
    work_Kx3 = np.array(
        [[k.times * x for x in (k.product, k.functions, moved(k))] for k in kernels]
    )
    found, _ = scipy.optimize.nnls(work_Kx3, np.array([seconds_of[k.name] for k in kernels]))
    product, function, byte = map(float, found)
    return Rates(product, function, byte, 0.0, cache=_CACHE, cached=_CACHED, adds_up=True)


def check() -> None:
    """Measures all configs, each in a process of its own on one core, and predicts."""
    core = min(os.sched_getaffinity(0))
    rows, rates = {}, None
    for name in CHECKED:
        done = subprocess.run(
            ["taskset", "-c", str(core), sys.executable, __file__, f"--measure={name}"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        row = json.loads(done.stdout.splitlines()[-1])
        kernels = [Kernel(**fields) for fields in row.pop("kernels")]
        seconds_of = row.pop("seconds_of")
        rates = rates or calibrate(kernels, seconds_of)
        for key in ("product", "functions", "bytes"):
            row[key] = sum(k.times * getattr(k, key) for k in kernels)
        row["predicted"] = predict(kernels, rates, {}).total
        rows[name] = row
        ratio = row["predicted"] / row["seconds"]
        print(f"{name}: {1e3 * row['seconds']:.1f} ms, predicted {ratio:.2f} of it", flush=True)
    content = {
        "command": "python benchmarks/plan.py --check",
        "calibrated_by": next(iter(rows)),
        "rates": dataclasses.asdict(rates),
        "rows": rows,
    }
    CHECK.write_text(json_text(content, indent=1) + "\n")


# --- plans ---------------------------------------------------------------------------------------


def plan_name(config: str, topology: str, batch: int, flags: tuple[str, ...]) -> str:
    return " ".join((config, topology, f"{batch} a chip", *flags))


def make_plans() -> None:
    """Those of `PLANNED` that are missing."""
    from demetar.speed.topology import read_topology
    from demetar.training.provenance import git_commit

    known = json.loads(PLANS.read_text()) if PLANS.exists() else {}
    for row in PLANNED:
        config, topology, batch, flags = row
        name = plan_name(*row)
        if name in known and known[name]["git_commit"] == git_commit():
            continue
        chips = 1
        for size in read_topology(topology)[2]:
            chips *= size
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "plan.json"
            command = [
                "-m", "demetar.plan", f"--config={config}", f"--topology={topology}",
                f"--batch={batch * chips}", *flags,
            ]  # fmt: skip
            done = subprocess.run(
                [sys.executable, *command, f"--json={file}"],
                cwd=ROOT, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr}")
            known[name] = json.loads(file.read_text()) | {
                "config": config,
                "batch_of_chip": batch,
                "chips": chips,
                "flags": list(flags),
                "command": "python " + " ".join(command),
                "git_commit": git_commit(),
            }
        PLANS.write_text(json_text(known, indent=1) + "\n")
        print(f"{name}: {1e3 * known[name]['predicted']['step']:.3f} ms", flush=True)


# --- the page ------------------------------------------------------------------------------------


def page_text() -> str:
    """docs/results/plan.md, from what has been measured and planned."""
    words = (ROOT / "benchmarks" / "plan_page.md").read_text()
    checked = json.loads(CHECK.read_text())
    plans = json.loads(PLANS.read_text())
    rows = checked["rows"].values()
    off = [row["predicted"] / row["seconds"] - 1 for row in list(rows)[1:]]
    facts = {
        "check": _check_table(checked["rows"]),
        "calibrated": checked["calibrated_by"],
        "product_rate": f"{1e-9 / checked['rates']['product']:.0f}",
        "function_time": f"{1e9 * checked['rates']['function']:.2f}",
        "byte_rate": f"{1e-9 / checked['rates']['byte']:.0f}",
        "cache": f"{checked['rates']['cache'] / 2**20:.0f}",
        "cached": f"{checked['rates']['cached']}",
        "largest_error": f"{100 * max(map(abs, off)):.0f} %",
        "machine": next(iter(rows))["machine"],
        "check_commit": ", ".join(sorted({row["git_commit"] for row in rows})),
        "plans": _plan_table(plans),
        "costs": _cost_table(plans),
        "plan_commits": ", ".join(sorted({plan["git_commit"] for plan in plans.values()})),
    }
    for key, value in facts.items():
        words = words.replace("{{" + key + "}}", value)
    return words


def _table(heads: tuple[str, ...], lines: list[list]) -> str:
    return "\n".join(
        "| " + " | ".join(map(str, cells)) + " |" for cells in (heads, ["---"] * len(heads), *lines)
    )


def _check_table(rows: dict[str, dict]) -> str:
    heads = (
        "config", "graphs", "products, GFLOP", "exponentials, millions", "MB", "measured, ms",
        "predicted, ms", "predicted / measured",
    )  # fmt: skip
    lines = []
    for name, row in rows.items():
        measured, predicted = row["seconds"], row["predicted"]
        lines.append(
            [
                f"`{name}`", row["graphs"], f"{row['product'] / 1e9:.2f}",
                f"{row['functions'] / 1e6:.1f}", f"{row['bytes'] / 1e6:.0f}",
                f"{1e3 * measured:.1f}", f"{1e3 * predicted:.1f}", f"{predicted / measured:.2f}",
            ]
        )  # fmt: skip
    return _table(heads, lines)


def _plan_table(plans: dict[str, dict]) -> str:
    heads = (
        "config", "topology", "graphs a chip", "type", "launches", "predicted step, ms (range)",
        "bound by", "collectives, ms", "of it hidden", "graphs/s, predicted",
        "weak scaling to 8 / 256 chips",
    )  # fmt: skip
    lines = []
    for plan in plans.values():
        found, scaling = plan["predicted"], plan["predicted_scaling"]
        limits = {k[9:]: v for k, v in found.items() if k.startswith("bound by ")}
        total = found["computing"] + found["waiting for collectives"]
        talked = found["communicating"]
        waited = found["waiting for collectives"]
        hidden = f"{max(0.0, 1 - waited / talked):.0%}" if talked else ""
        percent = lambda n, scaling=scaling: f"{scaling[n]:.1%}" if n in scaling else "–"
        lines.append(
            [
                " ".join([f"`{plan['config']}`", *(f"`{flag}`" for flag in plan["flags"])]),
                plan["topology"], plan["batch_of_chip"], plan["type"], f"{plan['launches']:,}",
                f"{1e3 * found['step']:.2f} ({1e3 * found['step, best']:.2f} to "
                f"{1e3 * found['step, worst']:.2f})",
                ", ".join(f"{name} {spent / total:.0%}" for name, spent in limits.items()),
                f"{1e3 * talked:.2f}" if talked else "", hidden,
                f"{found['graphs a second']:,.0f}",
                f"{percent('8')} / {percent('256')}" if scaling else "",
            ]
        )  # fmt: skip
    return _table(heads, lines)


def _cost_table(plans: dict[str, dict]) -> str:
    lines = []
    for name, plan in plans.items():
        found = plan["predicted"]
        total = found["computing"] + found["waiting for collectives"]
        largest = list(plan["predicted_costs"].items())[:3]
        cells = [f"{k} {v['seconds'] / total:.0%} ({v['bound_by']})" for k, v in largest]
        lines.append([f"`{name}`", *cells])
    return _table(("plan", "largest", "second", "third"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="measure this CPU")
    parser.add_argument("--plans", action="store_true", help="make the plans that are missing")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json_text(measure(options.measure)))
        return
    if options.check:
        check()
    if options.plans:
        make_plans()
    if CHECK.exists() and PLANS.exists():
        PAGE.write_text(page_text())


if __name__ == "__main__":
    main()
