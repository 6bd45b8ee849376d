"""What a config would need and cost on a machine that is not here: compiled, counted, predicted."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import UserError
from demetar.records.log import say
from demetar.speed import flops
from demetar.speed.topology import Accelerator, Collective, collectives
from demetar.training.experiment import Experiment, build_experiment
from demetar.training.trainer import Trainer

_MAX_CHIPS = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known (compiled, counted) and what follows from it (predicted).

    Attributes:
      trainer: on the planned mesh.
      topology: as given.
      chip: of it.
      memory: bytes of each chip: state, batch and outputs, temporaries, all.
      counted: operations of a step of each bucket, by `speed.flops`, over all chips.
      compiler_flops: of the largest bucket over all chips, where the compiler says it.
      step_bytes: of each bucket, over all chips.
      bytes_source: where these are from.
      collectives: of a step.
    """

    trainer: Trainer
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

    @property
    def experiment(self) -> Experiment:
        return self.trainer.experiment

    @property
    def num_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.experiment.abstract_state().params))

    def mean_over_buckets(self, values) -> float:
        """Of an epoch, from one value for each bucket."""
        return float(np.average(values, weights=self.trainer.plan.batches_per_bucket))

    def compute_seconds(self) -> float:
        """Mean over the buckets of an epoch of max(operations / peak, bytes / bandwidth)."""
        peak = self.chip.peak_flops.get(self.experiment.config.model.dtype)
        peak = peak or self.chip.peak_flops["float32"] / 16  # float64, about
        times = [
            max(c.total / peak, b / self.chip.memory_bytes_per_s) / self.chips
            for c, b in zip(self.counted, self.step_bytes, strict=True)
        ]
        return self.mean_over_buckets(times)

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


def compile_largest(trainer: Trainer):
    """The train step of the largest bucket, compiled for the planned devices."""
    arguments = trainer.abstract_arguments(len(trainer.plan.buckets) - 1)
    try:
        return trainer.jitted.lower(*arguments).compile()
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
    trainer = Trainer(build_experiment(config, devices))
    buckets = range(len(trainer.plan.buckets))
    say(f"Counting {len(buckets)} buckets, compiling the largest for {len(devices)} chips ...")
    counted = [flops.count(trainer.jitted, *trainer.abstract_arguments(b)) for b in buckets]
    compiled = compile_largest(trainer)
    cost = compiled.cost_analysis() or {}
    chips = trainer.experiment.mesh.size
    state_bytes = 2 * compiled.memory_analysis().argument_size_in_bytes * chips
    width = jnp.dtype(config.model.dtype).itemsize
    step_bytes = [c.matmul_bytes + width * c.other + state_bytes for c in counted]
    source = "counted: matrix products, the state, and every other result written once"
    # A loop's body is in the compiler's sums once, however often it runs.
    once = config.train.accumulation == 1
    if once and cost.get("bytes accessed"):
        largest = cost["bytes accessed"] * chips
        step_bytes = [largest * b / step_bytes[-1] for b in step_bytes]
        source = "compiler, for the largest bucket; scaled by the count for the others"
    return Plan(
        trainer=trainer,
        topology=topology,
        chip=chip,
        memory=memory_of(compiled),
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


def remedies(config, chip: Accelerator, devices) -> list[str]:
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
            change(trial, value)
            say(f"Trying {text.format(value)} ...")
            try:
                compiled = compile_largest(Trainer(build_experiment(trial, devices)))
            except UserError:
                break
            if memory_of(compiled)["all"] > chip.memory_bytes:
                break
            fitting = text.format(value)
        if fitting:
            found.append(fitting)
    return found


def plan_that_fits(config, topology: str, chip: Accelerator, devices) -> Plan:
    """The plan of a config; one that needs more memory than a chip has is a `UserError`."""
    try:
        plan = make_plan(config, topology, chip, devices)
        if plan.memory["all"] <= chip.memory_bytes:
            return plan
        needs = f"a chip would need {size_text(plan.memory['all'])}"
    except DoesNotFit as error:
        needs = f"the compiler gave up ({error})"
    say("Does not fit; trying what would ...")
    fitting = "; ".join(remedies(config, chip, devices)) or "none of those tried"
    raise UserError(
        f"{topology}: {needs}; it has {size_text(chip.memory_bytes)}. Each of these fits: "
        f"{fitting}."
    )


def size_text(size: float) -> str:
    """Bytes, for a person."""
    if size >= 2**30 / 10:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"
