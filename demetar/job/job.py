"""The processes of a job: how they start, agree and end together.

The only module that knows `jax.distributed`. A job of one process is the same code with
nobody to wait for.

    with join_job(place, workdir, config.cluster) as job:   finds the others, watches them
        ... data, model ...
        job.agree(facts)                 all have the same config, code, data, plan, checkpoint
        ... training; job.interruption.requested, job.watch.phase(...) ...
                                         leaves with everyone, or says why not

A reader, a measurement or a test, which nobody watches or stops, is `Job.alone()`.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import socket
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import ml_collections

# Its key-value store and barriers have no public name. The plain form, `multihost_utils`, is
# collectives of the devices: they compile, they hang where a process is lost, and no time limit
# ends them.
from jax._src import distributed

from data_pipelines.errors import UserError, machine_fault
from data_pipelines.json_text import json_text
from demetar.exits import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR, Preempted
from demetar.job import failures
from demetar.job.abort import on_abort
from demetar.job.agreement import odd_one_out
from demetar.job.place import Place
from demetar.job.signals import Interruption
from demetar.job.watch import UNWATCHED, Unwatched, Watch
from demetar.records import log

_JAX_HEARTBEAT = 600  # seconds of silence that JAX bears at least


class Job:
    """One process's part in a job.

    Attributes:
      process: number of this one.
      count: of all.
      source: what said so.
      interruption: whether this process was asked to stop.
      watch: tells the others what this one does; `UNWATCHED` until it has appeared.
      attempt: name of this start, the same on all processes.
      background: one thread for what may run beside the steps; what it has not begun when the
        job ends, however it ends, is given up.
    """

    def __init__(
        self, place: Place, workdir: pathlib.Path | None, config: ml_collections.ConfigDict | None
    ):
        self._place, self._workdir, self._config = place, workdir, config
        self.source, self.process, self.count = place.source, place.process, place.count
        self.attempt = f"{time.time_ns()}"
        self.watch: Watch | Unwatched = UNWATCHED
        self.background = concurrent.futures.ThreadPoolExecutor(1, "background")
        self.interruption = Interruption(self._leave_at_once)

    @classmethod
    def alone(cls) -> "Job":
        """The job of one process that nobody watches, waits for or asks to stop."""
        return cls(Place("one process"), None, None)

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which alone writes what is shared."""
        return self.process == 0

    # --- starting -------------------------------------------------------------------------------

    def appear(self) -> None:
        """Hears signals, and becomes visible to the others in the workdir."""
        config = self._config
        self.interruption.install()
        if self.process is None:  # only JAX can tell who we are
            self._initialize()
            state = distributed.global_state
            self.process, self.count = state.process_id, state.num_processes
        self.watch = Watch(
            self._workdir, self.process, self.count, config.lost_seconds, config.stuck_seconds
        )
        log.open_log(self._workdir, self.process, self.count)

    def meet(self) -> None:
        """Waits for the others, and checks that all see one workdir."""
        if self.count == 1:
            return
        on_abort(self._jax_gave_up)
        if not jax.distributed.is_initialized():
            self._initialize()
        self._check_workdir()

    def _initialize(self) -> None:
        place, config = self._place, self._config
        if place.process == 0 and place.coordinator:
            _check_port(place.coordinator)
        # It would take SIGTERM for itself; our steps agree on stopping, whatever the signal.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.process,
            cluster_detection_method=place.method,
            initialization_timeout=config.start_seconds,
            # Ours names the process, so it should be the first to speak; and JAX's ends a job that
            # was only stopped as a whole for longer than this, as a machine that sleeps is.
            heartbeat_timeout_seconds=max(_JAX_HEARTBEAT, int(config.lost_seconds * 1.5) + 5),
            shutdown_timeout_seconds=10,
        )

    def _check_workdir(self) -> None:
        """All must see one folder: checkpoints are written together, and heartbeats read."""
        if self.is_main:
            self._client.key_value_set("demetar/attempt", self.attempt)
            self._client.key_value_set("demetar/workdir", f"{self._workdir.absolute()}")
        self.attempt = self._get("demetar/attempt")
        token = self._workdir / "processes" / f"attempt-{self.attempt}"
        if self.is_main:
            for old in token.parent.glob("attempt-*"):  # of earlier starts
                old.unlink(missing_ok=True)
            token.touch()
            self._client.key_value_set("demetar/token", "written")
        self._get("demetar/token")
        deadline = time.monotonic() + 30  # shared filesystems show new files late
        while not token.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"The workdir {self._workdir.absolute()} on host {socket.gethostname()} is "
                    f"not the folder {self._get('demetar/workdir')} of process 0: all "
                    "processes need one --workdir on a shared filesystem."
                )
            list(token.parent.iterdir())  # makes NFS look again
            time.sleep(0.2)
        self.barrier("workdir")
        self.watch.all_started()

    def agree(self, facts: dict) -> None:
        """Compares `facts` over all processes, and names the odd one out.

        Afterwards a signal no longer ends a process by itself: all stop together.

        Args:
          facts: name -> JSON; config, data passport, code, batch plan, checkpoint.
        """
        if self.count > 1:
            self._client.key_value_set(f"demetar/facts/{self.process}", json_text(facts))
            if self.is_main:
                told = [json.loads(self._get(f"demetar/facts/{n}")) for n in range(self.count)]
                self._client.key_value_set("demetar/verdict", odd_one_out(told))
            verdict = self._get("demetar/verdict")
            if verdict:
                raise UserError(verdict)
        self.interruption.defer()

    @property
    def _client(self):
        return distributed.global_state.client

    def _get(self, key: str) -> str:
        """What was said under `key`; the watch ends the wait if who should say it is lost."""
        while True:
            try:
                return self._client.blocking_key_value_get(key, 2_000)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    # --- ending ---------------------------------------------------------------------------------

    def barrier(self, name: str) -> None:
        """Returns when all processes have come here; the watch ends the wait if one is lost."""
        if self.count > 1:
            self._client.wait_at_barrier(f"demetar/{name}", 86_400_000)

    def decide(self, name: str, value: bool) -> bool:
        """Process 0's value, on all: files may not look the same from every machine."""
        if self.count == 1:
            return value
        if self.is_main:
            self._client.key_value_set(f"demetar/{name}", json_text(value))
        return json.loads(self._get(f"demetar/{name}"))

    def finish(self, how: str, code: int) -> None:
        """Leaves together: no process says that it is done before all are."""
        self.watch.phase("end")
        self.barrier(f"end-{how}")
        self.watch.end(how, code)
        if self.count > 1:
            if self.is_main:
                self.watch.wait_to_be_heard()  # the others disconnect before the coordinator goes
            jax.distributed.shutdown()

    def fail(self, error: BaseException) -> int:
        """Says why, counts it, and tells the others; returns the exit code.

        An error that may come from a process that is gone waits until the watch could tell.
        """
        if self.count > 1 and _may_be_a_lost_process(error):
            self.watch.wait_for_verdict()
        if isinstance(error, UserError):
            log.complain(f"error: {error}")
            code = error.exit_code
        elif message := machine_fault(error, self._workdir):
            log.complain(f"error: {message}")
            code = EXIT_USER_ERROR
        else:
            log.complain("".join(traceback.format_exception(error)))
            code = EXIT_FAILED
        if code == EXIT_FAILED:
            code = failures.count_failure(
                self._workdir, self.attempt, self.process, self.watch.step, error
            )
        self.watch.end(f"{type(error).__name__}: {error}", code)
        self.watch.wait_to_be_heard()
        return code

    def check_progress(self, step: int) -> None:
        """Refuses to go on from `step` to one at which the run has failed three times."""
        if self._workdir is not None:
            failures.check_progress(self._workdir, step)

    def _leave_at_once(self, message: str) -> None:
        log.complain(f"{message} The same command goes on from there.")
        self.watch.end("preempted", EXIT_PREEMPTED)
        self.watch.wait_to_be_heard()
        os._exit(EXIT_PREEMPTED)

    def _jax_gave_up(self) -> None:
        """Called before abort(), which is how JAX ends a process whose coordinator is gone.

        Ends the process with the name of the one that is lost. Returns if none is: then the
        abort was for another reason, and takes its course.
        """
        if self.watch.ended is not None:
            os._exit(self.watch.ended[1])  # all was done
        if not self.watch.started:
            time.sleep(1)  # who is there may not have been seen yet
            missing = ", ".join(map(str, self.watch.missing()))
            self.watch.leave(
                f"Waited {self._config.start_seconds} s (config.cluster.start_seconds) for all "
                f"{self.count} processes; missing: {missing or 'none, now'}. Look at their logs, "
                "or at the coordinator's address."
            )
        self.watch.wait_for_verdict()
        self.watch.dump_stacks()


