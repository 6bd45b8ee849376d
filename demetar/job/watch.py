"""Every process says what it does, and watches that the others still do.

A thread writes `processes/<number>.json` in the workdir about once a second: host, pid, phase,
step and a counter. It reads the files of the other processes, and ends this one, with the
name of the process behind it, when

- another has failed or was asked to stop before there was anything to save;
- another is lost: its counter has stood still for `lost_seconds` (killed, stopped, or its
  machine is gone);
- the job hangs: all are alive, but no phase or step of any has changed for `stuck_seconds`.

Files, not the coordinator of `jax.distributed`: they outlive process 0, can be read by a
person, and serve as heartbeat for Kubernetes (their time of change). This module compares no
clocks of different machines. A process that holds the interpreter's lock for ever cannot watch
itself; `faulthandler` then dumps its stacks, and SIGALRM ends it.
"""

import dataclasses
import faulthandler
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from typing import NoReturn

from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from demetar.exits import EXIT_DONE, EXIT_LOST, EXIT_PREEMPTED
from demetar.job.alarm import cancel_alarm, set_alarm
from demetar.records import log

# These may take as long as they take. Compiling and saving have no sign of life to show.
_UNLIMITED = ("start", "data", "compile", "save", "end")
_GRACE_SECONDS = 5  # for this process to end by itself, once another has ended
_LEASE_SECONDS = 120  # after which a file server forgets the locks of a machine that is gone
_BYTES = 1024  # of a file: fixed, so that a full disk cannot stop a heartbeat


@dataclasses.dataclass
class _Peer:
    """What was read of another process, and when (of this machine's clock) it last changed."""

    text: str
    changed_at: float
    facts: dict
    seen: bool = False  # it has changed since this process began to look


class Unwatched:
    """In the place of a `Watch` where nobody watches: says nothing, waits for nobody."""

    step = 0

    def phase(self, name: str, step: int | None = None) -> None:
        pass

    def end(self, how: str, code: int) -> None:
        pass

    def wait_to_be_heard(self) -> None:
        pass


UNWATCHED = Unwatched()


