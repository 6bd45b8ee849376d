"""A config of ours as the benchmarks run it: the project's own pipeline, step and evaluation."""

import dataclasses
import importlib.util
import itertools
import pathlib
import time

import jax
import numpy as np
from absl import flags

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan
from demetar.train import compiled_train_step
from demetar.training import runtime, sharding
from demetar.training.evaluator import compiled_eval_step
from demetar.training.experiment import build_experiment

REPOSITORY = pathlib.Path(__file__).parents[1]


def load_config(text: str, changes=None):
    """The config of `configs/qm9.py:quick`, with `{"mesh.cpu_devices": 2}` set."""
    file, _, arg = text.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", REPOSITORY / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    config.update_from_flattened_dict(dict(changes or {}))
    return config


@dataclasses.dataclass
class Measured:
    """Of some seconds of training.

    Attributes:
      rate: graphs a second.
      flops: operations/s that the model asks for, real atoms only.
      wait: share of the time in which the devices had nothing to do, for want of a batch.
    """

    rate: float
    flops: float
    wait: float


class Run:
    """Trains without logging, evaluating and saving; `warm_up`, then `train` again and again."""

    def __init__(self, config):
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
        runtime.configure(config)
        self.experiment = experiment = build_experiment(config)
        data = config.data
        graphs = experiment.dataset.split["train"]
        buckets, sizes = experiment.dataset.buckets, experiment.arrays.sizes
        self.plan = BatchPlan(sizes, graphs, buckets, data.batch_size, config.seed)
        self._rows = np.arange(data.batch_size)
        self._batches = batching.batches(
            experiment.arrays,
            self.plan,
            self._rows,
            range(10**9),
            data.prefetch_threads,
            data.prefetch_batches,
        )
        self._step = compiled_train_step(experiment)
        self._evaluate = compiled_eval_step(experiment)
        self._state = experiment.create_state()
        self._done = 0
        self._flags = sharding.flags(experiment.mesh, False)
        self._scale = np.float32(1)
        self.num_parameters = sum(x.size for x in jax.tree.leaves(self._state.params))

    def warm_up(self) -> None:
        """One step of each bucket, so that none is compiled while the clock runs."""
        missing = set(range(len(self.plan.buckets)))
        while missing:
            bucket, batch = self._next()
            if bucket in missing:
                missing.remove(bucket)
                self._train_on(bucket, batch)
                self._evaluate(bucket, self._state.ema, batch, self._flags)

    def _next(self):
        bucket, graphs = next(self._batches)
        self._arrived = time.perf_counter()
        self._graphs = int(graphs.graph_mask.sum())
        self._done += 1
        return bucket, sharding.to_devices(graphs, self.experiment.mesh, len(self._rows))

    def _train_on(self, bucket, batch):
        self._state, sums = self._step(bucket, self._state, batch, self._flags, self._scale)
        return sums

    def train(self, seconds: float) -> Measured:
        """Real steps for some seconds; sums of a step are fetched once the next is under way."""
        cost, sizes = self.experiment.graph_cost, self.experiment.arrays.sizes
        flops_G = cost.flops(sizes.num_nodes, sizes.num_edges)
        graphs = flops = wait = 0.0
        pending, start = None, time.perf_counter()
        while time.perf_counter() - start < seconds:
            before = time.perf_counter()
            members = self.plan[self._done][1]
            members = members[members >= 0]
            bucket, batch = self._next()
            if pending is None or pending.loss.is_ready():  # the devices had nothing to do
                wait += self._arrived - before
            sums = self._train_on(bucket, batch)
            if pending is not None:
                float(pending.loss)
            pending = sums
            graphs += len(members)
            flops += flops_G[members].sum()
        float(pending.loss)
        seconds = time.perf_counter() - start
        return Measured(graphs / seconds, flops / seconds, wait / seconds)

    def forward(self, seconds: float) -> float:
        """Graphs a second of prediction alone, batches assembled each time."""
        graphs, outputs, start = 0, [], time.perf_counter()
        while time.perf_counter() - start < seconds:
            bucket, batch = self._next()
            graphs += self._graphs
            outputs.append(self._evaluate(bucket, self._state.ema, batch, self._flags))
            if len(outputs) > 1:
                jax.block_until_ready(outputs.pop(0))
        jax.block_until_ready(outputs)
        return graphs / (time.perf_counter() - start)

    def steps_of(self, bucket: int, seconds: float) -> float:
        """Median time of a call for steps of one bucket, over the same few batches, in seconds."""
        together = self.experiment.config.train.steps_per_call
        size, mesh = len(self._rows), self.experiment.mesh
        found = (k for k in itertools.count() if self.plan[k][0] == bucket)
        graphs = [self.plan[next(found)][1] for _ in range(4 * together)]
        limits = self.plan.buckets[bucket]

        def place(part):
            gathered = [(bucket, batching.gather(self.experiment.arrays, g, limits)) for g in part]
            return sharding.to_devices(batching.stacked(gathered)[1], mesh, size, together > 1)

        batches = [place(graphs[k::4]) for k in range(4)]
        float(np.sum(self._train_on(bucket, batches[0]).loss))  # compiles
        times, start = [], time.perf_counter()
        for batch in itertools.cycle(batches):
            begin = time.perf_counter()
            float(np.sum(self._train_on(bucket, batch).loss))
            times.append(time.perf_counter() - begin)
            if time.perf_counter() - start > seconds and len(times) > 2:
                return float(np.median(times)) / together
