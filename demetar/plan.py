"""A plan before you pay: what a config would need and cost on a machine you do not have.

    python -m demetar.plan --config=configs/qm9.py --topology=h100:4x8 [--batch=N] [--html=FILE]

Compiles the real, sharded train step for that topology, without an accelerator, and prints
parameters, memory of each chip, operations and bytes of a step, the collectives, and what
follows from them: time of a step, molecules a second, weak scaling to 1024 chips, days and
chip-hours of the config's training. `h100:4x8` is 4 nodes of 8 GPUs, `v5e:16x16` a TPU slice;
another GPU is described by a file like those in demetar/accelerators: `my.json:2x8`.

Needs an extra: `pip install -e ".[plan-gpu]"` or `".[plan-tpu]"`. Everything predicted is marked
so; a roofline is the fastest a machine could be, not what it will be.
"""

import base64
import dataclasses
import functools
import html
import io
import math
import os
import pathlib
import sys

# Before jax: it must not look for the accelerator that it is to compile for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines.batch_plan import BatchPlan
from data_pipelines.errors import UserError
from demetar.exits import exits_cleanly
from demetar.records.log import say
from demetar.speed import flops
from demetar.speed.topology import (
    COLLECTIVES,
    Accelerator,
    Collective,
    collectives,
    planned_devices,
)
from demetar.train import abstract_arguments, jitted_train_step
from demetar.training import runtime
from demetar.training.experiment import Experiment, build_experiment

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "As h100:4x8 or v5e:16x16.")
_BATCH = flags.DEFINE_integer("batch", None, "Global batch, instead of the config's.")
_HTML = flags.DEFINE_string("html", None, "File for the table and the plot of scaling.")

