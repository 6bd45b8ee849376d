"""Two runs of one config, compared after the same number of steps; and a run killed and resumed.

Bit for bit where the topology is the same. Elsewhere the data are the same and the order of
sums is not: losses within `TOLERANCE` of the type, in float64 up to 40 steps, in float32 up to 20.
"""

import argparse
import dataclasses
import pathlib
import signal
import time

import jax
import ml_collections
import numpy as np

from data_pipelines.errors import UserError
from demetar.config import command_line, stored
from demetar.exits import EXIT_DONE, EXIT_PREEMPTED
from demetar.job.job import Job
from demetar.records import files
from demetar.records.graph_log import read_graph_log
from demetar.records.log import say
from demetar.tools.local_job import LocalJob
from demetar.training import runtime
from demetar.training.checkpoints import Checkpoints
from demetar.training.experiment import build_experiment
from demetar.training.state import state_sha256

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs of one config after the same number of steps.

    Attributes:
      same_graphs: the same in every step.
      first_difference: step and graphs where not, for a person.
      loss: largest relative difference of a logged training loss.
      norm: relative difference of the global norm of the parameters.
      same_state: the whole state and progress have one SHA-256.
      sha256: of the second.
      dtype: that the model computes in.
    """

    same_graphs: bool
    first_difference: str
    loss: float
    norm: float
    same_state: bool
    sha256: str
    dtype: str

    def is_good(self, same_topology: bool) -> bool:
        """Bit for bit, or within the tolerance of the type."""
        if same_topology:
            return self.same_graphs and self.same_state
        within = TOLERANCE.get(self.dtype)  # bfloat16: nothing is promised
        return self.same_graphs and within is not None and max(self.loss, self.norm) <= within

    def lines(self) -> list[str]:
        """For a person."""
        return [
            f"graphs of every step  {'the same' if self.same_graphs else self.first_difference}",
            f"training losses       largest relative difference {self.loss:.1e}",
            f"parameters            relative difference of the global norm {self.norm:.1e}",
            f"whole state           {'bit for bit the same' if self.same_state else 'differs'}, "
            f"SHA-256 {self.sha256[:16]}",
        ]


def compare(first: pathlib.Path, second: pathlib.Path, step: int) -> Comparison:
    """Compares the runs in two folders, both saved after `step`, with their logs of graphs."""
    graphs = [read_graph_log(folder) for folder in (first, second)]
    steps = range(1, step + 1)
    odd = [k for k in steps if graphs[0].get(k) != graphs[1].get(k)]
    difference = odd and f"step {odd[0]}: {graphs[0].get(odd[0])} and {graphs[1].get(odd[0])}"
    losses = [_losses(folder, step) for folder in (first, second)]
    common = sorted(losses[0].keys() & losses[1].keys())
    a, b = (np.array([loss[k] for k in common]) for loss in losses)
    config = _config_of(first)
    experiment = build_experiment(config)
    states, hashes = [], []
    for folder in (first, second):
        checkpoints = Checkpoints(folder, config.checkpoint.keep_last, Job.alone())
        state = jax.device_get(checkpoints.restore(step, experiment.abstract_state()))
        states.append(state)
        _, progress = checkpoints.meta(step)
        hashes.append(state_sha256(state, progress.to_json()))
        checkpoints.close()
    norms = [_norm(state.params) for state in states]
    return Comparison(
        same_graphs=not odd,
        first_difference=difference or "",
        loss=float(np.max(np.abs(a - b) / np.abs(a), initial=0.0)),
        norm=abs(norms[0] - norms[1]) / norms[0],
        same_state=hashes[0] == hashes[1],
        sha256=hashes[1],
        dtype=config.model.dtype,
    )


def _norm(params) -> float:
    """Global norm, summed in float64 whatever the parameters are."""
    return float(np.sqrt(sum(np.square(np.float64(x)).sum() for x in jax.tree.leaves(params))))


def _losses(folder: pathlib.Path, last: int) -> dict[int, float]:
    lines = files.read_jsonl(folder / "metrics.jsonl")
    return {x["step"]: x["loss"] for x in lines if x["split"] == "train" and x["step"] <= last}


def latest_step(workdir: pathlib.Path) -> int:
    """Of the whole checkpoints in `workdir`; 0 without any."""
    whole = (workdir / "checkpoints").glob("*/manifest.json")
    return max((int(file.parent.name) for file in whole), default=0)


def logged_step(workdir: pathlib.Path) -> int:
    """The last training step in `metrics.jsonl`; 0 before the first."""
    lines = files.read_jsonl(workdir / "metrics.jsonl")
    return max((x["step"] for x in lines if x["split"] == "train"), default=0)


def parse_for_runs(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, ml_collections.ConfigDict, list[str]]:
    """The options of a command, the config of the runs that it starts, and their arguments.

    Raises:
      UserError: a run would refuse them.
    """
    options, rest = parser.parse_known_args(arguments)
    _, config = command_line.parse_with_config(parser, arguments)
    return options, config, rest


def check_steps(config: ml_collections.ConfigDict, steps: int) -> None:
    """Refuses to compare runs of this config after more steps than they have."""
    if steps > config.train.num_steps:
        raise UserError(
            f"Runs of {steps} steps are to be compared, but config.train.num_steps is "
            f"{config.train.num_steps}: choose fewer --steps, or raise it."
        )


class RunFailed(UserError):
    """A run that should have got to its end did not; ends the command with the run's own code."""

    def __init__(self, job: LocalJob, code: int):
        super().__init__(
            f"A run ended with code {code}, and said at last:\n{job.tail(job.first_to_fail or 0)}"
        )
        self.exit_code = code


