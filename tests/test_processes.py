"""Jobs of several real processes over gloo: elastic resume, faults, signals, disagreement."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, load_module

from data_pipelines.errors import UserError
from demetar.exits import (
    EXIT_FAILED,
    EXIT_LOST,
    EXIT_NO_PROGRESS,
    EXIT_USER_ERROR,
    NoProgress,
)
from demetar.job.agreement import odd_one_out
from demetar.job.failures import check_progress, count_failure
from demetar.job.job import Job
from demetar.job.place import Place, find_place, numbered
from demetar.records.files import read_json, read_jsonl
from demetar.records.graph_log import read_graph_log
from demetar.tools.faults.bench import HOOK
from demetar.tools.local_job import LocalJob, exit_code_of
from demetar.tools.resume_check import compare, latest_step, logged_step
from demetar.training.checkpoints import Checkpoints

SMALLEST = "nbody.py:smoke,linear"  # for what asks nothing of the model
DIVISIBLE = "nbody.py:smoke,set_transformer"  # the smallest that the axis `model` divides
MODEL = "qm9.py:smoke"
ONE_LAYER = ["--config.model.edge_layers=0", "--config.model.node_layers=0"]


@pytest.fixture
def start(runner, monkeypatch):
    """Starts a job of `count` processes; kills what a test leaves."""
    monkeypatch.chdir(REPOSITORY)
    for name, value in runner.environment().items():
        monkeypatch.setenv(name, value)
    jobs = []

    def start(workdir, count=2, *more, fault="", config=SMALLEST):
        monkeypatch.setenv("DEMETAR_FAULT", fault)
        monkeypatch.setenv("PYTHONPATH", str(HOOK) if fault else "")
        arguments = [
            f"--workdir={workdir}",
            *runner.flags(config),
            "--config.mesh.cpu_devices=1",
            "--config.log.graphs=True",
            "--config.cluster.lost_seconds=5",
            "--config.cluster.stuck_seconds=8",
        ]
        jobs.append(LocalJob([*arguments, *more], count, quiet=True))
        return jobs[-1]

    yield start
    for job in jobs:
        job.signal(signal.SIGKILL)


def run(job, code=0):
    found = job.wait()
    said = "".join(job.tail(n) for n in range(len(job.processes)))
    assert found == code, said
    return said


def log_of(workdir, process):
    return (workdir / "logs" / f"process-{process}.log").read_text()


def codes(job):
    return [p.returncode for p in job.processes]


def wait_until(job, condition):
    """Until `condition()`; all processes must run as long."""
    while not condition():
        assert all(p.poll() is None for p in job.processes), job.tail(0)
        time.sleep(0.02)


# --- the same run on any number of processes and devices -----------------------------------------

ELASTIC = load_module(REPOSITORY / "benchmarks" / "elastic.py")


@pytest.mark.parametrize(
    "before, count",
    [(("1x8",), 2), pytest.param(("1x1", "1x8", "2x2"), 4, marks=pytest.mark.slow)],
)
def test_one_run_on_several_topologies(start, tmp_path, before, count):
    """Processes x devices, in float64: 1x1 alone; and 1x8 -> 2x1, or 1x1 -> 1x8 -> 2x2 -> 4x1.

    With another mesh each time; at last the state is divided over the processes.
    """
    same = [*ONE_LAYER, "--config.model.dtype=float64", "--config.checkpoint.every_steps=10"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    parts = [ELASTIC.arguments_on(name) for name in before]
    parts.append(([f"--config.mesh.fsdp={count}"], count))
    undisturbed = start(whole, 1, *same, config=MODEL)  # beside the first part of the other
    for number, (mesh, processes) in enumerate(parts, 1):
        stop_at = 40 * number // len(parts) if number < len(parts) else 0
        flags = [*same, *mesh, f"--config.checkpoint.stop_at={stop_at}"]
        run(start(moved, processes, *flags, config=MODEL), code=75 if stop_at else 0)
    run(undisturbed)
    with jax.enable_x64(True):
        found = compare(whole, moved, 40)
    assert found.is_good(same_topology=False), found
    assert read_graph_log(moved) == read_graph_log(whole)
    first, second = (read_json(w / "result.json") for w in (whole, moved))
    assert second["count"] == 50 and second["processes"] == count
    np.testing.assert_allclose(
        second["targets"]["homo"]["mae"], first["targets"]["homo"]["mae"], rtol=1e-10
    )
    rows = [
        line["rows"]
        for p in range(count)
        for line in read_jsonl(moved / f"graph_log/{p}.jsonl")
        if line["step"] == 40
    ]
    assert sorted(sum(rows, [])) == sorted(set(sum(rows, [])))  # no process loads another's rows


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_matrix(tmp_path):
    """Saved on each topology, resumed on each; about 15 minutes on two cores."""
    command = [sys.executable, ELASTIC.__file__, f"--json={tmp_path / 'matrix.json'}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    assert len(read_json(tmp_path / "matrix.json")["rows"]) == 32


# --- processes that are lost, stopped, hang or fail ----------------------------------------------


@pytest.mark.parametrize(
    "victim, name, says",
    [
        (1, "SIGKILL", "Process 1 of 2"),
        pytest.param(0, "SIGKILL", "Process 0 of 2", marks=pytest.mark.slow),
        pytest.param(1, "SIGSTOP", "Process 1 of 2", marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_is_named_and_ends_the_others(start, tmp_path, victim, name, says):
    job = start(tmp_path, fault=f"{victim}:batch:7:{name}")
    other = job.processes[1 - victim]
    while logged_step(tmp_path) < 6:
        assert other.poll() is None, job.tail(1 - victim)
        time.sleep(0.05)
    began = time.monotonic()
    assert other.wait(timeout=60) == EXIT_LOST
    assert time.monotonic() - began < 20
    job.signal(signal.SIGKILL)
    assert job.wait() == EXIT_LOST
    said = log_of(tmp_path, 1 - victim)
    assert says in said and "lost" in said
    assert "Thread" in said  # its stacks
    assert not (tmp_path / "failures.jsonl").exists()  # being killed is no failure


@pytest.mark.parametrize(
    "count, lost, stuck, seconds", [(1, 2, 2, 6), pytest.param(2, 5, 8, 8, marks=pytest.mark.slow)]
)
def test_a_job_that_is_stopped_as_a_whole_goes_on(start, tmp_path, count, lost, stuck, seconds):
    """Ctrl-Z and `fg`, or a machine that sleeps: for longer than anyone may be silent."""
    bounds = [f"--config.cluster.lost_seconds={lost}", f"--config.cluster.stuck_seconds={stuck}"]
    job = start(tmp_path, count, *bounds, "--config.train.num_steps=30000")
    wait_until(job, lambda: logged_step(tmp_path) >= 6)
    job.signal(signal.SIGSTOP)
    time.sleep(seconds)
    stopped_at = logged_step(tmp_path)
    job.signal(signal.SIGCONT)
    wait_until(job, lambda: logged_step(tmp_path) >= stopped_at + 20)
    time.sleep(2)  # for a watch that would take it for lost now
    job.signal(signal.SIGTERM)
    run(job, code=75)


@pytest.mark.parametrize("action", ["sleep", pytest.param("hold", marks=pytest.mark.slow)])
def test_a_process_that_hangs_is_found(start, tmp_path, action):
    job = start(tmp_path, fault=f"1:batch:7:{action}")
    assert job.wait() == EXIT_LOST
    assert codes(job)[0] == EXIT_LOST
    said = log_of(tmp_path, 0)
    assert "process 1 is stuck" in said if action == "sleep" else "Process 1 of 2" in said
    assert "sitecustomize.py" in log_of(tmp_path, 1)  # its stacks show where


def test_an_exception_in_one_process_ends_all(start, tmp_path):
    job = start(tmp_path, fault="1:batch:7:raise")
    said = run(job, 1)
    assert codes(job) == [1, 1], said
    assert "Process 1 of 2" in log_of(tmp_path, 0)
    assert "a bug in the loader" in log_of(tmp_path, 0)
    assert len(read_jsonl(tmp_path / "failures.jsonl")) == 1


@pytest.mark.parametrize("step, last", [(5, 0), pytest.param(10, 5, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_one_process_alone_ends_all(start, tmp_path, step, last):
    """Its others wait for its part of the save: it says at once that there will be none.

    The first save is waited for at once, to be proven; the others at the next one.
    """
    job = start(tmp_path, 2, fault=f"1:save:{step}:unwritable")
    said = run(job, EXIT_USER_ERROR)
    assert codes(job) == [EXIT_USER_ERROR] * 2, said
    said = log_of(tmp_path, 1)  # the thread of Orbax prints its own traceback beside
    assert "No space left" in said and "Free some space" in said
    assert latest_step(tmp_path) == last and not (tmp_path / "failures.jsonl").exists()


@pytest.mark.parametrize("step, last", [(10, 5), pytest.param(5, 0, marks=pytest.mark.slow)])
def test_a_save_that_cannot_be_given_its_name_ends_all(start, tmp_path, step, last):
    """Its other process waits at another barrier of Orbax than the one that has failed."""
    job = start(tmp_path, 2, fault=f"0:os.rename:checkpoints/{step}.orbax:full")
    said = run(job, EXIT_USER_ERROR)
    assert codes(job) == [EXIT_USER_ERROR] * 2, said
    assert "No space left" in log_of(tmp_path, 0)
    assert latest_step(tmp_path) == last and not (tmp_path / "failures.jsonl").exists()


@pytest.mark.slow
def test_a_first_save_that_one_process_cannot_read_ends_all(start, tmp_path):
    said = run(start(tmp_path, 2, fault="1:save:5:unreadable"), EXIT_FAILED)
    assert f"first checkpoint of this run, {tmp_path}/checkpoints/5, cannot be restored" in said
    assert "Input/output error" in said and "Traceback" not in said
    assert "Process 1 of 2" in log_of(tmp_path, 0)
    assert latest_step(tmp_path) == 0  # no start relies on it
    run(start(tmp_path, 2))
    assert "starts at step 0" in log_of(tmp_path, 0).split("is not whole")[1]


def test_three_failures_at_one_step_are_enough(start, tmp_path):
    file = tmp_path / "failures.jsonl"
    said = run(start(tmp_path, 1, fault="0:batch:7:raise"), 1)
    assert "a bug in the loader" in said and "Traceback" in said
    [line] = read_jsonl(file)
    assert count_failure(tmp_path, "another start", 0, line["step"], RuntimeError()) == EXIT_FAILED
    run(start(tmp_path, 1, fault="0:batch:7:raise"), EXIT_NO_PROGRESS)
    assert len(read_jsonl(file)) == 3
    said = run(start(tmp_path, 1), EXIT_NO_PROGRESS)
    assert "failed 3 times at step 7" in said and "failures.jsonl" in said
    check_progress(tmp_path, 8)  # it got past that step
    with pytest.raises(NoProgress, match="at last with: RuntimeError: a bug in the loader"):
        check_progress(tmp_path, 5)
    file.unlink()
    check_progress(tmp_path, 5)


def test_processes_that_fail_in_one_start_count_once(tmp_path):
    fail = lambda attempt, process, step: count_failure(
        tmp_path, attempt, process, step, ValueError("bad")
    )
    assert [fail("first", process, 7) for process in range(4)] == [EXIT_FAILED] * 4
    assert fail("second", 0, 7) == fail("third", 0, 8) == EXIT_FAILED
    check_progress(tmp_path, 0)
    assert fail("fourth", 1, 7) == EXIT_NO_PROGRESS


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_signal_to_one_process_in_any_phase(start, tmp_path):
    """Each phase in turn on one run; at the end it is the run that nobody disturbed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(start(whole, 2))
    for process, phase, step, name in (
        (1, "data", 0, "SIGTERM"),
        (0, "compile", 0, "SIGUSR1"),
        (1, "step", 8, "SIGTERM"),
        (1, "evaluation of validation", 20, "SIGINT"),
        (0, "save", 30, "SIGTERM"),
        (1, "evaluation of test", 40, "SIGUSR1"),
    ):
        before = latest_step(broken)
        job = start(broken, 2, fault=f"{process}:{phase}:{step}:{name}")
        said = run(job, code=75)
        assert codes(job) == [75, 75], said
        assert "Traceback" not in said and not (broken / "result.json").exists()
        if phase == "data":
            assert latest_step(broken) == 0
        else:
            assert latest_step(broken) > before or before == 40
            assert f"after step {latest_step(broken)} of 40" in log_of(broken, 0)
    run(start(broken, 2))
    first, second = (read_json(w / "result.json") for w in (whole, broken))
    assert second["state_sha256"] == first["state_sha256"]
    assert second["targets"] == first["targets"]
    assert read_graph_log(broken) == read_graph_log(whole)
    assert (broken / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_a_second_signal_ends_at_once_and_a_second_job_is_refused(start, tmp_path):
    """Of a process that cannot finish its step; said twice at once is said once."""
    job = start(tmp_path, 1, fault="0:batch:12:sleep")
    wait_until(job, lambda: logged_step(tmp_path) >= 11)
    said = run(start(tmp_path, 1), code=2)
    assert f"process {job.processes[0].pid} on host {socket.gethostname()}" in said
    job.signal(signal.SIGTERM)
    job.signal(signal.SIGUSR1)
    time.sleep(2.5)
    assert job.processes[0].poll() is None
    job.signal(signal.SIGINT)
    assert job.wait() == 75
    assert "exiting at once" in job.tail(0)
    latest = latest_step(tmp_path)
    assert latest in (5, 10)  # the last may have had no time for its manifest
    assert Checkpoints(tmp_path, 2, Job.alone()).latest_step() == latest  # it is whole
    run(start(tmp_path, 1))
    assert f"resumed at step {latest}" in log_of(tmp_path, 0)


@pytest.mark.parametrize("asked", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_where_processes_share_their_graphs(start, tmp_path, asked):
    """`model` over two processes: both compute all graphs, one alone is asked to stop."""
    mesh = ["--config.mesh.data=1", "--config.mesh.model=2"]
    run(start(tmp_path, 2, *mesh, config=DIVISIBLE, fault=f"{asked}:step:8:SIGTERM"), code=75)
    assert 8 < latest_step(tmp_path) < 14


# --- starting -----------------------------------------------------------------------------------


def on_port(port, count, number):
    """Flags of one process of a job."""
    address = f"--coordinator_address=localhost:{port}"
    return [address, f"--num_processes={count}", f"--process_id={number}"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_a_process_with_another_config_is_named(start, tmp_path):
    port = free_port()
    jobs = [
        start(tmp_path, 1, *on_port(port, 2, n), f"--config.optim.learning_rate={1e-3 * (n + 1)}")
        for n in (0, 1)
    ]
    assert [job.wait() for job in jobs] == [2, 2]
    said = log_of(tmp_path, 0) + log_of(tmp_path, 1)
    assert "Process 1 of 2 differs from the others in its config: optim.learning_rate 0.002" in said
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_process_that_never_comes_is_named(start, tmp_path):
    flags = [*on_port(free_port(), 3, 0), "--config.cluster.start_seconds=3"]
    said = run(start(tmp_path, 1, *flags), EXIT_LOST)
    assert "Waited 3 s" in said and "missing: 1, 2" in said


def test_the_odd_one_out_is_told_with_what_it_has():
    """Three or more: most are right. Nested facts are told by their path."""
    usual = {"config": {"seed": 0, "model": {"width": 8}}, "code": "a"}
    odd = {"config": {"seed": 0, "model": {"width": 9}}, "code": "b"}
    assert odd_one_out([usual, usual]) == ""
    said = odd_one_out([usual, odd, usual])
    assert "Process 1 of 3" in said and "config: model.width 9, elsewhere 8" in said
    said = odd_one_out([usual | {"code": "b"}, usual, usual])
    assert "Process 0 of 3 differs from the others in its code: 'b', elsewhere 'a'" in said


def test_a_library_that_aborts_leaves_time_for_a_last_word():
    """In a thread that is not Python's own, while the main thread never comes back to Python."""
    script = """
import ctypes, os, threading, time
from demetar.job.abort import on_abort
on_abort(lambda: os.write(2, b"the last word"))
threading.Thread(target=ctypes.CDLL(None).abort).start()
ctypes.CDLL(None).sleep(5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT  # abort() took its course
    assert "the last word" in done.stderr


# --- pieces -------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


@pytest.mark.parametrize(
    "environ, source, process, count",
    [
        ({}, "one process", 0, 1),
        (SLURM, "SLURM job 7", 3, 8),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "SLURM job 7, one task", 0, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, "one process", 0, 1),  # a shell, not a step
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI", 1, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "TPU", None, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "one process", 0, 1),  # any pod has it
        (
            SLURM
            | {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            "environment",
            1,
            2,
        ),
        ({"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": ""}, "one process", 0, 1),  # set, but empty
    ],
)
def test_place_of_a_process(environ, source, process, count):
    here = find_place(None, None, None, environ)
    assert (here.source, here.process, here.count) == (source, process, count)


def test_flags_win_and_must_be_complete():
    here = find_place("host:1", 4, 2, SLURM)
    assert (here.source, here.process, here.count, here.method) == ("flags", 2, 4, "deactivate")
    with pytest.raises(UserError, match="--num_processes without --coordinator_address, --process"):
        find_place(None, 4, None, {})
    with pytest.raises(UserError, match="--process_id is 4, but --num_processes is 4"):
        find_place("host:1", 4, 4, {})
    with pytest.raises(UserError, match="must be host:port"):
        find_place("host", 4, 0, {})
    with pytest.raises(UserError, match="launch/jobset.yaml"):
        find_place(None, None, None, {"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"})


def test_only_jax_can_count_the_processes_of_a_tpu():
    here = numbered(Place("TPU", None, None, method=None))
    assert (here.process, here.count) == (0, 1)
    assert numbered(Place("flags", 2, 4)) == Place("flags", 2, 4)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES"):
        numbered(Place("Kubernetes", None, None, method="k8s"))


@pytest.mark.parametrize(
    "codes, job",
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([76, -9], 76),
        ([1, 76], 1),
        ([78, 1], 78),
        ([2, 76], 2),
        ([75, 76], 76),
    ],
)
def test_exit_code_of_a_job(codes, job):
    assert exit_code_of(codes) == job