_MAX_CHIPS = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known (compiled, counted) and what follows from it (predicted).

    Attributes:
      experiment: on the planned mesh.
      topology: as given.
      chip: of it.
      memory: bytes of each chip: state, batch and outputs, temporaries, all.
      counted: operations of a step of each bucket, by `demetar.flops`, over all chips.
      compiler_flops: of the largest bucket over all chips, where the compiler says it.
      step_bytes: of each bucket, over all chips.
      bytes_source: where these are from.
      collectives: of a step.
    """

    experiment: Experiment
    topology: str
    chip: Accelerator
    memory: dict[str, float]
    counted: list[flops.Count]
    compiler_flops: float | None
    step_bytes: list[float]
    bytes_source: str
    collectives: list[Collective]

    @property
    def chips(self) -> int:
        return self.experiment.mesh.size

    @functools.cached_property
    def batches(self) -> BatchPlan:
        experiment = self.experiment
        return BatchPlan(
            experiment.arrays.sizes,
            experiment.dataset.split["train"],
            experiment.dataset.buckets,
            experiment.config.data.batch_size,
            experiment.config.seed,
        )

    @property
    def num_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.experiment.abstract_state().params))

    def compute_seconds(self) -> float:
        """Mean over the buckets of an epoch of max(operations / peak, bytes / bandwidth)."""
        peak = self.chip.peak_flops.get(self.experiment.config.model.dtype)
        peak = peak or self.chip.peak_flops["float32"] / 16  # float64, about
        times = [
            max(c.total / peak, b / self.chip.memory_bytes_per_s) / self.chips
            for c, b in zip(self.counted, self.step_bytes, strict=True)
        ]
        return float(np.average(times, weights=self.batches.batches_per_bucket))

    def communication_seconds(self) -> float:
        """All collectives, one after the other, hidden behind nothing."""
        return sum(c.seconds(self.chip) for c in self.collectives)

    def scaling(self) -> list[tuple[int, float]]:
        """(chips, efficiency): the batch of each chip kept, only the axis `data` growing."""
        shape = self.experiment.mesh.shape
        unit = shape["fsdp"] * shape["model"]
        powers = range(int(math.log2(_MAX_CHIPS // unit)) + 1)
        return [(unit * 2**k, self.step_seconds(1) / self.step_seconds(2**k)) for k in powers]

    def step_seconds(self, copies: int) -> float:
        """Of a step with so many copies of the state, as many graphs on each chip as here."""
        shape = self.experiment.mesh.shape
        unit = shape["fsdp"] * shape["model"]
        across = [c for c in self.collectives if c.over_data]
        if shape["data"] == 1:  # none to look at: gradients of each part of the state
            across = [Collective("all-reduce", 1, 1, 4 * self.num_parameters / unit)]
        seconds = self.compute_seconds()
        seconds += sum(c.seconds(self.chip) for c in self.collectives if not c.over_data)
        for c in across:
            group = c.group // shape["data"] * copies
            stride = self.chips // c.group if shape["data"] > 1 else unit
            near = min(group, max(1, self.chip.chips_near // stride))
            seconds += dataclasses.replace(c, group=group, near=near).seconds(self.chip)
        return seconds


class DoesNotFit(UserError):
    """The compiler itself found too little memory."""


def compile_largest(experiment: Experiment, chip: Accelerator):
    """The train step of the largest bucket, compiled for the planned devices."""
    arguments = abstract_arguments(experiment, len(experiment.dataset.buckets) - 1)
    # float32 products of GPUs, sharded over `model`, fail to lower with Triton.
    options = {"xla_gpu_enable_triton_gemm": False} if chip.kind == "cuda" else {}
    try:
        return jitted_train_step(experiment).lower(*arguments).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit(str(error).splitlines()[0][:300]) from error
        raise


def memory_of(compiled) -> dict[str, float]:
    """Bytes of each chip, by the compiler."""
    found = compiled.memory_analysis()
    memory = {
        "state, batch and results": found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    return memory | {"all": sum(memory.values())}


def make_plan(config, topology: str, chip: Accelerator, devices) -> Plan:
    """Compiles the step of the largest bucket, and counts all of them."""
    experiment = build_experiment(config, devices)
    step = jitted_train_step(experiment)
    buckets = range(len(experiment.dataset.buckets))
    say(f"Counting {len(buckets)} buckets, compiling the largest for {len(devices)} chips ...")
    counted = [flops.count(step, *abstract_arguments(experiment, b)) for b in buckets]
    compiled = compile_largest(experiment, chip)
    memory = memory_of(compiled)
    cost = compiled.cost_analysis() or {}
    chips = experiment.mesh.size
    state_bytes = 2 * compiled.memory_analysis().argument_size_in_bytes * chips
    width = np.dtype(experiment.model.dtype).itemsize
    step_bytes = [c.matmul_bytes + width * c.other + state_bytes for c in counted]
    source = "counted: matrix products, the state, and every other result written once"
    # A loop's body is in the compiler's sums once, however often it runs.
    once = config.train.accumulation == 1
    if once and cost.get("bytes accessed"):
        largest = cost["bytes accessed"] * chips
        step_bytes = [largest * b / step_bytes[-1] for b in step_bytes]
        source = "compiler, for the largest bucket; scaled by the count for the others"
    return Plan(
        experiment=experiment,
        topology=topology,
        chip=chip,
        memory=memory,
        counted=counted,
        compiler_flops=cost["flops"] * chips if once and cost.get("flops", 0) > 0 else None,
        step_bytes=step_bytes,
        bytes_source=source,
        collectives=collectives(
            compiled.as_text(),
            chips,
            chip.chips_near,
            config.mesh.fsdp * config.mesh.model,
        ),
    )


def remedies(config, topology: str, chip: Accelerator, devices) -> list[str]:
    """Settings that make a config fit, each tried with the compiler; one of each kind."""
    mesh, batch = config.mesh, config.data.batch_size
    parts = len(devices) // mesh.model  # of a batch
    factors = [2**k for k in range(1, 8)]
    kinds = {
        "batch": (
            "--batch={}",
            [batch // f for f in factors if batch % f == 0 and batch // f % parts == 0],
            lambda trial, value: trial.data.update({"batch_size": value}),
        ),
        "accumulation": (
            "--config.train.accumulation={}",
            [
                config.train.accumulation * f
                for f in factors
                if batch % (parts * config.train.accumulation * f) == 0
            ],
            lambda trial, value: trial.train.update({"accumulation": value}),
        ),
        "fsdp": (
            "--config.mesh.fsdp={}",
            [mesh.fsdp * f for f in factors if parts % (mesh.fsdp * f) == 0],
            lambda trial, value: trial.mesh.update({"fsdp": value, "data": -1}),
        ),
    }
    found = []
    for text, values, change in kinds.values():
        # The strongest first: where that does not fit, nothing of this kind does.
        fitting = None
        for value in reversed(values):
            trial = config.copy_and_resolve_references()
            with trial.unlocked():
                change(trial, value)
            say(f"Trying {text.format(value)} ...")
            try:
                compiled = compile_largest(build_experiment(trial, devices), chip)
            except UserError:
                break
            if memory_of(compiled)["all"] > chip.memory_bytes:
                break
            fitting = text.format(value)
        if fitting:
            found.append(fitting)
    return found


def report(plan: Plan) -> list[tuple[str, str]]:
    """Rows of the table: name, text."""
    experiment, chip, config = plan.experiment, plan.chip, plan.experiment.config
    batches, graphs = plan.batches, config.data.batch_size
    compute, talk = plan.compute_seconds(), plan.communication_seconds()
    seconds = compute + talk
    mean_flops = np.average([c.total for c in plan.counted], weights=batches.batches_per_bucket)
    mean_bytes = np.average(plan.step_bytes, weights=batches.batches_per_bucket)
    peak = chip.peak_flops.get(config.model.dtype, float("nan"))
    days = config.train.num_steps * seconds / 86_400
    items = experiment.dataset.items
    mesh = " x ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())
    rows = [
        ("config", f"{plan.num_parameters:,} parameters, {config.model.dtype}, batch {graphs}"),
        ("topology", f"{plan.topology}: {plan.chips} chips, mesh {mesh}"),
        (
            "chip",
            f"{chip.memory_bytes / 2**30:.0f} GiB, {peak / 1e12:.0f} TFLOP/s, "
            f"{chip.memory_bytes_per_s / 1e9:.0f} GB/s memory. {chip.source}",
        ),
        (
            "memory of a chip",
            f"{_gib(plan.memory['all'])} of {_gib(chip.memory_bytes)} "
            f"({plan.memory['all'] / chip.memory_bytes:.1%}): "
            + ", ".join(f"{k} {_gib(v)}" for k, v in plan.memory.items() if k != "all")
            + f" (compiler, largest bucket: {experiment.dataset.buckets[-1].num_nodes} nodes)",
        ),
        (
            "operations of a step",
            f"{mean_flops:.3e} (counted from the traced step, mean over buckets; "
            f"{mean_flops / graphs:.3e} for each of the {items})"
            + (
                f"; largest bucket {plan.counted[-1].total:.3e} counted, "
                f"{plan.compiler_flops:.3e} compiler"
                if plan.compiler_flops
                else "; the compiler for this chip gives none"
            ),
        ),
        ("bytes of a step", f"{mean_bytes:.3e} ({plan.bytes_source})"),
    ]
    for name in COLLECTIVES:
        same = [c for c in plan.collectives if c.name == name]
        if same:
            groups = ", ".join(sorted({str(c.group) for c in same}))
            total = sum(c.payload for c in same)
            rows.append((name, f"{len(same)} a step, {total / 1e6:.2f} MB, groups of {groups}"))
    scaling = plan.scaling()
    rows += [
        (
            "PREDICTED step",
            f"{seconds * 1e3:.3f} ms = {compute * 1e3:.3f} ms computing + {talk * 1e3:.3f} ms "
            "communicating. Roofline: max(operations / peak, bytes / bandwidth), then all "
            "collectives as rings at full link speed, nothing hidden. Latencies, launches and "
            "kernels below peak are left out: a real step is slower, for small ones many times",
        ),
        ("PREDICTED rate", f"{graphs / seconds:,.0f} {items}/s"),
        (
            "PREDICTED weak scaling",
            ", ".join(f"{n}: {e:.1%}" for n, e in scaling)
            + ". E(n) = T(unit) / T(n), T(n) = computing + rings over n, the batch of a chip kept",
        ),
        (
            "PREDICTED training",
            f"{config.train.num_steps:,} steps: {days * 24:.2f} hours ({days:.3f} days), "
            f"{days * 24 * plan.chips:,.1f} chip-hours, without evaluation, saving and compiling",
        ),
    ]
    return rows


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def write_html(file: pathlib.Path, plan: Plan, rows) -> None:
    """The table, and a plot of the predicted weak scaling; one file, nothing to fetch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chips, efficiency = zip(*plan.scaling(), strict=True)
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axis.plot(chips, [100 * e for e in efficiency], "o-")
    axis.axvline(plan.chips, color="grey", linestyle=":", label=f"this plan: {plan.chips} chips")
    axis.set_xscale("log", base=2)
    axis.set_xticks(chips, [str(n) for n in chips])
    axis.set_ylim(0, 105)
    axis.set_xlabel("chips")
    axis.set_ylabel("predicted weak-scaling efficiency [%]")
    axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    plt.close(figure)
    image = base64.b64encode(picture.getvalue()).decode()
    table = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows
    )
    file.write_text(
        "<!doctype html><meta charset=utf-8>"
        f"<title>demetar plan {html.escape(plan.topology)}</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "th{text-align:left;vertical-align:top;white-space:nowrap;padding:.3em 1em .3em 0}"
        "td{padding:.3em 0}</style>"
        f"<h1>{html.escape(plan.topology)}</h1><table>{table}</table>"
        f'<img alt="predicted weak scaling" src="data:image/png;base64,{image}" width=640>\n'
    )


@exits_cleanly
def _main(argv) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    config = _CONFIG.value
    if _BATCH.value:
        config.data.batch_size = _BATCH.value
    config.mesh.cpu_devices = 0
    config.train.steps_per_call = 1  # one step is what is counted
    chip, devices = planned_devices(_TOPOLOGY.value)
    runtime.configure(config)
    # What is compiled for another machine cannot be read back on this one.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        plan = make_plan(config, _TOPOLOGY.value, chip, devices)
        needs = plan.memory["all"] if plan.memory["all"] > chip.memory_bytes else None
        needs = needs and f"a chip would need {_gib(needs)}"
    except DoesNotFit as error:
        needs = f"the compiler gave up ({error})"
    if needs:
        say("Does not fit; trying what would ...")
        fitting = remedies(config, _TOPOLOGY.value, chip, devices)
        raise UserError(
            f"{_TOPOLOGY.value}: {needs}; it has "
            f"{_gib(chip.memory_bytes)}. Each of these fits: "
            f"{'; '.join(fitting) or 'none of those tried'}."
        )
    rows = report(plan)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {text}" for name, text in rows))
    if _HTML.value:
        write_html(pathlib.Path(_HTML.value), plan, rows)
    sys.stdout.flush()


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(_main)
