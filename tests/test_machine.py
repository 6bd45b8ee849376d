"""What the machine refuses is not the run's fault: a sentence, exit code 2, nothing counted."""

import errno
import fcntl
import io
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines import prepared
from data_pipelines.errors import UserError, machine_fault
from demetar import exits
from demetar.exits import EXIT_FAILED, EXIT_USER_ERROR
from demetar.job.job import Job
from demetar.job.place import Place
from demetar.job.watch import Watch
from demetar.training import provenance, runtime

REPOSITORY = pathlib.Path(__file__).parents[1]
# As Orbax and TFDS say it.
FULL_DISK = "Writing failed: No space left on device [os_error_code='28']"


def raised(error, cause=None):
    """An error as it is after it was raised from another."""
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    "error, remedy",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a"), "Free some space"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "a"), "your quota"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a"), "permission"),
        (ValueError(FULL_DISK), "Free some space"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "a"), "Look at the disk"),
        (MemoryError(), "halve config.data.batch_size"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "accumulation"),
        (raised(RuntimeError("cannot save"), OSError(errno.EMFILE, "", "a")), "ulimit"),
        (raised(RuntimeError("cannot save"), KeyError("a")), None),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a"), None),
        (ValueError(""), None),
    ],
)
def test_what_the_machine_refuses_ends_with_2_and_is_not_counted(error, remedy, tmp_path, capsys):
    said = machine_fault(error)
    assert (said is None) == (remedy is None) and (remedy or "") in (said or "")
    code = Job(Place("one process"), tmp_path, None).fail(error)
    is_full = remedy == "Free some space"
    assert (f"{tmp_path} has " in capsys.readouterr().err) == is_full  # and how many bytes free
    assert code == (EXIT_FAILED if remedy is None else EXIT_USER_ERROR)
    assert (tmp_path / "failures.jsonl").exists() == (remedy is None)

    @exits.exits_cleanly
    def main(arguments):
        raise error

    with pytest.raises(type(error) if remedy is None else SystemExit) as end:
        main([])
    if remedy is not None:
        assert end.value.code == EXIT_USER_ERROR
        assert remedy in capsys.readouterr().err.splitlines()[-1]


def test_pages_that_tensorstore_adds_are_left_out():
    error = ValueError(f"{FULL_DISK} [tensorstore_spec='{{\"driver\":[1]}}'] [os_error_code='28']")
    assert "tensorstore" not in machine_fault(error) and "No space left" in machine_fault(error)


def test_a_full_disk_while_preparing_says_where_else(tmp_path):
    def build(folder):
        raise RuntimeError(FULL_DISK)

    with pytest.raises(UserError, match=r"No space left.*config.data.cache_dir.*500 MB"):
        prepared.prepare(tmp_path / "data", build, "500 MB")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_the_first_to_end_gives_the_data_their_name(
    number, tmp_path, monkeypatch, capsys
):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = tmp_path / "data"

    def build(of, meanwhile=lambda: None):
        def build(building):
            meanwhile()
            prepared.write(building, {"x": np.full(3, of)}, {"of": of})

        return build

    other = lambda: prepared.prepare(folder, build(1), "1 MB")
    arrays, passport = prepared.prepare(folder, build(2, other), "1 MB")
    assert passport == {"of": 1} and arrays["x"].tolist() == [1, 1, 1]
    said = f"{tmp_path} has no file locks ({os.strerror(number)}): preparing without one."
    assert capsys.readouterr().err.splitlines() == [said, said]
    assert {file.name for file in tmp_path.iterdir()} == {"data", "data.lock"}
    Watch(tmp_path / "run", 0, 1, lost_seconds=30, stuck_seconds=80).end("done", 0)
    assert "nothing keeps another job out" in capsys.readouterr().err


def test_a_user_without_a_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", home)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert prepared.default_cache_dir() == pathlib.Path("/cache/demetar")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(UserError, match=f"User {os.getuid()} has no home folder.*set HOME or XDG"):
        prepared.default_cache_dir()


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize")])
def test_devices_that_are_not_there(error, monkeypatch):
    def backend():
        raise error

    monkeypatch.setattr(jax, "default_backend", backend)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    reason = str(error) or "there is no such device"
    with pytest.raises(UserError, match=f"of JAX_PLATFORMS='cuda': {reason}. Unset it"):
        runtime._backend()


@pytest.mark.parametrize("mode", ["w", "unbuffered"])
def test_a_reader_that_has_gone_changes_nothing(mode, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    if mode == "w":
        stream = os.fdopen(writer, "w")
    else:
        stream = io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)

    @exits.exits_cleanly
    def main(arguments):
        print("x" * 100_000)
        sys.stdout.flush()
        return 7

    assert main([]) == main([]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("command", ["models ls | head -0", "models show nosuch 2>&1 | head -0"])
def test_head_does_not_change_the_exit_code(command):
    script = f"{sys.executable} -m demetar.cli {command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == (2 if "nosuch" in command else 0) and not done.stderr


def test_a_commit_is_named_only_where_git_tracks_this_very_file(tmp_path, monkeypatch):
    """An installed package may lie inside of a repository of somebody else."""
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of git
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    git = lambda *arguments: (
        subprocess.run(
            ["git", f"--git-dir={tmp_path}/.git", f"--work-tree={tmp_path}", *name, *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    git("init", "-q")
    theirs, ours = tmp_path / "theirs.py", tmp_path / "ours.py"
    for file in (theirs, ours):
        file.write_text("")
    git("add", "theirs.py")
    git("commit", "-qm", "theirs")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert provenance.git_commit(theirs) == commit and provenance.git_commit(ours) is None
    theirs.write_text("changed")
    assert provenance.git_commit(theirs) == f"{commit}-dirty"
    assert provenance.git_commit(pathlib.Path("/nowhere/file.py")) is None
