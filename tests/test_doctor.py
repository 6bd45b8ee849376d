"""demetar doctor: what it says of a good machine, and of broken ones."""

import errno
import fcntl
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from data_pipelines.errors import UserError
from demetar import doctor
from demetar.config.command_line import load_config
from demetar.exits import EXIT_DONE, EXIT_USER_ERROR
from demetar.job.place import find_place
from demetar.tools import machine_checks as checks
from demetar.tools import run_checks
from demetar.training import runtime

NOBODY = (None, None, None)


def levels(findings):
    return [finding.level for finding in findings]


def only(findings, level):
    """The one finding that is not `ok`; it says what to do."""
    [found] = [finding for finding in findings if finding.level != "ok"]
    assert found.level == level and found.remedy
    return found


@pytest.fixture(autouse=True)
def fewer_renames(monkeypatch):
    monkeypatch.setattr(checks, "_RENAMES", 20)


# --- the whole -----------------------------------------------------------------------------------


@pytest.fixture
def here(cache_dir, tmp_path, monkeypatch, capsys):
    """Runs the command in this process; gives its exit code and what it said."""
    monkeypatch.setattr(runtime, "configure", lambda config: None)  # JAX has started already
    monkeypatch.setenv("XDG_CACHE_HOME", cache_dir)

    def here(*arguments, cache=cache_dir):
        flags = ["--config=nbody:smoke,linear", f"--config.data.cache_dir={cache}"]
        code = doctor.main([*flags, "--config.mesh.data=1", *arguments])
        return code, capsys.readouterr().out

    return here


def test_a_good_machine(here, tmp_path):
    code, said = here(f"--workdir={tmp_path}/run")
    assert code == EXIT_DONE, said
    rows = {line.split()[1] for line in said.splitlines()[:-1]}
    assert rows >= {"versions", "scheduler", "devices", "limits", "workdir", "clock", "cache"}
    assert rows >= {"data", "space", "compile", "memory", "time"}
    assert "0 problem(s)" in said and not list(tmp_path.iterdir())


def test_altered_data_are_a_problem(here, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(run_checks, "_step", lambda experiment: ())
    here(f"--workdir={tmp_path}/run")  # prepares them
    shutil.copytree(pathlib.Path(cache_dir) / "nbody", tmp_path / "cache" / "nbody")
    for file in (tmp_path / "cache").rglob("charge.npy"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    code, said = here(f"--workdir={tmp_path}/run", cache=tmp_path / "cache")
    assert code == EXIT_USER_ERROR and "charge.npy is damaged" in said and "Delete" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepare, environment, said",
    [
        ("mount -t tmpfs -o ro tmpfs $0", {}, "Read-only file system"),
        ("mount -t tmpfs -o size=1m tmpfs $0", {}, "1.0 MiB free for"),
        (":", {"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS is 'cuda'"),
        (":", {"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID without"),
        (
            ":",
            {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "a",
                "SLURM_PROCID": "4",
                "SLURM_NTASKS": "4",
            },
            "SLURM_PROCID is 4, but SLURM_NTASKS is 4",
        ),
        ("unset HOME XDG_CACHE_HOME; nobody='setpriv --reuid=54321 --clear-groups'", {}, "home"),
    ],
    ids=["read-only", "1 MB", "no GPU", "half told", "wrong SLURM", "no home"],
)
def test_a_broken_machine(prepare, environment, said, runner, tmp_path):
    """Real mounts and environments; each is a problem that is named, with a remedy."""
    if os.getuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    script = f"{prepare}; exec ${{nobody:-}} {sys.executable} -m demetar.doctor "
    script += "--config=nbody:smoke,linear --workdir=$0"
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, tmp_path],
        env=runner.environment() | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_USER_ERROR and "Traceback" not in done.stderr, done.stderr
    assert said in done.stdout and "->" in done.stdout


# --- the machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ, level, text",
    [
        ({}, "ok", "one process"),
        ({"SLURM_JOB_ID": "7"}, "warning", "SLURM_JOB_ID=7"),
        ({"JAX_PROCESS_ID": "0"}, "problem", "JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS"),
        (
            {"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"},
            "problem",
            "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE must be whole numbers",
        ),
    ],
)
def test_what_a_scheduler_says(environ, level, text):
    count, [found] = checks.scheduler(NOBODY, environ)
    assert (count, found.level) == (1, level) and text in found.text


@pytest.mark.parametrize("process, count", [("4", "4"), ("-1", "4"), ("0", "0"), ("1.5", "2")])
def test_numbers_of_slurm_that_cannot_be_are_refused(process, count):
    environ = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a"}
    environ |= {"SLURM_PROCID": process, "SLURM_NTASKS": count}
    with pytest.raises(UserError, match="SLURM_PROCID.*SLURM_NTASKS"):
        find_place(*NOBODY, environ)


def test_a_coordinator_that_nobody_knows(monkeypatch):
    def unknown(host, port):
        raise socket.gaierror(socket.EAI_NONAME, f"{host} is not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    count, found = checks.scheduler(("nowhere:29400", 2, 1), {})
    assert count == 2 and "'nowhere'" in only(found, "problem").text


def test_devices_that_are_not_there(monkeypatch):
    def none():
        raise AssertionError  # what JAX 0.10 says of JAX_PLATFORMS=cuda without a GPU: nothing

    monkeypatch.setattr(jax, "local_devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "'cuda'" in only(checks.devices(), "problem").remedy


def test_limits_that_are_low(monkeypatch, tmp_path):
    low = {resource.RLIMIT_NOFILE: (256, 256), resource.RLIMIT_FSIZE: (2**20, 2**20)}
    monkeypatch.setattr(resource, "getrlimit", low.get)
    found = list(checks.limits(False, tmp_path / "missing"))
    assert levels(found) == ["warning"] * 3 and "1.0 MiB" in found[1].text


# --- folders -------------------------------------------------------------------------------------


def test_a_good_folder_is_left_as_it_was(tmp_path):
    found = list(checks.folder("workdir", tmp_path / "not" / "yet", "Another", checks.problem))
    assert levels(found) == ["ok"] * 3 and not list(tmp_path.iterdir())


def test_a_folder_under_a_file(tmp_path):
    (tmp_path / "file").touch()
    found = checks.folder("workdir", tmp_path / "file" / "run", "Another", checks.problem)
    assert "is no folder" in only(found, "problem").text


def test_renames_that_are_not_atomic(tmp_path, monkeypatch):
    def copy(source, target):
        shutil.copyfile(source, target)  # empties the target first
        source.unlink()

    monkeypatch.setattr(pathlib.Path, "replace", copy)
    found = checks.folder("workdir", tmp_path, "Another", checks.problem)
    assert "not atomic" in only(found, "problem").text


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), None])
def test_locks_that_do_not_hold(tmp_path, monkeypatch, error):
    def flock(file, how):
        if error:
            raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    found = checks.folder("workdir", tmp_path, "Another", checks.problem)
    assert "no locks here" in only(found, "warning").text


