"""What a config would need and cost on a machine that is not here: compiled, counted, predicted."""

import dataclasses
import math

import jax
import numpy as np

from data_pipelines.errors import UserError
from demetar.records.log import say, size_text
from demetar.speed import flops
from demetar.speed.kernels import Kernel, kernels_of
from demetar.speed.program import Program
from demetar.speed.timeline import (
    ASSUMPTIONS,
    Timeline,
    collective_seconds,
    predict,
    rates_of,
)
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
      kernels: of one chip's step of the largest bucket, in order.
      collectives: of that step, by name.
    """

    trainer: Trainer
    topology: str
    chip: Accelerator
    memory: dict[str, float]
    counted: list[flops.Count]
    kernels: list[Kernel]
    collectives: dict[str, Collective]

    @property
    def chips(self) -> int:
        return self.experiment.mesh.size

    @property
    def experiment(self) -> Experiment:
        return self.trainer.experiment

    @property
    def num_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.experiment.abstract_state().params))

    def sum_of_kernels(self, name: str) -> float:
        """Of a number of `Kernel`, over all launches of a step of the largest bucket."""
        return sum(kernel.times * getattr(kernel, name) for kernel in self.kernels)

    @property
    def launches(self) -> int:
        """Of a step, loops gone through."""
        return sum(k.times for k in self.kernels if not k.operation.endswith("-done"))

    def mean_over_buckets(self, values) -> float:
        """Of an epoch, from one value for each bucket."""
        return float(np.average(values, weights=self.trainer.plan.batches_per_bucket))

    # --- predicted -------------------------------------------------------------------------------

    def timeline(
        self, assumption: str = "likely", bucket: int = -1, copies: int | None = None
    ) -> Timeline:
        """A step of a bucket, whose kernels do their part of those of the largest.

        Args:
          assumption: of `timeline.ASSUMPTIONS`.
          bucket: its number.
          copies: of the state, as many graphs on each chip as here; None: those of this plan.
        """
        assumed = ASSUMPTIONS[assumption]
        return predict(
            self.kernels,
            rates_of(self.chip, self.experiment.config.model.dtype, assumed),
            collective_seconds(self._collectives(copies), self.chip, assumed),
            self.counted[bucket].total / self.counted[-1].total,
        )

    def step_seconds(self, assumption: str = "likely", copies: int | None = None) -> float:
        """Of a step, mean over the buckets of an epoch."""
        buckets = range(len(self.counted))
        return self.mean_over_buckets(
            [self.timeline(assumption, bucket, copies).total for bucket in buckets]
        )

    def scaling(self, assumption: str = "likely") -> list[tuple[int, float]]:
        """(chips, efficiency): the batch of each chip kept, only the axis `data` growing.

        Nothing where one copy of the state is all that was compiled: then no collective is known.
        """
        shape = self.experiment.mesh.shape
        if shape["data"] == 1:
            return []
        unit = self.chips // shape["data"]
        one = self.step_seconds(assumption, 1)
        powers = range(int(math.log2(_MAX_CHIPS // unit)) + 1)
        return [(unit * 2**k, one / self.step_seconds(assumption, 2**k)) for k in powers]

    def _collectives(self, copies: int | None) -> dict[str, Collective]:
        """With so many copies of the state."""
        now = self.experiment.mesh.shape["data"]
        if copies in (None, now):
            return self.collectives
        found = dict(self.collectives)
        for name, collective in self.collectives.items():
            if collective.over_data:
                group = collective.group // now * copies
                near = min(group, max(1, self.chip.chips_near // (self.chips // collective.group)))
                found[name] = dataclasses.replace(collective, group=group, near=near)
        return found


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
    program, chips = Program(compiled.as_text()), trainer.experiment.mesh.size
    return Plan(
        trainer=trainer,
        topology=topology,
        chip=chip,
        memory=memory_of(compiled),
        counted=counted,
        kernels=kernels_of(program),
        collectives=collectives(
            program, chips, chip.chips_near, config.mesh.fsdp * config.mesh.model
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
