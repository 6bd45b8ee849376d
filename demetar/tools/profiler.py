"""Where the time of a step goes: real steps under JAX's profiler, and what happens between them."""

import collections
import contextlib
import io
import itertools
import pathlib
import time

import jax
import numpy as np

from data_pipelines.errors import UserError
from demetar.job.job import Job
from demetar.job.place import Place, numbered
from demetar.records.log import say
from demetar.speed.machine import Peak
from demetar.speed.program import Program
from demetar.speed.trace import PHASES, phase_of, read_trace, self_times
from demetar.training import runtime
from demetar.training.checkpoints import Checkpoints
from demetar.training.evaluator import Evaluator
from demetar.training.experiment import Experiment
from demetar.training.progress import Progress
from demetar.training.reporter import Reporter
from demetar.training.trainer import Trainer


def check_alone(here: Place) -> None:
    """A `UserError` in a job of several processes."""
    if (count := numbered(here).count) > 1:
        raise UserError(
            f"demetar profile looks at one process, but {here.source} started {count}: start it "
            "outside of the job."
        )


class Profiler:
    """Steps of one bucket, and what else the training loop does.

    Args:
      experiment: to look at.
      num_steps: under the profiler.
      folder: for what the loop writes; nobody needs it afterwards.

    Attributes:
      seconds_a_step: by the wall clock, without the profiler; once `rows` has measured.
    """

    def __init__(self, experiment: Experiment, num_steps: int, folder: pathlib.Path):
        self._experiment, self._folder = experiment, folder
        self._trainer = trainer = Trainer(experiment)
        # The bucket of most steps: one program, so that names of operations are unique.
        self._bucket = int(np.argmax(trainer.plan.batches_per_bucket))
        found = (k for k in itertools.count() if trainer.plan[k][0] == self._bucket)
        self._steps = list(itertools.islice(found, num_steps))
        self._progress = Progress.new(len(experiment.dataset.targets))
        self._state, self._sums = experiment.create_state(), None
        self.seconds_a_step = 0.0
        say("Compiling ...")
        self._run(self._steps[:1])

    def rows(self, trace: pathlib.Path) -> list[tuple[str, float, str]]:
        """Measures: name, seconds a step, a remark.

        Args:
          trace: folder for what JAX's profiler writes.
        """
        config, steps = self._experiment.config, len(self._steps)
        start = time.perf_counter()
        self._run(self._steps)
        self.seconds_a_step = (time.perf_counter() - start) / steps
        with jax.profiler.trace(str(trace)):
            host = self._run(self._steps)
        hidden = "in training on threads of Grain, while the devices work"
        rows = [
            ("assemble", host["assemble"] / steps, hidden),
            ("transfer", host["transfer"] / steps, "host arrays to the devices"),
            *self._on_devices(trace),
        ]
        for name, seconds, every in (
            ("log", self._log_seconds(), config.log.every_steps),
            ("save", self._save_seconds(), config.checkpoint.every_steps),
            ("evaluate", self._evaluate_seconds(), config.train.eval_every),
        ):
            rows.append((name, seconds / every, f"{seconds:.3f} s every {every} steps"))
        return rows

    def headline(self) -> str:
        """Rate, share of the peak, and what a graph asks for."""
        experiment, steps, seconds = self._experiment, self._steps, self.seconds_a_step
        config, sizes, items = experiment.config, experiment.arrays.sizes, experiment.dataset.items
        graphs = np.concatenate([self._trainer.plan[step][1] for step in steps])
        graphs = graphs[graphs >= 0]
        known = sizes.num_nodes[graphs], sizes.num_edges[graphs]
        flops = experiment.graph_cost.flops(*known).sum()
        moved = experiment.graph_cost.bytes(*known).mean()
        peak = Peak(runtime.cache_dir(config), config.model.dtype)
        share = peak.text(peak.share(flops / len(steps) / seconds))
        bucket = self._trainer.plan.buckets[self._bucket]
        return (
            f"One step of bucket {bucket.num_nodes}/{bucket.num_edges}, batch "
            f"{config.data.batch_size}: {1e3 * seconds:.2f} ms, "
            f"{len(graphs) / len(steps) / seconds:.0f} {items}/s, {share}; mean of {len(steps)} "
            f"steps. Each of the {items} asks for {flops / len(graphs) / 1e6:.2f} MFLOP and, were "
            f"nothing fused or cached, {moved / 1e6:.2f} MB. Peak: {peak}; memory "
            f"{peak.machine.bytes_per_s / 1e9:.1f} GB/s."
        )

    # --- what is measured ------------------------------------------------------------------------

    def _run(self, steps: list[int]) -> collections.Counter:
        """Seconds of the host in each part, over all of the steps."""
        trainer, spent, pending = self._trainer, collections.Counter(), None
        for step in steps:
            start = time.perf_counter()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                bucket, graphs = trainer.gather(step)
                assembled = time.perf_counter()
                batch = trainer.to_devices(graphs)
                placed = time.perf_counter()
                self._state, self._sums = trainer.step(self._state, bucket, batch)
                if pending is not None:
                    jax.device_get(pending)  # as the loop: sums of the step before
            pending = self._sums
            spent["assemble"] += assembled - start
            spent["transfer"] += placed - assembled
        jax.device_get(pending)
        return spent

    def _on_devices(self, trace: pathlib.Path) -> list[tuple[str, float, str]]:
        """Rows of what the devices do, of a trace of the steps: seconds a step of one of them."""
        names = Program(self._trainer.program(self._bucket).as_text()).sources
        devices, steps = len(self._experiment.mesh.local_devices), len(self._steps)
        events = read_trace(trace)
        busy = collections.Counter()
        for instruction, microseconds in self_times(events).items():
            if instruction in names:
                phase = phase_of(names[instruction], instruction)
                busy[phase] += microseconds / 1e6 / devices / steps
        ends = [e["ts"] + e["dur"] for e in events]
        window = (max(ends) - min(e["ts"] for e in events)) / 1e6 / steps
        idle = max(0.0, window - sum(busy.values()))
        remark = f"of a device; {1e3 * window:.2f} ms a step under the profiler"
        return [*((phase, busy[phase], "") for phase in PHASES), ("idle", idle, remark)]

    def _log_seconds(self) -> float:
        """One progress line with its metrics; the second, as the first compiles the schedule."""
        report = Reporter(self._trainer, self._folder, self._progress, Job.alone(), 0)
        with contextlib.redirect_stderr(io.StringIO()):
            for step in (1, 2):
                report.collect(self._sums, step)
                start = time.perf_counter()
                report.progress_line(step)
        seconds = time.perf_counter() - start
        report.close()
        return seconds

    def _save_seconds(self) -> float:
        """How long the loop stands still for a save."""
        checkpoints = Checkpoints(self._folder, keep_last=2)
        start = time.perf_counter()
        checkpoints.save(self._state, self._experiment.identity, self._progress)
        seconds = time.perf_counter() - start
        checkpoints.wait()
        checkpoints.close()
        return seconds

    def _evaluate_seconds(self) -> float:
        evaluator = Evaluator(self._experiment)
        evaluator.run(self._state.ema, "validation")  # compiles
        start = time.perf_counter()
        evaluator.run(self._state.ema, "validation")
        return time.perf_counter() - start