@pytest.mark.parametrize(
    "facts, text",
    [
        ({"pid": os.getpid()}, f"process {os.getpid()} on host {socket.gethostname()} holds"),
        ({"pid": 2**22 + 1}, "a stale lock"),  # more than a pid can be
        ({"pid": os.getpid(), "ended": "done"}, "a stale lock"),
    ],
    ids=["held", "stale", "ended"],  # not with a pid: workers must see the same tests
)
def test_a_workdir_that_is_held(tmp_path, facts, text):
    assert not list(checks.holder(tmp_path))
    file = tmp_path / "processes" / "0.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"host": socket.gethostname(), **facts}))
    with file.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert text in only(checks.holder(tmp_path), "problem").text
    assert not list(checks.holder(tmp_path))


def test_a_preparation_under_way_and_no_home(tmp_path, monkeypatch):
    config = load_config("nbody:smoke", {"data.cache_dir": str(tmp_path)})
    (tmp_path / "nbody").mkdir()
    with (tmp_path / "nbody" / "abc.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "nbody/abc" in only(checks.cache(config), "warning").text

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert "XDG_CACHE_HOME" in only(checks.cache(), "problem").remedy


# --- a run ---------------------------------------------------------------------------------------


def test_a_full_disk_is_named_with_both_numbers(cache_dir, tmp_path, monkeypatch):
    changes = {"data.cache_dir": cache_dir, "mesh.data": 1}
    config = load_config("nbody:smoke,linear", changes)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(run_checks, "_step", lambda experiment: ())
    found = only(run_checks.examine(config, tmp_path, 1), "problem")
    assert "1.0 MiB free" in found.text and "16.0 MiB" in found.text


def test_a_name_that_the_store_cannot_take(tmp_path):
    assert (
        "Orbax takes for a pattern" in next(run_checks._earlier_run(None, tmp_path / "[x]", 1)).text
    )


def test_each_process_of_a_job_is_asked_about_its_share():
    """Of 24 graphs in two micro-batches three processes have 8; eight devices share each 4."""
    changes = {"data.batch_size": 24, "train.accumulation": 2, "data.eval_batch_size": 24}
    share = run_checks._share(load_config("nbody:smoke", changes | {"mesh.fsdp": 6}), 3)
    assert share.data.batch_size == share.data.eval_batch_size == 8
    assert (share.mesh.data, share.mesh.fsdp) == (4, 1)


def test_a_bucket_without_training_graphs_is_not_waited_for():
    plan = types.SimpleNamespace(batches_per_bucket=np.array([0, 2, 1]))
    assert run_checks._first_bucket(types.SimpleNamespace(plan=plan)) == 1
