"""The commands that prove a resume: what they call the same, what they end with."""

import argparse
import json
import random
import re
import subprocess
import sys
import types

import pytest
from conftest import REPOSITORY, TINY

from data_pipelines.errors import UserError
from demetar import chaos, verify_resume
from demetar.config import command_line
from demetar.config.command_line import load_config
from demetar.exits import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    Preempted,
)
from demetar.job.job import Job
from demetar.tools import local_job
from demetar.tools.fault_kinds import FAULTS
from demetar.tools.local_job import LocalJob
from demetar.tools.random_faults import EXACT, throw
from demetar.tools.resume_check import Comparison, RunFailed, compare, finish
from demetar.train import train_and_evaluate

SMALLEST = "nbody.py:smoke,linear"


def command(runner, module, *arguments, **environment):
    """Starts a command as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments, f"--config.data.cache_dir={runner.cache_dir}"],
        cwd=REPOSITORY,
        env=runner.environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_both_commands_on_runs_that_are_exact(runner):
    """Dropout and bfloat16, compiled as for a user; then faults at drawn moments."""
    flags = ["--config=configs/qm9.py:smoke", *TINY["qm9.py:smoke"], "--config.model.dropout=0.1"]
    flags += ["--config.model.edge_layers=0", "--config.model.node_layers=0"]
    flags += ["--config.model.dtype=bfloat16", "--config.train.eval_every=10", "--steps=8"]
    verifies = command(runner, "demetar.verify_resume", *flags, XLA_FLAGS="")
    flags = [f"--config=configs/{SMALLEST}", "--config.train.num_steps=400", "--steps=400"]
    flags += ["--config.cluster.lost_seconds=5"]
    faults = command(runner, "demetar.chaos", *flags, "--faults=3", "--cpu=1")
    said, errors = verifies.communicate(timeout=280)
    assert verifies.returncode == EXIT_DONE, said + errors
    assert "verdict               EXACT: wanted bit for bit" in said
    said, errors = faults.communicate(timeout=280)
    assert faults.returncode == EXIT_DONE, said + errors
    found = json.loads(said)
    assert found["verdict"] == EXACT and found["same_graphs"] and found["same_state"]
    assert found["not_as_promised"] == [] and sum(found["kinds"].values()) == 3
    assert "nobody watches it" in found["left_out"]["stop"]
    assert all(0 <= fault["newest_whole"] < 400 for fault in found["thrown"])


class EndedJob:
    """Of one process, which has ended with `code` before anything was thrown at it."""

    def __init__(self, code):
        self.processes = [types.SimpleNamespace(poll=lambda: code, returncode=code)]

    wait = signal = lambda self, *_: None


@pytest.mark.parametrize("code", [EXIT_DONE, EXIT_PREEMPTED])
def test_a_run_that_ended_by_itself_is_not_taken_for_killed(code, tmp_path):
    with pytest.raises(UserError, match="ended after 1 faults: choose more --steps"):
        throw(lambda: EndedJob(code), tmp_path, None, list(FAULTS), 3, random.Random(0), 5.0)


def test_a_run_that_fails_without_a_fault_is_not_as_promised(tmp_path):
    start = lambda: EndedJob(EXIT_FAILED)
    [fault], _ = throw(start, tmp_path, None, list(FAULTS), 1, random.Random(0), 5.0)
    assert fault["kind"] == "none" and not fault["as_promised"]
    assert fault["exit_codes"] == [EXIT_FAILED]


# --- what is the same ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(cache_dir, tmp_path_factory):
    """Folders of runs of this process: one, the same stopped and resumed, one of another seed."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, seed=0, stop_at=0):
        overrides = {"data.cache_dir": cache_dir, "seed": seed, "log.graphs": True, "mesh.data": 1}
        overrides |= {"train.num_steps": 12, "train.eval_every": 12, "checkpoint.stop_at": stop_at}
        (folder / name).mkdir(exist_ok=True)
        config = load_config(f"{REPOSITORY}/configs/{SMALLEST}", overrides)
        return train_and_evaluate(config, folder / name, Job.alone())

    train("whole")
    with pytest.raises(
        Preempted, match=r"config.checkpoint.stop_at=7 .*go on\) after step 7 of 12"
    ):
        train("resumed", stop_at=7)
    train("resumed")
    train("other", seed=1)
    return folder


def test_a_run_that_was_stopped_and_resumed_is_the_same(runs):
    found = compare(runs / "whole", runs / "resumed", 12)
    assert found.is_good(same_topology=True) and found.is_good(same_topology=False)
    assert found.same_graphs and found.same_state and found.loss == found.norm == 0.0
    assert "bit for bit the same" in "\n".join(found.lines())