@contextlib.contextmanager
def join_job(
    place: Place, workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> Iterator[Job]:
    """Joins a job, and leaves it with the exit code that the end deserves.

    Args:
      place: of `find_place`.
      workdir: of the run, shared by all processes.
      config: the group `cluster`.
    """
    job = Job(place, workdir, config)
    job.appear()  # an error before that has nobody to be told but the caller
    try:
        job.meet()
        how, code = "done", EXIT_DONE
        try:
            yield job
        except Preempted as stop:
            log.say(f"{stop} The same command goes on from there.")
            how, code = "preempted", EXIT_PREEMPTED
        job.finish(how, code)
        if code == EXIT_DONE:
            return
    except BaseException as error:
        code = job.fail(error)
    finally:
        job.background.shutdown(wait=False, cancel_futures=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # sys.exit would wait in a barrier of JAX for those that are gone, and for what compiles.
    os._exit(code)


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"The port of --coordinator_address {coordinator} cannot be used here: "
                f"{error.strerror}. Choose another, the same for all processes."
            ) from error


def _may_be_a_lost_process(error: BaseException) -> bool:
    """Whether an error may come from a process that is gone.

    Libraries raise it as all kinds of errors, so their words decide. The plain form, to wait for
    the watch after every error, would leave the others in a collective with a process that has
    failed by itself; they then fail first, of that, and the cause is told last.
    """
    while isinstance(error, UserError):  # our own words say nothing; what it was raised from may
        error = error.__cause__
    text = str(error).lower()
    return any(
        word in text
        for word in ("gloo", "nccl", "peer", "connection", "unavailable", "barrier", "heartbeat")
    )
