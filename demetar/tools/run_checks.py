"""What `demetar doctor` looks at with a config: data, disk, an earlier run, a compiled step."""

import itertools
import math
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

import jax
import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.prepared import checked_whole
from demetar.config import stored
from demetar.job.failures import check_progress
from demetar.records.log import duration, size_text
from demetar.speed import flops
from demetar.tools.machine_checks import (
    Finding,
    existing,
    first_line,
    host_memory,
    ok,
    problem,
    warning,
)
from demetar.tools.planner import memory_of
from demetar.training.checkpoints import check_name, saved, state_bytes
from demetar.training.experiment import Experiment, build_experiment
from demetar.training.trainer import Trainer

_BESIDE = 16 << 20  # bytes for logs, metrics and pictures of a run
_STEPS = 5  # that are timed


def examine(config, workdir: pathlib.Path, processes: int) -> Iterator[Finding]:
    """Builds what a run is made of, and says what it needs.

    Args:
      config: of the run, locked.
      workdir: of the run; it may not exist yet.
      processes: of the job; each is asked about its own share.
    """
    if processes > 1:
        config = _share(config, processes)
    try:
        start = time.perf_counter()
        with checked_whole():
            experiment = build_experiment(config)
    except UserError as error:
        yield problem("config", str(error))  # or its data: the message names what it is
        return
    yield _data(experiment, time.perf_counter() - start)
    yield _space(experiment, workdir)
    yield from _earlier_run(experiment, workdir, processes)
    yield from _step(experiment)


def _share(config, processes: int):
    """The config of one process's part: its rows of a batch, on as many of its devices as fit."""
    config = config.copy_and_resolve_references()
    for key, parts in (("batch_size", config.train.accumulation), ("eval_batch_size", 1)):
        config.data[key] = max(1, config.data[key] // processes // parts) * parts
    rows = (config.data.batch_size // config.train.accumulation, config.data.eval_batch_size)
    data = math.gcd(*rows, jax.local_device_count())
    config.mesh.update({"data": data, "fsdp": 1, "model": 1})
    return config.lock()


def _data(experiment: Experiment, seconds: float) -> Finding:
    dataset, passport = experiment.dataset, experiment.dataset.passport
    digest = str(passport.get("content_sha256", ""))[:12]
    parts = ", ".join(f"{len(rows):,} {part}" for part, rows in dataset.split.items())
    return ok(
        "data",
        f"{passport.get('dataset', dataset.items)}: {parts}; content SHA-256 {digest}…, every file "
        f"as its passport says ({seconds:.1f} s)",
    )


def _space(experiment: Experiment, workdir: pathlib.Path) -> Finding:
    keep = experiment.config.checkpoint.keep_last
    size, free = state_bytes(experiment.abstract_state()), shutil.disk_usage(existing(workdir)).free
    needed = (keep + 2) * size + _BESIDE  # the newest, the best, the one that is being written
    text = (
        f"{size_text(free)} free for {workdir}; {keep + 2} checkpoints of {size_text(size)} and "
        f"the rest need {size_text(needed)}"
    )
    if free < needed:
        return problem("space", text, "Make room, or choose another --workdir.")
    return ok("space", text)


def _earlier_run(
    experiment: Experiment, workdir: pathlib.Path, processes: int
) -> Iterator[Finding]:
    """Whether checkpoints can be restored there, and a run that is there already would go on."""
    try:
        check_name(workdir)
    except UserError as error:
        yield problem("workdir", str(error))
    found = saved(workdir)
    whole = [one.step for one in found if one.wrong is None]
    for one in found:
        if one.wrong:
            yield warning(
                "workdir",
                f"checkpoint {one.step} is not whole: {one.wrong}",
                f"Nothing: the run goes on from step {max(whole)}."
                if whole
                else "Start again in another --workdir: no other is whole.",
            )
    if not os.path.isdir(workdir):
        return
    try:
        if found and processes == 1 and (workdir / "config.json").exists():
            identity = stored.read_identity(workdir / "config.json")
            stored.check_same_run(identity, experiment.identity, workdir)
        check_progress(workdir, max(whole, default=0))
        finished = (workdir / "result.json").exists()
    except UserError as error:
        yield problem("workdir", str(error))
        return
    except (OSError, ValueError, KeyError) as error:
        yield problem("workdir", f"what is in {workdir} cannot be read: {error}")
        return
    if finished:
        yield ok("workdir", "the run that is there is finished: it would do nothing")
    elif whole:
        yield ok("workdir", f"the run that is there goes on from step {max(whole)}")


def _step(experiment: Experiment) -> Iterator[Finding]:
    """Compiles the first bucket and the largest; runs the first; says what a run would take."""
    trainer = Trainer(experiment)
    last = len(trainer.plan.buckets) - 1
    try:
        trainer.program(0)
        seconds = trainer.compile_seconds
        yield ok("compile", f"the first bucket, of {last + 1}, in {seconds:.1f} s")
        yield _memory(trainer.program(last))
        a_step = _seconds_of_first_bucket(trainer)
    except Exception as error:  # whatever the compiler raises: a run would end so too
        yield problem(
            "compile",
            f"{type(error).__name__}: {first_line(error)}",
            "If it is memory: halve config.data.batch_size, or raise config.train.accumulation.",
        )
        return
    counts = [flops.count(trainer.jitted, *trainer.abstract_arguments(b)) for b in range(last + 1)]
    work = np.array([count.total for count in counts]) / counts[_first_bucket(trainer)].total
    mean = a_step * float(np.average(work, weights=trainer.plan.batches_per_bucket))
    steps = experiment.config.train.num_steps
    yield ok(
        "time",
        f"about {1e3 * mean:.3g} ms a step, {duration(mean * steps)} for {steps:,} steps, without "
        "evaluations (the first bucket measured, the others by their operations)",
    )


def _memory(program) -> Finding:
    needed = memory_of(program)["all"]
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:  # a CPU: its devices share the memory of the machine
        needed, limit = needed * jax.local_device_count(), host_memory()
    text = f"a step of the largest bucket takes {size_text(needed)} of {size_text(limit)} free"
    if needed > limit:
        return problem(
            "memory",
            text,
            "Halve config.data.batch_size, raise config.train.accumulation or config.mesh.fsdp.",
        )
    return ok("memory", text)


def _first_bucket(trainer: Trainer) -> int:
    """Of those that training has graphs of."""
    return int(np.flatnonzero(trainer.plan.batches_per_bucket)[0])


def _seconds_of_first_bucket(trainer: Trainer) -> float:
    """Of one step, the mean of a few after the first."""
    first = _first_bucket(trainer)
    number = next(k for k in itertools.count() if trainer.plan[k][0] == first)
    bucket, graphs = trainer.gather(number)
    batch = trainer.to_devices(graphs)
    state, sums = trainer.step(trainer.experiment.create_state(), bucket, batch)
    jax.block_until_ready(sums)
    start = time.perf_counter()
    for _ in range(_STEPS):
        state, sums = trainer.step(state, bucket, batch)
    jax.block_until_ready(sums)
    return (time.perf_counter() - start) / _STEPS
