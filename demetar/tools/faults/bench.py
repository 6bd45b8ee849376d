"""What the faults share: their table, a tiny run that nobody disturbs, ways to disturb another."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable

from demetar.tools import resume_check
from demetar.tools.local_job import LocalJob

SURVIVED, REFUSED, NOT_MADE, LOST = "survived", "refused", "not made here", "lost"
STEPS = 40  # of a run; it saves after every fifth and evaluates after 20 and 40
HOOK = pathlib.Path(__file__).parent / "hook"
ROOT = pathlib.Path(__file__).parents[3]
# The smallest model, on 64 small simulations. For what asks nothing of the model.
WATCHFUL = ("--config.cluster.lost_seconds=5", "--config.cluster.stuck_seconds=8")
_CONFIG = ["--config=nbody:smoke,linear", "--config.data.eval_batch_size=4"]


class NotMade(Exception):
    """A fault that cannot be made on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the matrix.

    Attributes:
      number: of the fault.
      fault: what goes wrong.
      how: it was made.
      wanted: what should come of it.
      make: makes it and looks; it is given a `Scene`.
    """

    number: int
    fault: str
    how: str
    wanted: str
    make: Callable


@dataclasses.dataclass(frozen=True)
class Check:
    """What one oracle said.

    Attributes:
      oracle: its name.
      good: whether it is as wanted.
      text: what it saw.
    """

    oracle: str
    good: bool
    text: str


class AwakeClock:
    """Counts the seconds in which this process ran: none while all of it stands still.

    So a machine that sleeps, or a job that is stopped for a while, does not break a bound of time.
    """

    def __init__(self):
        self._awake, self._last, self._longest = 0.0, time.monotonic(), 0.0
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True, name="clock").start()

    def _beat(self) -> None:
        while True:
            time.sleep(0.2)
            self.now()

    def now(self) -> float:
        """Seconds since the clock was made, of which the process was awake."""
        with self._lock:
            now = time.monotonic()
            self._longest = max(self._longest, now - self._last)
            self._awake, self._last = self._awake + min(1.0, now - self._last), now
            return self._awake

    def stood_still(self) -> float:
        """The longest silence since this was asked last, in seconds."""
        self.now()
        longest, self._longest = self._longest, 0.0
        return longest


class Bench:
    """What all scenes share: a folder, the cache of prepared data and programs, undisturbed runs.

    Args:
      folder: an empty one.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.cache = folder / "cache"
        self.clock = AwakeClock()
        self._undisturbed: dict[tuple, pathlib.Path] = {}

    def flags(self, workdir: pathlib.Path) -> list[str]:
        """Of `demetar train` on the tiny config."""
        return [
            *(f"--workdir={workdir}", *_CONFIG, f"--config.data.cache_dir={self.cache}"),
            *("--config.mesh.cpu_devices=1", "--config.log.graphs=True"),
            *("--config.cluster.lost_seconds=300", "--config.cluster.stuck_seconds=600"),
        ]

    def environment(self, fault: str = "") -> dict[str, str]:
        """Of every process: code that is made fast, kept once it is made; and the hook."""
        path = [str(HOOK)] * bool(fault) + [str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "XDG_CACHE_HOME": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "DEMETAR_FAULT": fault,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }

    def undisturbed(self, count: int = 1, *flags: str) -> pathlib.Path:
        """The folder of a run of `count` processes that nobody disturbed; made once."""
        if (count, flags) not in self._undisturbed:
            workdir = self.folder / f"undisturbed-{len(self._undisturbed)}"
            shutil.rmtree(workdir, ignore_errors=True)  # of one that was cut off
            job = LocalJob(
                [*self.flags(workdir), *flags], count, quiet=True, environment=self.environment()
            )
            resume_check.finish(job)
            self._undisturbed[count, flags] = workdir
        return self._undisturbed[count, flags]


def mount(command: list[str]) -> None:
    """Runs `mount`, which needs root; `NotMade` where it is refused."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotMade(f"mounting is refused: {done.stderr.strip()}")


def injecting(calls: str, what: str, *more: str) -> list[str]:
    """The words before a command whose system calls shall fail or be slow, by strace.

    Args:
      calls: names of system calls, by comma.
      what: as strace's `inject` wants it: `error=EIO`, `delay_enter=1000000`.
      more: further options of strace.
    """
    if shutil.which("strace") is None:
        raise NotMade("strace is not installed")
    words = ["strace", "-f", "--seccomp-bpf", "-o", os.devnull]
    done = subprocess.run([*words, "true"], capture_output=True, text=True)
    if done.returncode:
        raise NotMade(f"strace may not trace: {done.stderr.strip()}")
    return [*words, "-e", f"trace={calls}", "-e", f"inject={calls}:{what}", *more]
