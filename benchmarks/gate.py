"""The gate: every config compiled for accelerators that are not here, as a run there would.

    pip install -e ".[qm9,plan-gpu,plan-tpu]"
    python benchmarks/gate.py               all cells that are missing, and the page
    python benchmarks/gate.py --page        the page alone

A cell is one config on one topology in one type with one batch for each chip: its train step and
its evaluation step of every bucket (of one, where the cell says so), with the settings that a run
has. It is compiled in a process of its own. Cells are kept by the version of JAX, so run the script
again where another is installed. Writes benchmarks/results/gate.json and docs/results/gate.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from data_pipelines.json_text import json_text

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gate.json"
PAGE = ROOT / "docs" / "results" / "gate.md"


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is compiled.

    Attributes:
      config: as `--config` takes it.
      topology: as `demetar plan` takes it.
      dtype: of the model.
      batch_of_chip: graphs of a batch on each chip.
      buckets: how many of the largest; 0: all.
    """

    config: str
    topology: str = "h100:1x1"
    dtype: str = "float32"
    batch_of_chip: int = 16
    buckets: int = 1

    @property
    def name(self) -> str:
        buckets = "all buckets" if self.buckets == 0 else f"{self.buckets} bucket"
        return f"{self.config} {self.topology} {self.dtype} {self.batch_of_chip} {buckets}"


SYSTEMS = "schnet nmp et tfn se3_transformer equiformer cormorant lieconv egnn".split()
TOPOLOGIES = ("h100:1x8", "h100:32x8", "v5e:1x1", "v5e:2x4", "v5p:2x2x1")
CELLS = [
    *(Cell(config, buckets=0) for config in ("qm9", "qm9:quick", "qm9:wide")),
    *(Cell("qm9", batch_of_chip=batch) for batch in (1, 7, 100)),
    *(Cell(config, dtype="bfloat16") for config in ("qm9", "qm9:quick", "nbody")),
    *(Cell("qm9", place) for place in TOPOLOGIES),
    *(Cell("qm9", place, "bfloat16", 100) for place in TOPOLOGIES),
    *(Cell("qm9:quick", place) for place in TOPOLOGIES),
    *(Cell("nbody", place) for place in ("h100:1x1", *TOPOLOGIES)),
    *(Cell("qm9:large", place, "bfloat16") for place in ("h100:1x8", "h100:32x8", "v5p:2x2x2")),
    *(Cell(f"qm9:{system}") for system in SYSTEMS),
    *(Cell(f"nbody:{model}") for model in ("egnn", "velocity", "set_transformer", "glad_20")),
]  # fmt: skip


def compile_cell(cell: Cell) -> dict:
    """Both programs of each bucket of a cell: launches, what may differ, seconds; or why not."""
    # Before jax: see demetar/plan.py.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "none", "TF_CPP_MIN_LOG_LEVEL": "3"}
    import jax

    from demetar.config.command_line import load_config
    from demetar.speed.kernels import launches, may_differ
    from demetar.speed.program import Program
    from demetar.speed.topology import planned_devices
    from demetar.training import runtime
    from demetar.training.evaluator import Evaluator
    from demetar.training.experiment import build_experiment
    from demetar.training.provenance import git_commit
    from demetar.training.trainer import Trainer

    config = load_config(cell.config, {"mesh.cpu_devices": 0, "model.dtype": cell.dtype})
    chip, devices = planned_devices(cell.topology)
    batch = cell.batch_of_chip * len(devices)
    config.data.update({"batch_size": batch, "eval_batch_size": batch})
    config.train.accumulation = 1
    runtime.configure(config)
    jax.config.update("jax_enable_compilation_cache", False)
    experiment = build_experiment(config, devices)
    programs = {"train": Trainer(experiment), "evaluate": Evaluator(experiment)}
    rows = []
    for bucket in range(len(experiment.dataset.buckets))[-cell.buckets :]:
        for kind, compiled in programs.items():
            start = time.perf_counter()
            row = {"kind": kind, "num_nodes": experiment.dataset.buckets[bucket].num_nodes}
            try:
                program = Program(compiled.program(bucket).as_text())
                row["seconds"] = time.perf_counter() - start
                if chip.kind == "cuda":
                    row["launches"] = sum(launches(program).values())
                    row["may_differ"] = may_differ(program)
            except jax.errors.JaxRuntimeError as error:
                row["failed"] = str(error).splitlines()[0][:300]
            rows.append(row)
    return {"jax": jax.__version__, "git_commit": git_commit(), "programs": rows}


def read_results() -> dict[str, dict]:
    """Version of JAX -> name of a cell -> what was found."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def run_cell(cell: Cell) -> None:
    """Compiles a cell in a process of its own, and keeps what it finds."""
    fields = json_text(dataclasses.asdict(cell))
    done = subprocess.run(
        [sys.executable, __file__, f"--cell={fields}"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:  # of this machine: what a compiler refuses is in the output
        sys.exit(f"{cell.name} ended with {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    version = found.pop("jax")
    results = read_results()
    results.setdefault(version, {})[cell.name] = dataclasses.asdict(cell) | found
    RESULTS.write_text(json_text(results, indent=1) + "\n")
    bad = [row["failed"] for row in found["programs"] if "failed" in row]
    print(f"{version} {cell.name}: {bad or 'compiles'}", flush=True)


def _jax_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("jax")


def page_text() -> str:
    """docs/results/gate.md, from what has been compiled."""
    results = read_results()
    heads = (
        "config", "topology", "type", "graphs a chip", "buckets", "JAX", "programs",
        "launches, train step of the largest", "compiler, seconds in all",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + " --- |" * len(heads))
    differ = 0
    for cell in CELLS:
        for version in sorted(results):
            if cell.name not in results[version]:
                continue
            found = results[version][cell.name]
            programs = found["programs"]
            failed = [row for row in programs if "failed" in row]
            differ += sum(len(row.get("may_differ", ())) for row in programs)
            train = [row for row in programs if row["kind"] == "train" and "launches" in row]
            cells = [
                f"`{cell.config}`", cell.topology, cell.dtype, cell.batch_of_chip,
                "all" if cell.buckets == 0 else "largest", version,
                f"**{len(failed)} of {len(programs)} fail**: {failed[0]['failed']}" if failed
                else f"{len(programs)} compile",
                train[-1]["launches"] if train else "",
                round(sum(row.get("seconds", 0) for row in programs)),
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    words = (ROOT / "benchmarks" / "gate_page.md").read_text()
    compiled = {version: len(cells) for version, cells in results.items()}
    facts = {
        "cells": "\n".join(lines),
        "differ": str(differ),
        "compiled": ", ".join(f"{n} of {len(CELLS)} with jax {v}" for v, n in compiled.items()),
        "commits": ", ".join(
            sorted({cell["git_commit"] for cells in results.values() for cell in cells.values()})
        ),
    }
    for key, value in facts.items():
        words = words.replace("{{" + key + "}}", value)
    return words


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json_text(compile_cell(Cell(**json.loads(options.cell)))))
        return
    known = read_results().get(_jax_version(), {})
    for cell in [] if options.page else CELLS:
        if cell.name not in known:
            run_cell(cell)
    PAGE.write_text(page_text())


if __name__ == "__main__":
    main()
