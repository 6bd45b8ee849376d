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


class Pulse:
    """Whether all of this stood still, as a machine that sleeps: then its times mean nothing."""

    def __init__(self):
        self._longest = 0.0
        threading.Thread(target=self._beat, daemon=True, name="pulse").start()

    def _beat(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.2)
            now = time.monotonic()
            self._longest, last = max(self._longest, now - last), now

    def stood_still(self) -> float:
        """The longest time without a beat since this was asked last; seconds."""
        time.sleep(0.5)  # the beat after a long silence
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
        self._undisturbed: dict[tuple, pathlib.Path] = {}

    def flags(self, workdir: pathlib.Path) -> list[str]:
        """Of `demetar train` on the tiny config."""
        return [
            *(f"--workdir={workdir}", *_CONFIG, f"--config.data.cache_dir={self.cache}"),
            *("--config.mesh.cpu_devices=1", "--config.log.graphs=True"),
            *("--config.cluster.lost_seconds=5", "--config.cluster.stuck_seconds=8"),
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
            if not self._undisturbed:
                resume_check.configure_like(workdir)
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
      what: as strace's `inject` wants it: `error=EIO:when=60+`, `delay_enter=1000000`.
      more: further options of strace.
    """
    if shutil.which("strace") is None:
        raise NotMade("strace is not installed")
    words = ["strace", "-f", "--seccomp-bpf", "-o", os.devnull]
    done = subprocess.run([*words, "true"], capture_output=True, text=True)
    if done.returncode:
        raise NotMade(f"strace may not trace: {done.stderr.strip()}")
    return [*words, "-e", f"trace={calls}", "-e", f"inject={calls}:{what}", *more]
