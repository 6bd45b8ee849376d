"""Takes training steps: assembles and places batches, runs the compiled step of their bucket."""

from collections.abc import Iterator

import jax
import numpy as np

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan
from data_pipelines.graph import Graph
from demetar.job.watch import UNWATCHED, Unwatched, Watch
from demetar.training import sharding
from demetar.training.experiment import Experiment
from demetar.training.gradients import default_groups, make_gradient
from demetar.training.state import TrainState
from demetar.training.step import CompiledPerBucket, StepSums, make_train_step


class Trainer:
    """The training steps of an experiment; the loop, the profiler and the benchmarks drive it.

        state = experiment.create_state()
        for bucket, graphs in trainer.batches(range(first_step, num_steps)):
            state, sums = trainer.step(state, bucket, trainer.to_devices(graphs))

    Args:
      experiment: what is trained.
      watch: is told of compiling.

    Attributes:
      plan: which graphs each step has, over all processes.
      rows: of a global batch, those of this process.
    """

    def __init__(self, experiment: Experiment, watch: Watch | Unwatched = UNWATCHED):
        self.experiment = experiment
        config, dataset = experiment.config, experiment.dataset
        self.plan = BatchPlan(
            experiment.arrays.sizes,
            dataset.split["train"],
            dataset.buckets,
            config.data.batch_size,
            config.seed,
        )
        self.rows = sharding.process_rows(experiment.mesh, config.data.batch_size)
        self._compiled = CompiledPerBucket(
            _jitted(experiment), len(dataset.buckets), self.abstract_arguments, watch
        )

    # --- batches ---------------------------------------------------------------------------------

    def batches(self, steps: range) -> Iterator[tuple[int, Graph]]:
        """(bucket, this process's rows) of each step, prefetched by threads; steps from 0."""
        data = self.experiment.config.data
        threads, prefetch = data.prefetch_threads, data.prefetch_batches
        arrays = self.experiment.arrays
        return batching.batches(arrays, self.plan, self.rows, steps, threads, prefetch)

    def gather(self, step: int) -> tuple[int, Graph]:
        """The same of one step, here and now."""
        bucket, graphs_B = self.plan[step]
        arrays, limits = self.experiment.arrays, self.plan.buckets[bucket]
        return bucket, batching.gather(arrays, graphs_B[self.rows], limits)

    def to_devices(self, graphs: Graph) -> Graph:
        """This process's rows -> the global batch on the devices."""
        return sharding.to_devices(graphs, self.experiment.mesh, self.plan.batch_size)

    # --- steps -----------------------------------------------------------------------------------

    def step(
        self, state: TrainState, bucket: int, batch: Graph, stop=False, lr_scale=1.0
    ) -> tuple[TrainState, StepSums]:
        """One update; `state` is given away.

        Args:
          state: before.
          bucket: of the batch.
          batch: of `to_devices`.
          stop: whether this process was asked to stop; the sums say it of all.
          lr_scale: factor of the learning rate, of the schedule `plateau`.
        """
        flags = sharding.stop_flags(self.experiment.mesh, bool(stop))
        return self._compiled(bucket, state, batch, flags, np.float32(lr_scale))

    @property
    def jitted(self):
        """`jax.jit` of the step: state donated, shardings fixed."""
        return self._compiled.jitted

    @property
    def compile_seconds(self) -> float:
        """Spent waiting for the compiler so far."""
        return self._compiled.compile_seconds

    def program(self, bucket: int):
        """The compiled step of a bucket."""
        return self._compiled.program(bucket)

    def compile_ahead(self, executor) -> None:
        """Compiles the other buckets on a thread, while the first one trains."""
        self._compiled.compile_ahead(executor)

    def abstract_arguments(self, bucket: int) -> tuple:
        """What the compiled step takes, as shapes, types and shardings."""
        experiment = self.experiment
        mesh, batch_size = experiment.mesh, experiment.config.data.batch_size
        batch = experiment.abstract_batch(experiment.dataset.buckets[bucket], batch_size)
        lr_scale = jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(mesh))
        return experiment.abstract_state(), batch, sharding.abstract_stop_flags(mesh), lr_scale


def _jitted(experiment: Experiment):
    config, mesh, specs = experiment.config, experiment.mesh, experiment.state_specs
    gradient = make_gradient(experiment.model, experiment.objective, config.train.accumulation)
    step = make_train_step(
        gradient,
        experiment.tx,
        mesh,
        specs.params,
        seed=config.seed,
        ema_decay=config.optim.ema_decay,
        num_groups=config.mesh.gradient_groups or default_groups(mesh, config.train.accumulation),
    )
    everywhere, rows = sharding.replicated(mesh), sharding.over_batch(mesh)
    state = sharding.named(mesh, specs)
    sums = StepSums(everywhere, everywhere, everywhere, everywhere, rows, everywhere)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state, rows, sharding.over_all(mesh), everywhere),
        out_shardings=(state, sums),
    )
