"""A run that is killed again and again, at random moments, and the one that nobody disturbed."""

import json
import pathlib
import random
import signal
import time

from data_pipelines.errors import UserError
from demetar.exits import EXIT_DONE, EXIT_PREEMPTED
from demetar.records.log import say
from demetar.tools.local_job import LocalJob
from demetar.tools.resume_check import (
    compare,
    configure_like,
    finish,
    latest_step,
    logged_step,
    run_to,
)

EXACT = "nothing lost"
_EVERY = 5  # steps between checkpoints
_STARTUP_SECONDS = 12.0  # in which early kills fall


def chaos(
    folder: pathlib.Path, arguments: list[str], kills: int, steps: int, count: int, seed: int
) -> dict:
    """Runs all of it.

    Args:
      folder: for the two runs.
      arguments: of `python -m demetar.main`.
      kills: how many.
      steps: of each run.
      count: of processes.
      seed: of moments and victims.

    Returns:
      What happened, as JSON; `verdict` is `EXACT` if nothing was lost.
    """
    whole, broken = folder / "whole", folder / "broken"
    say(f"{steps} steps without a break, {count} process(es) ...")
    started = time.monotonic()
    finish(run_to(whole, arguments, steps, _EVERY, count))
    undisturbed = time.monotonic() - started
    rng, attempts = random.Random(seed), []
    while len(attempts) < kills:
        attempts.append(kill_once(run_to(broken, arguments, steps, _EVERY, count), broken, rng))
        last, spent = attempts[-1], time.monotonic() - started - undisturbed
        left = spent / len(attempts) * (kills - len(attempts))
        say(
            f"kill {len(attempts)}/{kills}: process {last['victim']} in {last['phases']}, others "
            f"ended after {last['others_ended_after_s']} s with {last['exit_codes']}, resumes from "
            f"{last['resumes_from']}; about {left / 60:.0f} min left"
        )
        # By its end, or as `stop_at` has it: then nothing was killed.
        if last["finished_before"] and {EXIT_DONE, EXIT_PREEMPTED} & set(last["exit_codes"]):
            raise UserError(f"The run ended after {len(attempts)} kills: choose more --steps.")
    finish(run_to(broken, arguments, steps, _EVERY, count))
    configure_like(whole)
    found = compare(whole, broken, steps)
    return {
        "verdict": EXACT if found.is_good(same_topology=True) else "DIFFERS",
        "kills": kills,
        "steps": steps,
        "processes": count,
        "seed": seed,
        "arguments": arguments,
        "same_graphs": found.same_graphs,
        "same_state": found.same_state,
        "state_sha256": found.sha256,
        "undisturbed_seconds": round(undisturbed, 1),
        "attempts": attempts,
    }


def kill_once(job: LocalJob, workdir: pathlib.Path, rng: random.Random) -> dict:
    """Waits for a random moment, kills one process or all, and waits for the others' end."""
    started, from_step = time.monotonic(), logged_step(workdir)
    if rng.random() < 0.3:  # while it starts, compiles or restores
        moment = lambda: time.monotonic() - started > delay
        delay = rng.random() * _STARTUP_SECONDS
    else:  # some steps further on
        moment = lambda: logged_step(workdir) >= from_step + ahead
        ahead = rng.randrange(1, 2 * _EVERY)
    while not moment() and all(p.poll() is None for p in job.processes):
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    victim = rng.choice([None, *range(len(job.processes))])
    kill = {
        "victim": "all" if victim is None else victim,
        "phases": phases(workdir),
        "finished_before": any(p.poll() is not None for p in job.processes),
    }
    killed = time.monotonic()
    job.signal(signal.SIGKILL, victim)
    job.wait()
    codes = [p.returncode for p in job.processes]
    return kill | {
        "others_ended_after_s": round(time.monotonic() - killed, 1),
        "exit_codes": codes,
        "resumes_from": latest_step(workdir),
    }


def phases(workdir: pathlib.Path) -> list[str]:
    """What each process of the run in `workdir` said last that it does."""
    found = []
    for file in sorted((workdir / "processes").glob("*.json")):
        try:
            facts = json.loads(file.read_text())
            found.append(f"{facts['phase']} {facts['step']}")
        except (ValueError, KeyError):
            found.append("?")
    return found