def run_to(
    workdir: pathlib.Path, arguments: list[str], stop_at: int, every: int, count: int
) -> LocalJob:
    """Starts processes that train until `stop_at`, saving `every` few steps, all logs on."""
    more = [f"--workdir={workdir}", f"--config.checkpoint.stop_at={stop_at}"]
    more += [f"--config.checkpoint.every_steps={every}", "--config.log.every_steps=1"]
    return LocalJob([*arguments, *more, "--config.log.graphs=True"], count, quiet=True)


def finish(job: LocalJob) -> None:
    """Waits for a job that should reach its `stop_at`."""
    code = job.wait()
    if code not in (EXIT_DONE, EXIT_PREEMPTED):
        raise RunFailed(job, code)


def configure_like(workdir: pathlib.Path) -> None:
    """Precision and such of this process, as the run in `workdir` had them."""
    runtime.configure(_config_of(workdir))


def _config_of(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Of the run in `workdir`, for one device of this process."""
    saved = stored.read_identity(workdir / "config.json")
    return stored.on_one_device(stored.from_json(saved["config"]))


def verify(
    folder: pathlib.Path, arguments: list[str], steps: int, count: int, resumed: list[str], on: int
) -> Comparison:
    """Runs all three and compares; `resumed` are arguments of the resume alone, `on` its count."""
    whole, broken = folder / "whole", folder / "broken"
    every = max(1, steps // 2)
    say(f"1/3  {2 * steps} steps without a break, {count} process(es) ...")
    finish(run_to(whole, arguments, 2 * steps, every, count))
    say(f"2/3  the same, killed (SIGKILL) after step {steps} ...")
    job = run_to(broken, arguments, 2 * steps, every, count)
    while logged_step(broken) < steps or latest_step(broken) == 0:
        if any(p.poll() is not None for p in job.processes):
            finish(job)
            raise UserError("The run ended before it could be killed: choose more --steps.")
        time.sleep(0.02)
    job.signal(signal.SIGKILL)
    job.wait()
    say(f"3/3  resumed from step {latest_step(broken)}, {on} process(es) ...")
    finish(run_to(broken, [*arguments, *resumed], 2 * steps, every, on))
    configure_like(whole)
    return compare(whole, broken, 2 * steps)
