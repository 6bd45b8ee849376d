"""Proves on your own config that a killed run goes on exactly.

    python -m demetar.verify_resume --config=configs/qm9.py:quick [--steps=20] [--config.key=value]

trains 2 x steps without a break; then again in another folder, killed with SIGKILL after
`steps`, resumed by the same command; and compares the molecules of every step, the losses and the
whole state. `--cpu=N` uses N processes, `--resume_cpu` and `--resume_mesh=data,fsdp,model`
resume on something else. Exit code 0 if the verdict is good, 1 if not.

Bit for bit where the topology is the same. Elsewhere the data are the same and the order of
sums is not: losses within 1e-10 (float64, up to 40 steps) or 1e-5 (float32, up to 20).
"""

import argparse
import dataclasses
import pathlib
import signal
import sys
import tempfile
import time

import jax
import numpy as np
from absl import flags

from data_pipelines.errors import UserError
from demetar.config import stored
from demetar.exits import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from demetar.local import LocalJob
from demetar.records import files, graph_log
from demetar.records.log import say
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
    """Compares the runs in two folders, both saved after `step`, with an identity log."""
    graphs = [graph_log.read_identity(folder) for folder in (first, second)]
    steps = range(1, step + 1)
    odd = [k for k in steps if graphs[0].get(k) != graphs[1].get(k)]
    difference = odd and f"step {odd[0]}: {graphs[0].get(odd[0])} and {graphs[1].get(odd[0])}"
    losses = [_losses(folder, step) for folder in (first, second)]
    common = sorted(losses[0].keys() & losses[1].keys())
    a, b = (np.array([loss[k] for k in common]) for loss in losses)
    config = stored.from_json(files.read_json(first / "config.json")["config"])
    with config.unlocked():  # all of it on one device of this process
        config.mesh.update({"data": 1, "fsdp": 1, "model": 1})
    experiment = build_experiment(config)
    states, hashes = [], []
    for folder in (first, second):
        checkpoints = Checkpoints(folder, config.checkpoint.keep_last)
        state = jax.device_get(checkpoints.restore(step, experiment.abstract_state()))
        states.append(state)
        hashes.append(state_sha256(state, checkpoints.meta(step)["progress"]))
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


def run_to(workdir: pathlib.Path, arguments: list[str], stop_at: int, every: int, count: int):
    """Starts processes that train until `stop_at`, saving `every` few steps, with all logs on."""
    more = [f"--workdir={workdir}", f"--config.checkpoint.stop_at={stop_at}"]
    more += [f"--config.checkpoint.every_steps={every}", "--config.log.every_steps=1"]
    more += ["--config.train.steps_per_call=1"]  # it may have to stop anywhere
    return LocalJob([*arguments, *more, "--config.log.identity=True"], count, quiet=True)


def finish(job: LocalJob) -> None:
    """Waits for a job that should reach its `stop_at`."""
    code = job.wait()
    if code not in (EXIT_DONE, EXIT_PREEMPTED):
        raise UserError(f"A run ended with code {code}:\n{job.tail(job.first_to_fail or 0)}")


def configure_like(workdir: pathlib.Path) -> None:
    """Precision and such of this process, as the run in `workdir` had them."""
    flags.FLAGS.mark_as_parsed()  # Grain reads absl flags
    config = stored.from_json(files.read_json(workdir / "config.json")["config"])
    with config.unlocked():
        config.mesh.cpu_devices = 1
    runtime.configure(config)


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


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="demetar.verify_resume",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=20, help="before the kill, and after")
    parser.add_argument("--cpu", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--resume_cpu", type=int, metavar="N", help="processes after the kill")
    parser.add_argument("--resume_mesh", metavar="D,F,M", help="mesh after the kill")
    parser.add_argument("--resume_devices", type=int, metavar="N", help="devices of each, after")
    options, rest = parser.parse_known_args(arguments)
    resumed = []
    if options.resume_mesh:
        sizes = zip(("data", "fsdp", "model"), options.resume_mesh.split(","), strict=True)
        resumed += [f"--config.mesh.{axis}={size}" for axis, size in sizes]
    if options.resume_devices:
        resumed.append(f"--config.mesh.cpu_devices={options.resume_devices}")
    on = options.resume_cpu or options.cpu
    same_topology = not resumed and on == options.cpu
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = verify(pathlib.Path(folder), rest, options.steps, options.cpu, resumed, on)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
    good = found.is_good(same_topology)
    print("\n".join(found.lines()))
    wanted = "bit for bit" if same_topology else f"within {TOLERANCE.get(found.dtype)}"
    print(f"verdict               {'EXACT' if good else 'NOT EXACT'}: wanted {wanted}")
    return EXIT_DONE if good else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
