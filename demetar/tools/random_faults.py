"""A run at which one fault after another is thrown, and the one that nobody disturbed."""

import collections
import contextlib
import json
import pathlib
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from data_pipelines.errors import UserError
from demetar.records.log import say
from demetar.tools.fault_kinds import FAULTS, SAVE_EVERY, Scene, kill_all, log_of, whole_steps
from demetar.tools.local_job import LocalJob
from demetar.tools.resume_check import compare, configure_like, finish, logged_step, run_to
from demetar.training.checkpoints import saved, size_of

EXACT = "nothing lost"
_STARTUP_SECONDS = 12.0  # in which early faults fall
# For a process that is killed before it has joined: its others end by themselves, before whoever
# started them (`LocalJob.wait`) kills them too.
_START_SECONDS = 90
_BESIDE = 64 << 20  # bytes of the small disk for logs, metrics and what is set aside


def chaos(
    folder: pathlib.Path,
    arguments: list[str],
    faults: int,
    steps: int,
    count: int,
    seed: int,
    lost_seconds: float,
) -> dict:
    """Runs all of it.

    Args:
      folder: for the two runs.
      arguments: of `python -m demetar.main`.
      faults: how many.
      steps: of each run.
      count: of processes.
      seed: of kinds, moments and victims.
      lost_seconds: `config.cluster.lost_seconds` of the runs.

    Returns:
      What happened, as JSON; `verdict` is `EXACT` if nothing was lost and all went as promised.
    """
    whole = folder / "whole"
    arguments = [*arguments, f"--config.cluster.start_seconds={_START_SECONDS}"]
    say(f"{steps} steps without a break, {count} process(es) ...")
    started = time.monotonic()
    finish(run_to(whole, arguments, steps, SAVE_EVERY, count))
    undisturbed = time.monotonic() - started
    one = max(size_of(checkpoint.folder) for checkpoint in saved(whole))
    with small_disk(folder / "disk", (faults + 6) * one + _BESIDE) as (disk, refusal):
        left_out = {"full disk": refusal} if disk is None else {}
        if count == 1:
            left_out["stop"] = "of one process: nobody watches it"
        kinds = [kind for kind in FAULTS if kind not in left_out]
        for kind, reason in left_out.items():
            say(f"left out: {kind} ({reason})")
        broken = (disk or folder) / "broken"
        start = lambda: run_to(broken, arguments, steps, SAVE_EVERY, count)
        rng = random.Random(seed)
        thrown, asleep = throw(start, broken, disk, kinds, faults, rng, lost_seconds)
        finish(start())
        configure_like(whole)
        found = compare(whole, broken, steps)
    odd = [number for number, fault in enumerate(thrown, 1) if not fault["as_promised"]]
    exact = found.is_good(same_topology=True)
    return {
        "verdict": EXACT if exact and not odd else "NOT AS PROMISED" if exact else "DIFFERS",
        "faults": faults,
        "kinds": dict(collections.Counter(fault["kind"] for fault in thrown)),
        "left_out": left_out,
        "not_as_promised": odd,
        "steps": steps,
        "processes": count,
        "seed": seed,
        "arguments": arguments,
        "same_graphs": found.same_graphs,
        "same_state": found.same_state,
        "state_sha256": found.sha256,
        "undisturbed_seconds": round(undisturbed, 1),
        "seconds": round(time.monotonic() - started - undisturbed, 1),
        "thrown": thrown,
        "while_stopped_from_outside": asleep,
    }


def throw(
    start: Callable[[], LocalJob],
    workdir: pathlib.Path,
    disk: pathlib.Path | None,
    kinds: list[str],
    faults: int,
    rng: random.Random,
    lost_seconds: float,
) -> tuple[list[dict], list[dict]]:
    """Throws one fault after another; starts the job again where it has ended.

    Returns:
      What was thrown and what came of it; and the same of those that do not count, because this
      process, and so maybe the job, was stopped from outside meanwhile.
    """
    thrown, asleep, scene, sleep, began = [], [], None, Sleep(), time.monotonic()
    while len(thrown) < faults:
        if scene is None or not scene.runs:
            log = log_of(workdir, 0)
            said = log.stat().st_size if log.exists() else 0
            at = max(whole_steps(workdir), default=0)
            scene = Scene(start(), workdir, disk, rng, lost_seconds, at, said)
            slept = sleep.seconds
        fault = throw_one(scene, rng.choice(kinds))
        if sleep.seconds > slept:
            # The job was stopped too, maybe for longer than JAX bears: no promise is broken.
            asleep.append(fault | {"slept_s": round(sleep.seconds - slept)})
        else:
            thrown.append(fault)
        left = (time.monotonic() - began) / max(len(thrown), 1) * (faults - len(thrown))
        facts = ", ".join(f"{key} {value}" for key, value in fault.items() if key != "kind")
        say(
            f"fault {len(thrown)}/{faults}, {fault['kind']}: {facts}; "
            f"about {left / 60:.0f} min left"
        )
        # By its end, or as `stop_at` has it.
        if not scene.runs and scene.unharmed:
            scene.job.wait()
            raise UserError(f"The run ended after {len(thrown)} faults: choose more --steps.")
    if scene.runs:
        kill_all(scene)
    return thrown, asleep


def throw_one(scene: Scene, kind: str) -> dict:
    """Waits for a random moment, and throws a fault of this kind; what came of it, as JSON."""
    rng, workdir = scene.rng, scene.workdir
    started, from_step = time.monotonic(), logged_step(workdir)
    delay, ahead = rng.random() * _STARTUP_SECONDS, rng.randrange(1, 2 * SAVE_EVERY)
    # A process that stops before it has shown itself is missed only after `start_seconds`.
    if rng.random() < 0.3 and kind != "stop":  # while it starts, compiles or restores
        moment = lambda: time.monotonic() - started > delay
    else:  # some steps further on
        moment = lambda: logged_step(workdir) >= from_step + ahead
    while not moment() and scene.runs:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    fault = {"kind": kind, "phases": phases(workdir)}
    if not scene.runs:  # by itself: its end, or something that nobody has thrown
        scene.job.wait()
        fault |= {"kind": "none", "as_promised": scene.unharmed}
    else:
        fault |= FAULTS[kind](scene)
    resumed_at = scene.resumed_at()
    fault["as_promised"] &= resumed_at in (None, scene.began_at)
    fault |= {"exit_codes": scene.codes, "resumed_at": resumed_at}
    return fault | {"newest_whole": max(whole_steps(workdir), default=0)}


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


class Sleep:
    """Notices that this process did not run for a while: `seconds` of it, of more than two each."""

    def __init__(self):
        self.seconds = 0.0
        threading.Thread(target=self._run, daemon=True, name="sleep").start()

    def _run(self) -> None:
        while True:
            before = time.monotonic()
            time.sleep(0.2)
            gap = time.monotonic() - before
            if gap > 2:
                self.seconds += gap


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: int) -> Iterator[tuple[pathlib.Path | None, str]]:
    """A real filesystem of `size` bytes, in memory, at `folder`; or None, and why not."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
    try:
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
        refusal = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        refusal = str(error)
    if refusal:
        yield None, refusal
        return
    try:
        yield folder, ""
    finally:
        subprocess.run(["umount", folder], check=True)
