"""Kills a run again and again, at random moments, and shows that nothing is lost.

    python -m demetar.chaos --kills=30 --cpu=2 --config=configs/qm9.py:smoke [--config.key=value]

trains `--steps` once without a break; then again in another folder, where one process or all
are killed with SIGKILL at a random moment (starting, compiling, training, evaluating, saving)
and the same command is given again, `--kills` times. Then compares the molecules of every step
and the whole state, bit for bit. Prints JSON. Exit code 0 if nothing was lost.
"""

import argparse
import json
import pathlib
import random
import signal
import sys
import tempfile
import time

from data_pipelines.errors import UserError
from demetar.exits import EXIT_DONE, EXIT_FAILED
from demetar.local import LocalJob
from demetar.records.log import say
from demetar.verify_resume import compare, configure_like, finish, latest_step, logged_step, run_to

_EVERY = 5  # steps between checkpoints
_STARTUP_SECONDS = 12.0  # in which early kills fall


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
    report = {
        "victim": "all" if victim is None else victim,
        "phases": phases(workdir),
        "finished_before": any(p.poll() is not None for p in job.processes),
    }
    killed = time.monotonic()
    job.signal(signal.SIGKILL, victim)
    job.wait()
    codes = [p.returncode for p in job.processes]
    return report | {
        "others_ended_after_s": round(time.monotonic() - killed, 1),
        "exit_codes": codes,
        "resumes_from": latest_step(workdir),
    }


def chaos(folder: pathlib.Path, arguments: list[str], kills: int, steps: int, count: int, seed):
    """Runs all of it; returns what happened, as JSON."""
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
        if last["finished_before"] and 0 in last["exit_codes"]:
            raise UserError(f"The run ended after {len(attempts)} kills: choose more --steps.")
    finish(run_to(broken, arguments, steps, _EVERY, count))
    configure_like(whole)
    found = compare(whole, broken, steps)
    return {
        "verdict": "nothing lost" if found.is_good(same_topology=True) else "DIFFERS",
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


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="demetar.chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200, help="of the whole run")
    parser.add_argument("--cpu", type=int, default=2, metavar="N", help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    options, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = chaos(
                pathlib.Path(folder), rest, options.kills, options.steps, options.cpu, options.seed
            )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
    print(json.dumps(found, indent=1))
    return EXIT_DONE if found["verdict"] == "nothing lost" else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
