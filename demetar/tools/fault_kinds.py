"""Kinds of faults that are thrown at a running job: rows of `FAULTS`.

Each is a function that throws one, waits for what comes of it, and says whether that was what is
promised.
"""

import dataclasses
import errno
import pathlib
import random
import re
import signal
import time
from collections.abc import Callable

from demetar.exits import EXIT_DONE, EXIT_LOST, EXIT_PREEMPTED, EXIT_USER_ERROR
from demetar.tools.local_job import LocalJob
from demetar.tools.resume_check import logged_step
from demetar.training.checkpoints import saved

SAVE_EVERY = 5  # steps between checkpoints
_NOTICED = 60.0  # seconds in which a job that goes on makes the steps of two checkpoints


@dataclasses.dataclass
class Scene:
    """A running job, and what a fault needs to know of it.

    Attributes:
      job: its processes.
      workdir: of the run.
      disk: a small disk that `workdir` lies on; None if there is none to be had.
      rng: draws victims and durations.
      lost_seconds: of silence, after which the job takes a process for lost.
      began_at: the newest whole checkpoint when the job was started; 0 without any.
      said: bytes of the log of process 0 by then.
    """

    job: LocalJob
    workdir: pathlib.Path
    disk: pathlib.Path | None
    rng: random.Random
    lost_seconds: float
    began_at: int
    said: int

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each process; None while it runs."""
        return [process.poll() for process in self.job.processes]

    @property
    def runs(self) -> bool:
        return all(code is None for code in self.codes)

    @property
    def unharmed(self) -> bool:
        """Whether all still run, or have come to the end of the run."""
        return self.runs or set(self.codes) <= {None, EXIT_DONE, EXIT_PREEMPTED}

    def victim(self) -> int:
        return self.rng.randrange(len(self.job.processes))

    def resumed_at(self) -> int | None:
        """The step that the job says it went on from; None if it did not get there."""
        found = re.search(
            r"(?:resumed|starts) at step (\d+)", log_since(self.workdir, 0, self.said)
        )
        return int(found[1]) if found else None


def kill_one(scene: Scene) -> dict:
    """SIGKILL: the others end as soon as the watch has found out."""
    victim, started = scene.victim(), time.monotonic()
    scene.job.signal(signal.SIGKILL, victim)
    scene.job.wait()
    codes = scene.codes
    others = [code for n, code in enumerate(codes) if n != victim]
    return {
        "victim": victim,
        "others_ended_after_s": round(time.monotonic() - started, 1),
        "as_promised": codes[victim] == -signal.SIGKILL and set(others) <= {EXIT_LOST},
    }


def kill_all(scene: Scene) -> dict:
    """SIGKILL to each process."""
    scene.job.signal(signal.SIGKILL)
    scene.job.wait()
    return {"as_promised": set(scene.codes) == {-signal.SIGKILL}}


def pause(scene: Scene) -> dict:
    """SIGSTOP for less than the job bears, then SIGCONT: nothing happens but delay."""
    victim, seconds = scene.victim(), scene.rng.uniform(0.1, 0.6) * scene.lost_seconds
    scene.job.signal(signal.SIGSTOP, victim)
    time.sleep(seconds)
    scene.job.signal(signal.SIGCONT, victim)
    time.sleep(1)
    return {"victim": victim, "seconds": round(seconds, 1), "as_promised": scene.unharmed}


def slow(scene: Scene) -> dict:
    """SIGSTOP and SIGCONT in turn: a process with a sixth of the time of the others."""
    victim, bursts = scene.victim(), scene.rng.randrange(5, 15)
    for _ in range(bursts):
        scene.job.signal(signal.SIGSTOP, victim)
        time.sleep(0.25)
        scene.job.signal(signal.SIGCONT, victim)
        time.sleep(0.05)
    return {"victim": victim, "bursts": bursts, "as_promised": scene.unharmed}


def stop(scene: Scene) -> dict:
    """SIGSTOP for good: the others name the process and end; then it is killed."""
    victim, count, started = scene.victim(), len(scene.job.processes), time.monotonic()
    others = [n for n in range(count) if n != victim]
    before = {n: log_of(scene.workdir, n).stat().st_size for n in others}
    scene.job.signal(signal.SIGSTOP, victim)
    while any(scene.codes[n] is None for n in others):
        if time.monotonic() - started > scene.lost_seconds + 60:
            break
        time.sleep(0.05)
    ended_after = time.monotonic() - started
    codes = [scene.codes[n] for n in others]
    said = "".join(log_since(scene.workdir, n, before[n]) for n in others)
    scene.job.signal(signal.SIGKILL)
    scene.job.wait()
    return {
        "victim": victim,
        "others_ended_after_s": round(ended_after, 1),
        "as_promised": set(codes) == {EXIT_LOST} and f"Process {victim} of {count}" in said,
    }


def fill_disk(scene: Scene) -> dict:
    """No byte is left for some seconds: the run bears it, or ends by itself and says why."""
    seconds = scene.rng.uniform(1, 4)
    filler = scene.disk / "filler"
    deadline, size = time.monotonic() + seconds, 1 << 20
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < deadline and scene.runs:
            try:
                file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size = max(1, size // 2)  # to the last byte, and what the run sets free
                time.sleep(0.01)
    filler.unlink()
    # A save that failed in its thread is noticed at the next one, when there is space again.
    deadline, before = time.monotonic() + _NOTICED, logged_step(scene.workdir)
    hangs = True
    while scene.runs and hangs and time.monotonic() < deadline:
        hangs = logged_step(scene.workdir) <= before + 2 * SAVE_EVERY
        time.sleep(0.05)
    if not scene.runs:
        scene.job.wait()
        hangs = False
    refused = set(scene.codes) == {EXIT_USER_ERROR}
    good = refused or (scene.unharmed and not hangs)
    return {"seconds": round(seconds, 1), "as_promised": good}


def flip_byte(scene: Scene) -> dict:
    """SIGKILL to all; then one bit of a file of the newest whole checkpoint is turned."""

    def flip(file: pathlib.Path) -> None:
        content = bytearray(file.read_bytes())
        content[scene.rng.randrange(len(content))] ^= 1 << scene.rng.randrange(8)
        file.write_bytes(content)

    return _damage(scene, flip)


def delete_file(scene: Scene) -> dict:
    """SIGKILL to all; then a file of the newest whole checkpoint is deleted."""
    return _damage(scene, pathlib.Path.unlink)


def _damage(scene: Scene, harm: Callable[[pathlib.Path], None]) -> dict:
    facts = kill_all(scene)
    whole = whole_steps(scene.workdir)
    if len(whole) < 2:
        # Killed between the deletion of an old checkpoint and the manifest of a new one, or at
        # the very start: what is harmed then is gone, and no run could go on.
        return facts | {"kind": "kill all"}
    folder = scene.workdir / "checkpoints" / str(whole[-1])
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    file = scene.rng.choice(files)
    harm(file)
    # It goes back exactly one, whichever file it was.
    good = facts["as_promised"] and whole_steps(scene.workdir) == whole[:-1]
    return {"harmed": str(file.relative_to(scene.workdir)), "as_promised": good}


FAULTS: dict[str, Callable[[Scene], dict]] = {
    "kill one": kill_one,
    "kill all": kill_all,
    "pause": pause,
    "slow": slow,
    "stop": stop,
    "full disk": fill_disk,
    "flip a bit": flip_byte,
    "delete a file": delete_file,
}


# --- what is in a workdir ------------------------------------------------------------------------


def whole_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    return [one.step for one in saved(workdir) if one.wrong is None]


def log_since(workdir: pathlib.Path, process: int, start: int) -> str:
    """What the log of a process holds from byte `start` on."""
    log = log_of(workdir, process)
    return log.read_bytes()[start:].decode(errors="replace") if log.exists() else ""


def log_of(workdir: pathlib.Path, process: int) -> pathlib.Path:
    """The log of a process."""
    return workdir / "logs" / f"process-{process}.log"
