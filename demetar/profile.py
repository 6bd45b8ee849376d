"""Where the time of a step goes, as a table, and a trace to look closer.

    python -m demetar.profile --config=configs/qm9.py:quick [--steps=20] [--trace=DIR]

Runs real steps of the config on this machine, under JAX's profiler, and says what each costs:
assembling and placing the batch, forward, backward, sums over devices, optimizer, what the
devices idle, and logging, saving and evaluating spread over the steps between them. The trace
opens in XProf (`pip install xprof; xprof DIR`) or TensorBoard's profile plugin. Nothing is left
in a workdir, and no run is touched.
"""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan
from data_pipelines.errors import UserError
from demetar import train
from demetar.exits import exits_cleanly
from demetar.job import place
from demetar.records import metrics
from demetar.records.log import say
from demetar.speed.machine import measured_machine
from demetar.speed.trace import PHASES, op_names, phase_of, read_trace, self_times
from demetar.training import runtime, sharding
from demetar.training.checkpoints import Checkpoints
from demetar.training.evaluator import Evaluator
from demetar.training.experiment import Experiment, build_experiment

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config.", lock_config=True)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps under the profiler.", lower_bound=1)
_TRACE = flags.DEFINE_string("trace", None, "Folder that keeps the trace; default: none does.")


class Profile:
    """One config, its compiled step and what it needs; `table()` measures."""

    def __init__(self, experiment: Experiment, folder: pathlib.Path):
        self._experiment, self._folder = experiment, folder
        config = experiment.config
        self._plan = BatchPlan(
            experiment.arrays.sizes,
            experiment.dataset.split["train"],
            experiment.dataset.buckets,
            config.data.batch_size,
            config.seed,
        )
        self._rows = sharding.process_rows(experiment.mesh, config.data.batch_size)
        # The bucket of most steps: one program, so that names of operations are unique.
        self._bucket = int(np.argmax(self._plan.batches_per_bucket))
        found = (k for k in itertools.count() if self._plan[k][0] == self._bucket)
        self._steps = list(itertools.islice(found, _STEPS.value))
        self._step = train.compiled_train_step(experiment)
        self._state = experiment.create_state()
        self._flags = sharding.flags(experiment.mesh, False)
        say("Compiling ...")
        self._run(self._steps[:1])

    def _assemble(self, step: int):
        _, graphs = self._plan[step]
        bucket = self._plan.buckets[self._bucket]
        return batching.gather(self._experiment.arrays, graphs[self._rows], bucket)

    def _run(self, steps) -> dict[str, float]:
        """Seconds of the host in each part, over all of the steps."""
        spent = collections.Counter()
        size, mesh = self._experiment.config.data.batch_size, self._experiment.mesh
        pending = None
        for step in steps:
            start = time.perf_counter()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                graphs = self._assemble(step)
                assembled = time.perf_counter()
                batch = sharding.to_devices(graphs, mesh, size)
                placed = time.perf_counter()
                arguments = (self._state, batch, self._flags, np.float32(1))
                self._state, sums = self._step(self._bucket, *arguments)
                if pending is not None:
                    jax.device_get(pending)  # as the loop: sums of the step before
            pending = sums
            spent["assemble"] += assembled - start
            spent["transfer"] += placed - assembled
        jax.device_get(pending)
        return spent

    def _log_seconds(self) -> float:
        """One progress line with its metrics; the second, as the first compiles the schedule."""
        experiment = self._experiment
        write = metrics.Writers(self._folder, 0, 0, is_main=True)
        progress = train.new_progress(len(experiment.dataset.targets))
        pace = train.new_pace(experiment, self._plan, 0, concurrent.futures.Future())
        with contextlib.redirect_stderr(io.StringIO()):
            for step in (1, 2):
                start = time.perf_counter()
                train.log_train(write, progress, pace, experiment, step, 1.0)
        seconds = time.perf_counter() - start
        write.close()
        return seconds

    def _save_seconds(self) -> float:
        """How long the loop stands still for a save."""
        checkpoints = Checkpoints(self._folder, keep_last=2)
        progress = train.new_progress(len(self._experiment.dataset.targets))
        start = time.perf_counter()
        checkpoints.save(self._state, self._experiment.identity | {"progress": progress})
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

    def _on_devices(self, trace: pathlib.Path) -> list[tuple[str, float, str]]:
        """Rows of what the devices do, of a trace of the steps: seconds a step of one of them."""
        names = op_names(self._step.program(self._bucket).as_text())
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

    def _headline(self, wall: float) -> str:
        """Rate and share of the peak, of steps that took `wall` seconds each."""
        experiment, steps = self._experiment, self._steps
        config, sizes = experiment.config, experiment.arrays.sizes
        graphs = np.concatenate([self._plan[step][1] for step in steps])
        graphs = graphs[graphs >= 0]
        known = sizes.num_nodes[graphs], sizes.num_edges[graphs]
        flops = experiment.graph_cost.flops(*known).sum()
        moved = experiment.graph_cost.bytes(*known).mean()
        machine = measured_machine(runtime.cache_dir(config), config.model.dtype)
        bucket, share = self._plan.buckets[self._bucket], flops / len(steps) / wall / machine.flops
        return (
            f"One step of bucket {bucket.num_nodes}/{bucket.num_edges}, batch "
            f"{config.data.batch_size}: {1e3 * wall:.2f} ms, {len(graphs) / len(steps) / wall:.0f} "
            f"{experiment.dataset.items}/s, {share:.1%} of {machine.flops / 1e9:.0f} GFLOP/s; "
            f"mean of {len(steps)} steps. Each of the {experiment.dataset.items} asks for "
            f"{flops / len(graphs) / 1e6:.2f} MFLOP and, were nothing fused or cached, "
            f"{moved / 1e6:.2f} MB; the memory's peak is {machine.bytes_per_s / 1e9:.1f} GB/s."
        )

    def table(self, trace: pathlib.Path) -> list[tuple[str, float, str]]:
        """Rows: name, milliseconds a step, a remark."""
        config, steps = self._experiment.config, len(self._steps)
        start = time.perf_counter()
        self._run(self._steps)
        wall = (time.perf_counter() - start) / steps
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
        say(self._headline(wall))
        return [(name, 1e3 * seconds, remark) for name, seconds, remark in rows]


@exits_cleanly
def _main(argv) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    config = _CONFIG.value
    if place.find_place(None, None, None).count > 1:
        raise UserError("demetar.profile looks at one process: start it outside of the job.")
    config.train.steps_per_call = 1  # one step is what is looked at
    runtime.configure(config)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        profile = Profile(build_experiment(config), folder)
        rows = profile.table(pathlib.Path(_TRACE.value) if _TRACE.value else folder / "trace")
    print(f"{'':10} {'ms/step':>9}")
    for name, milliseconds, remark in rows:
        print(f"{name:10} {milliseconds:9.3f}  {remark}".rstrip())
    if _TRACE.value:
        say(f"The trace is in {_TRACE.value}: xprof {_TRACE.value}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(_main)
