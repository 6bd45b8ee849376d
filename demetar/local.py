"""Several processes on this one machine: one for each GPU, or any number on its CPU.

    python -m demetar.local --gpus=8 --config=configs/qm9.py [...]
    python -m demetar.local --cpu=2 --config=configs/qm9.py:quick [...]

Everything else goes to `python -m demetar.main`. Prefixes each line with the number of its
process, forwards signals, prints the end of the first failing process's output last, and
exits with the code that matters most. `--restarts=N` starts again after being preempted or
losing a process, N times at most.
"""

import argparse
import collections
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from demetar.exits import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_LOST,
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
)

_TAIL = 30
# The first of these that any process ended with is the job's; a signal counts as lost.
_WEIGHT = (EXIT_NO_PROGRESS, EXIT_USER_ERROR, EXIT_FAILED, EXIT_LOST, EXIT_PREEMPTED, EXIT_DONE)


class LocalJob:
    """Running processes of one job.

    Args:
      arguments: of `python -m demetar.main`.
      count: how many processes.
      gpus: each gets the GPU of its number, and sees all; otherwise they share the CPU's cores.
      quiet: keep what they print instead of showing it.
    """

    def __init__(self, arguments: list[str], count: int, *, gpus: bool = False, quiet=False):
        address = f"localhost:{_free_port()}"
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.processes, self._tails, self._readers = [], [], []
        self.first_to_fail: int | None = None
        for number in range(count):
            # Also for one process: on a machine of a cluster it must not look for others.
            place = [f"--coordinator_address={address}", f"--num_processes={count}"]
            command = [sys.executable, "-m", "demetar.main", *place, f"--process_id={number}"]
            command += arguments  # the caller's own place, if any, wins
            if not gpus:
                more = {"JAX_PLATFORMS": "cpu"}
            elif count == 1:
                more = {"CUDA_VISIBLE_DEVICES": "0"}
            else:
                more = {"JAX_LOCAL_DEVICE_IDS": str(number)}
            environment = os.environ | more
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is forwarded, once, not sent by the terminal too
            )
            if not gpus and count > 1 and len(cores) >= count:
                # Equal shares: threads of one process would otherwise take turns with the others'.
                share = len(cores) // count
                os.sched_setaffinity(process.pid, cores[number * share : (number + 1) * share])
            tail = collections.deque(maxlen=_TAIL)
            prefix = f"[{number}] " if count > 1 else ""
            reader = threading.Thread(
                target=_copy, args=(process.stdout, tail, None if quiet else prefix), daemon=True
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _copy(stream, tail: collections.deque, prefix: str | None) -> None:
    for line in stream:
        tail.append(line)
        if prefix is not None:
            sys.stderr.write(prefix + line)
            sys.stderr.flush()


def main(arguments: list[str]) -> int:
    """Runs the job, again where asked; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="demetar.local", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--gpus", type=int, metavar="N", help="one process for each of N GPUs")
    kind.add_argument("--cpu", type=int, metavar="N", help="N processes on the CPU")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="start again so often")
    options, rest = parser.parse_known_args(arguments)
    asked_to_stop, job = [], None

    def forward(number, frame):
        asked_to_stop.append(number)
        if job is not None:
            job.signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, forward)
    while True:
        job = LocalJob(rest, options.gpus or options.cpu, gpus=bool(options.gpus))
        if asked_to_stop:  # while it was being started
            job.signal(signal.SIGTERM)
        code = job.wait()
        if code in (EXIT_PREEMPTED, EXIT_LOST) and options.restarts > 0 and not asked_to_stop:
            options.restarts -= 1
            print(f"Ended with code {code}; starting again.", file=sys.stderr)
            continue
        if code and len(job.processes) > 1:
            print(f"--- process {job.first_to_fail} was the first to end, with:", file=sys.stderr)
            print(job.tail(job.first_to_fail), file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
