"""Several processes of one job on this machine: started, watched over, ended."""

import collections
import glob
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from data_pipelines.cores import usable_cores
from data_pipelines.errors import UserError
from demetar.exits import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_LOST,
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
)

_GPUS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")  # of NVIDIA, AMD, and inside of Windows
_TAIL = 30
# The first of these that any process ended with is the job's; a signal counts as lost.
_WEIGHT = (EXIT_NO_PROGRESS, EXIT_USER_ERROR, EXIT_FAILED, EXIT_LOST, EXIT_PREEMPTED, EXIT_DONE)


class LocalJob:
    """Running processes of one job.

    Attributes:
      processes: of the job, by number.
      first_to_fail: number of the process that ended first with another code than 0; None if none.

    Args:
      arguments: of `python -m demetar.main`.
      count: how many processes.
      gpus: each gets the GPU of its number, and sees all; otherwise they share the CPU's cores.
      quiet: keep what they print instead of showing it.
      prefix: words before the command of each process, as `strace ...`.
      environment: variables of the processes, beside those of this one.
    """

    def __init__(
        self,
        arguments: list[str],
        count: int,
        *,
        gpus: bool = False,
        quiet: bool = False,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        address = f"localhost:{_free_port()}"
        self.processes: list[subprocess.Popen] = []
        self.first_to_fail: int | None = None
        self._tails, self._readers = [], []
        for number in range(count):
            # Also for one process: on a machine of a cluster it must not look for others.
            flags = [f"--coordinator_address={address}", f"--num_processes={count}"]
            flags += [f"--process_id={number}", *arguments]  # the caller's own, if any, win
            process = _start(flags, number, count, gpus, prefix, environment or {})
            tail = collections.deque(maxlen=_TAIL)
            mark = f"[{number}] " if count > 1 else ""
            reader = threading.Thread(
                target=_copy, args=(process.stdout, tail, None if quiet else mark), daemon=True
            )
            reader.start()
            self.processes.append(process)
            self._tails.append(tail)
            self._readers.append(reader)

    def signal(self, number: int, process: int | None = None) -> None:
        """Sends a signal to one process, or to all."""
        for n, child in enumerate(self.processes):
            if process in (None, n) and child.poll() is None:
                child.send_signal(number)

    def wait(self, patience: float = 120.0) -> int:
        """Waits for all; kills those left `patience` seconds after one has ended otherwise.

        Returns:
          The exit code of the job.
        """
        deadline = None
        while any(child.poll() is None for child in self.processes):
            failed = [n for n, p in enumerate(self.processes) if p.poll() not in (None, 0)]
            if failed and deadline is None:
                self.first_to_fail = failed[0]
                deadline = time.monotonic() + patience
            if deadline is not None and time.monotonic() > deadline:
                self.signal(signal.SIGKILL)  # a stopped process, say: nothing else reaches it
            time.sleep(0.05)
        for reader in self._readers:
            reader.join(timeout=10)
        codes = [child.returncode for child in self.processes]
        if self.first_to_fail is None:
            self.first_to_fail = next((n for n, code in enumerate(codes) if code), None)
        return exit_code_of(codes)

    def tail(self, process: int) -> str:
        """The last lines that a process printed."""
        return "".join(self._tails[process])


def exit_code_of(codes: list[int]) -> int:
    """The exit code that a job's processes amount to; killed by a signal is lost."""
    known = [code if code in _WEIGHT else EXIT_LOST if code < 0 else EXIT_FAILED for code in codes]
    return min(known, key=_WEIGHT.index)


def run(arguments: list[str], count: int, *, gpus: bool = False, restarts: int = 0) -> int:
    """Runs a job and forwards signals to it; starts it again where it was preempted or lost.

    Args:
      arguments: of `python -m demetar.main`.
      count: how many processes.
      gpus: see `LocalJob`.
      restarts: how often to start again. A signal to this process ends that too.

    Returns:
      The exit code of the last job.
    """
    if gpus:
        _check_gpus()
    asked_to_stop, jobs = [], []

    def forward(number, frame):
        asked_to_stop.append(number)
        for job in jobs[-1:]:
            job.signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, forward)
    while True:
        job = LocalJob(arguments, count, gpus=gpus)
        jobs.append(job)
        if asked_to_stop:  # while it was being started
            job.signal(signal.SIGTERM)
        code = job.wait()
        if code in (EXIT_PREEMPTED, EXIT_LOST) and len(jobs) <= restarts and not asked_to_stop:
            print(f"Ended with code {code}; starting again.", file=sys.stderr)
            continue
        if code and count > 1:
            print(f"--- process {job.first_to_fail} was the first to end, with:", file=sys.stderr)
            print(job.tail(job.first_to_fail), file=sys.stderr)
        return code


def _check_gpus() -> None:
    """A `UserError` where the system has no device of a GPU: JAX would train on the CPU."""
    if not any(glob.glob(name) for name in _GPUS):
        raise UserError("--gpus: this machine has no GPU that the system knows: take --cpu=N.")


def _start(
    flags: list[str],
    number: int,
    count: int,
    gpus: bool,
    prefix: Sequence[str],
    environment: Mapping[str, str],
) -> subprocess.Popen:
    if not gpus:
        more = {"JAX_PLATFORMS": "cpu"}
    elif count == 1:
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        more = {"CUDA_VISIBLE_DEVICES": allowed.split(",")[0]}
    else:
        more = {"JAX_LOCAL_DEVICE_IDS": str(number)}
    process = subprocess.Popen(
        # -P: a folder of the place where the user stands must not be taken for a package of ours.
        [*prefix, sys.executable, "-P", "-m", "demetar.main", *flags],
        env=os.environ | more | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is forwarded, once, not sent by the terminal too
    )
    cores = usable_cores() if hasattr(os, "sched_setaffinity") else []
    if not gpus and 1 < count <= len(cores):
        # Equal shares: threads of one process would otherwise take turns with the others'.
        share = len(cores) // count
        os.sched_setaffinity(process.pid, cores[number * share : (number + 1) * share])
    return process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _copy(stream, tail: collections.deque, prefix: str | None) -> None:
    with stream:
        for line in stream:
            tail.append(line)
            if prefix is not None:
                sys.stderr.write(prefix + line)
                sys.stderr.flush()