def test_another_seed_is_another_run(runs):
    found = compare(runs / "whole", runs / "other", 12)
    assert not found.same_graphs and not found.same_state and found.norm > 0
    assert not found.is_good(same_topology=True) and not found.is_good(same_topology=False)
    assert found.first_difference.startswith("step 1: [")
    assert "step 1: [" in "\n".join(found.lines())


def test_only_small_differences_pass_elsewhere():
    found = lambda loss, dtype: Comparison(True, "", loss, loss, False, "", dtype)
    assert not found(0.0, "float32").is_good(same_topology=True)
    assert found(9e-6, "float32").is_good(same_topology=False)
    assert not found(2e-5, "float32").is_good(same_topology=False)
    assert not found(9e-6, "float64").is_good(same_topology=False)
    assert not found(0.0, "bfloat16").is_good(same_topology=False)  # nothing is promised


# --- what the commands end with ------------------------------------------------------------------


def test_not_exact_ends_with_1(monkeypatch, capsys):
    differs = Comparison(True, "", 0.5, 0.0, False, "abc", "float32")
    monkeypatch.setattr(verify_resume, "verify", lambda *_: differs)
    assert verify_resume.main(["--config=qm9:smoke"]) == EXIT_FAILED
    assert "NOT EXACT" in capsys.readouterr().out
    monkeypatch.setattr(chaos, "chaos", lambda *_, **__: {"verdict": "DIFFERS"})
    assert chaos.main(["--config=qm9:smoke", "--steps=40"]) == EXIT_FAILED


@pytest.mark.parametrize(
    "main, arguments, message",
    [
        (verify_resume.main, [], "--config"),
        (verify_resume.main, ["--config=qm9:smok"], "no variant 'smok'"),
        (verify_resume.main, ["--config=qm9:smoke", "--resume_mesh=1,2"], "three sizes"),
        (verify_resume.main, ["--config=qm9:smoke", "--steps=0"], "at least 1"),
        (verify_resume.main, ["--config=qm9:smoke", "--steps=30"], "60 steps .*num_steps is 40"),
        (verify_resume.main, ["--config=qm9:smoke", "--stepz=9"], "Did you mean '--steps'"),
        (chaos.main, ["--config=qm9:smoke", "--config.seeed=1"], "config.seed"),
        (chaos.main, ["--config=qm9:smoke"], "200 steps .*num_steps is 40"),
        (chaos.main, ["--config=qm9:smoke", "--faults=0"], "at least 1"),
    ],
)
def test_a_mistake_ends_with_2_before_anything_runs(main, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(local_job.subprocess, "Popen", lambda *_, **__: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == EXIT_USER_ERROR
    assert re.search(message, capsys.readouterr().err)


def test_gpus_that_are_not_there_are_not_replaced(monkeypatch):
    monkeypatch.setattr(local_job, "_GPUS", ("/nowhere/nvidia*",))
    with pytest.raises(UserError, match="this machine has no GPU"):
        local_job.run([], 2, gpus=True)


@pytest.mark.parametrize(("set_to", "found"), [("3,1", "3"), ("", "0")])
def test_a_job_of_one_process_takes_a_gpu_that_it_may_have(set_to, found, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", set_to)
    started = []
    monkeypatch.setattr(
        local_job.subprocess, "Popen", lambda command, env, **_: started.append(env)
    )
    local_job._start([], 0, 1, gpus=True, prefix=(), environment={})
    assert started[0]["CUDA_VISIBLE_DEVICES"] == found


def test_a_run_that_fails_by_itself_gives_the_command_its_code(monkeypatch, capsys):
    class Failed:
        first_to_fail = 1
        wait = lambda self: EXIT_NO_PROGRESS
        tail = lambda self, process: f"the last words of process {process}"

    with pytest.raises(RunFailed, match="code 78(.|\n)*last words of process 1"):
        finish(Failed())
    monkeypatch.setattr(verify_resume, "verify", lambda *_: finish(Failed()))
    with pytest.raises(SystemExit) as end:
        verify_resume.main(["--config=qm9:smoke"])
    assert end.value.code == EXIT_NO_PROGRESS
    assert issubclass(RunFailed, UserError) and "Traceback" not in capsys.readouterr().err


# --- local ---------------------------------------------------------------------------------------


def test_processes_start_beside_a_foreign_folder_of_our_name(tmp_path, monkeypatch):
    (tmp_path / "data_pipelines").mkdir()
    (tmp_path / "data_pipelines" / "__init__.py").write_text("raise SystemExit('foreign')")
    monkeypatch.chdir(tmp_path)
    job = LocalJob(["--help"], 1, quiet=True)
    assert job.wait() == EXIT_DONE, job.tail(0)
    assert "--coordinator_address" in job.tail(0)


def test_counts_are_whole_numbers_from_1():
    assert command_line.positive("3") == 3
    for text in ("0", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            command_line.positive(text)
    with pytest.raises(ValueError):
        command_line.positive("two")