class Watch:
    """This process's file, and its eyes on those of the others.

    Args:
      workdir: of the run, seen by all processes.
      process: number of this one.
      count: of all.
      lost_seconds: see above.
      stuck_seconds: see above.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        process: int,
        count: int,
        lost_seconds: float,
        stuck_seconds: float,
    ):
        self._folder = workdir / "processes"
        self._process, self._count = process, count
        self._lost_seconds, self._stuck_seconds = lost_seconds, stuck_seconds
        self._facts = {"process": process, "host": socket.gethostname(), "pid": os.getpid()}
        self._phase, self._step, self._beats = "start", 0, 0
        self._ended: tuple[str, int] | None = None  # how, exit code
        self._peers: dict[int, _Peer] = {}
        self.started = False
        self._progress, self._progress_at = None, time.monotonic()
        self._looked_at = self._progress_at
        self._lock = threading.Lock()
        self._file = self._own_file()
        self._read_peers()  # what an earlier start left: whatever changes from now on is alive
        self._stacks = (workdir / "logs" / f"process-{process}.log").open("a")
        faulthandler.enable(self._stacks)
        self._beat()
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    # --- what this process says -----------------------------------------------------------------

    @property
    def step(self) -> int:
        return self._step

    def phase(self, name: str, step: int | None = None) -> None:
        """What this process does from now on."""
        self._phase = name
        if step is not None:
            self._step = step

    def all_started(self) -> None:
        """Every process is known to run: from now on silence means that it is lost."""
        self._look_anew()
        self.started = True

    def _look_anew(self) -> None:
        """What was silent so far says nothing: everyone has all the time again."""
        now = time.monotonic()
        self._progress_at = now
        for peer in self._peers.values():
            peer.changed_at = now

    def end(self, how: str, code: int) -> None:
        """The last word: `done`, `preempted`, or what failed. Others follow it."""
        self._ended = (how, code)
        self._beat()
        self._disarm()

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        cancel_alarm()

    def wait_to_be_heard(self) -> None:
        """Gives the others the time to read the last word, before process 0 takes the coordinator
        of `jax.distributed` down with it."""
        if self._count > 1:
            time.sleep(3 * self._interval)

    # --- what it sees ---------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """Processes that have not shown themselves since this one began to look."""
        return [number for number, peer in self._peers.items() if not peer.seen]

    @property
    def ended(self) -> tuple[str, int] | None:
        """The last word and the exit code, once said."""
        return self._ended

    def wait_for_verdict(self) -> None:
        """Waits while the thread may still find out that another process is behind an error."""
        time.sleep(self._lost_seconds + 3 * self._interval)

    @property
    def _interval(self) -> float:
        return min(1.0, self._lost_seconds / 10)

    def _own_file(self):
        """Opens and locks this process's file: two jobs in one workdir would ruin it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder.parent / "logs").mkdir(exist_ok=True)
            path = self._folder / f"{self._process}.json"
            path.touch()
            # Written through: other machines see it, not only this one's cache.
            number = os.open(path, os.O_RDWR | getattr(os, "O_DSYNC", 0))
            file = os.fdopen(number, "r+b", buffering=0)
            self._lock_own_file(file, path)
        except OSError as error:
            raise UserError(
                f"The workdir {self._folder.parent} cannot be written: {error}. Choose another "
                "--workdir."
            ) from error
        return file

    def _lock_own_file(self, file, path: pathlib.Path) -> None:
        """Refuses a folder that a living process has; a dead machine's lock is waited for."""
        seen, deadline = path.read_text(), time.monotonic() + _LEASE_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                text = path.read_text()
                if text == seen and time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                other = _parse(text)
                raise UserError(
                    f"Another job works in {self._folder.parent}: process {other.get('pid')} on "
                    f"host {other.get('host')}. Wait for it, stop it, or choose another --workdir."
                ) from error
            except OSError as error:
                log.say(
                    f"{self._folder.parent} has no file locks ({error.strerror}): nothing keeps "
                    "another job out of this workdir."
                )
                return

    def _beat(self) -> None:
        with self._lock:
            self._beats += 1
            facts = self._facts | {"phase": self._phase, "step": self._step, "beat": self._beats}
            if self._ended is not None:
                how, code = self._ended
                facts |= {"ended": how[: _BYTES // 3], "code": code}
            try:
                os.pwrite(self._file.fileno(), json_text(facts).ljust(_BYTES - 1).encode(), 0)
            except OSError:
                pass  # the next one may succeed; silence is what the others act on

    def _read_peers(self) -> None:
        now = time.monotonic()
        for number in set(range(self._count)) - {self._process}:
            try:
                text = (self._folder / f"{number}.json").read_text()
            except OSError:
                text = ""
            peer = self._peers.get(number)
            if peer is None:
                self._peers[number] = _Peer(text, now, _parse(text))
            elif text != peer.text and _parse(text):
                self._peers[number] = _Peer(text, now, _parse(text), seen=True)

    def _run(self) -> None:
        while True:
            time.sleep(self._interval)
            if self._ended is not None:
                return
            # For a process that cannot run this thread any more: stacks, then SIGALRM, which
            # ends it as lost, not as failed.
            patience = self._stuck_seconds + self._lost_seconds
            faulthandler.dump_traceback_later(patience, file=self._stacks)
            set_alarm(patience + 1)
            if self._ended is not None:
                self._disarm()
                return
            self._beat()
            self._read_peers()
            now = time.monotonic()
            if now - self._looked_at > self._lost_seconds / 2:
                # This process was stopped itself, maybe with all others: it heard nobody.
                self._look_anew()
            self._looked_at = now
            self._judge()

    def _judge(self) -> None:
        now = time.monotonic()
        for number, peer in self._peers.items():
            silent = now - peer.changed_at
            if "ended" in peer.facts:
                if peer.seen and peer.facts["code"] != EXIT_DONE and silent > _GRACE_SECONDS:
                    self.leave(self._about_ended(number, peer), peer.facts["code"])
            elif (self.started or peer.seen) and silent > self._lost_seconds:
                self.leave(f"{self._about(number, peer)} is lost: silent for {silent:.0f} s.")
        own = {"phase": self._phase, "step": self._step}
        everyone = {self._process: own} | {n: p.facts for n, p in self._peers.items()}
        progress = {n: (f.get("phase"), f.get("step")) for n, f in everyone.items()}
        if progress != self._progress:
            self._progress, self._progress_at = progress, now
        unlimited = any(phase.split()[0] in _UNLIMITED for phase, _ in progress.values() if phase)
        waited = now - self._progress_at
        if self.started and not unlimited and waited > self._stuck_seconds:
            lines = [f"  process {n}: {phase}, step {s}" for n, (phase, s) in progress.items()]
            # The others wait for it in a collective; it is not there yet.
            suspect = min(progress, key=lambda n: (progress[n][1], progress[n][0] == "step"))
            self.leave(
                f"The job hangs: no process has got on for {waited:.0f} s. Most likely process "
                f"{suspect} is stuck; its log holds the stacks.\n" + "\n".join(lines)
            )

    def _about(self, number: int, peer: _Peer) -> str:
        facts = peer.facts
        return (
            f"Process {number} of {self._count} (host {facts.get('host')}, pid {facts.get('pid')}, "
            f"last in phase {facts.get('phase')!r} of step {facts.get('step')})"
        )

    def _about_ended(self, number: int, peer: _Peer) -> str:
        how = peer.facts["ended"]
        if peer.facts["code"] == EXIT_PREEMPTED:
            return f"{self._about(number, peer)} was asked to stop."
        return f"{self._about(number, peer)} ended: {how}"

    def dump_stacks(self) -> None:
        """Writes what each thread of this process does to its log."""
        faulthandler.dump_traceback(self._stacks, all_threads=True)

    def leave(self, message: str, code: int = EXIT_LOST) -> NoReturn:
        """Ends this process from whatever thread: says why, and leaves its stacks in the log."""
        log.complain(message)
        if code == EXIT_LOST:
            self.dump_stacks()
        self.end("follows another process", code)
        os._exit(code)


def at_work(workdir: pathlib.Path) -> dict:
    """What a living process says that works in `workdir`; {} if there is none. Reads only."""
    folder = workdir / "processes"
    if not os.path.isdir(folder):  # unlike pathlib's, it is False where we may not look
        return {}
    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until it is closed
            continue
        except BlockingIOError:
            return _parse(path.read_text())
        except OSError:  # a filesystem without locks: by its last sign of life
            facts = _parse(path.read_text())
            if "ended" not in facts and time.time() - path.stat().st_mtime < _LEASE_SECONDS:
                return facts
    return {}


def _parse(text: str) -> dict:
    try:
        return json.loads(text)
    except ValueError:
        return {}  # read while it was written
