"""A config of ours as the benchmarks run it: the project's own pipeline, step and evaluation.

Also what the benchmarks share: where the repository is, QM9 for other people's models, and where a
result goes.
"""

import dataclasses
import itertools
import pathlib
import time

import jax
import numpy as np
from absl import flags

from data_pipelines.dataset import Dataset
from data_pipelines.json_text import json_text
from data_pipelines.qm9 import DEFAULTS as QM9_DEFAULTS
from data_pipelines.registry import load_dataset
from demetar.training import runtime
from demetar.training.evaluator import Evaluator
from demetar.training.experiment import build_experiment
from demetar.training.provenance import git_commit
from demetar.training.trainer import Trainer

REPOSITORY = pathlib.Path(__file__).parents[1]
flags.FLAGS.mark_as_parsed()  # Grain reads absl flags


def load_qm9(edges: str, edge_cutoff: float = 3.0) -> Dataset:
    """HOMO of QM9 with these edges, split `dimenet`."""
    options = QM9_DEFAULTS | {"edges": edges, "edge_cutoff": edge_cutoff}
    return load_dataset(name="qm9", cache_dir="", **options)


def keep(result: dict, file: pathlib.Path | None) -> None:
    """Prints a result, and writes it where the command was asked to."""
    text = json_text({"git_commit": git_commit()} | result, indent=1)
    print(text)
    if file:
        file.write_text(text + "\n")


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
        config.data.eval_batch_size = config.data.batch_size
        runtime.configure(config)
        self.experiment = experiment = build_experiment(config)
        self.trainer = Trainer(experiment)
        self._evaluator = Evaluator(experiment)
        self._batches = self.trainer.batches(range(10**9))
        self._state = experiment.create_state()
        self._drawn = 0  # batches
        self.num_parameters = sum(x.size for x in jax.tree.leaves(self._state.params))

    @property
    def plan(self):
        return self.trainer.plan

    def warm_up(self) -> None:
        """One step of each bucket, so that none is compiled while the clock runs."""
        missing = set(range(len(self.plan.buckets)))
        while missing:
            bucket, batch = self._next()
            if bucket in missing:
                missing.remove(bucket)
                self._train_on(bucket, batch)
                self._evaluator.step(self._state.ema, bucket, batch)

    def _next(self):
        bucket, graphs = next(self._batches)
        self._arrived = time.perf_counter()
        self._drawn += 1
        return bucket, self.trainer.to_devices(graphs)

    def _train_on(self, bucket, batch):
        self._state, sums = self.trainer.step(self._state, bucket, batch)
        return sums

    def train(self, seconds: float) -> Measured:
        """Real steps for some seconds; sums of a step are fetched once the next is under way."""
        cost, sizes = self.experiment.graph_cost, self.experiment.arrays.sizes
        flops_G = cost.flops(sizes.num_nodes, sizes.num_edges)
        graphs = flops = wait = 0.0
        pending, start = None, time.perf_counter()
        while time.perf_counter() - start < seconds:
            before = time.perf_counter()
            members = self._members()
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

    def _members(self) -> np.ndarray:
        """The graphs of the batch that is drawn next."""
        members = self.plan[self._drawn][1]
        return members[members >= 0]

    def forward(self, seconds: float) -> float:
        """Graphs a second of prediction alone, batches assembled each time."""
        graphs, outputs, start = 0, [], time.perf_counter()
        while time.perf_counter() - start < seconds:
            graphs += len(self._members())
            bucket, batch = self._next()
            outputs.append(self._evaluator.step(self._state.ema, bucket, batch))
            if len(outputs) > 1:
                jax.block_until_ready(outputs.pop(0))
        jax.block_until_ready(outputs)
        return graphs / (time.perf_counter() - start)

    def steps_of(self, bucket: int, seconds: float) -> float:
        """Median time of a step of one bucket, over the same few batches, in seconds."""
        steps = (step for step in itertools.count() if self.plan[step][0] == bucket)
        gathered = [self.trainer.gather(step)[1] for step in itertools.islice(steps, 4)]
        batches = [self.trainer.to_devices(graphs) for graphs in gathered]
        float(self._train_on(bucket, batches[0]).loss)  # compiles
        times, start = [], time.perf_counter()
        for batch in itertools.cycle(batches):
            begin = time.perf_counter()
            float(self._train_on(bucket, batch).loss)
            times.append(time.perf_counter() - begin)
            if time.perf_counter() - start > seconds and len(times) > 2:
                return float(np.median(times))
