"""What only reads never creates, moves or deletes anything in the folder of a run: finished, on a
filesystem that cannot be written, or under way. Real processes, a real mount."""

import contextlib
import json
import subprocess

import pytest

from data_pipelines.errors import UserError
from demetar.records.files import read_json
from demetar.tools import checkpoint_files
from demetar.tools.resume_check import logged_step
from demetar.training.checkpoints import read_best

RUN = ["--config.train.num_steps=12", "--config.train.eval_every=6"]


def snapshot(folder):
    """Every file and folder, with its time of change and its size."""
    return sorted((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in folder.rglob("*"))


@pytest.fixture(scope="module")
def workdir(runner, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    runner.run(workdir, *RUN)
    return workdir


@pytest.fixture
def read_only(workdir, tmp_path):
    """The same folder on a filesystem that nobody can write: we may be root, whom no mode binds."""
    place = tmp_path / "read_only"
    place.mkdir()
    for command in (["--bind", workdir, place], ["-o", "remount,ro,bind", place]):
        done = subprocess.run(["mount", *command], capture_output=True, text=True)
        if done.returncode:
            subprocess.run(["umount", place], capture_output=True)
            pytest.skip(f"this machine mounts nothing read-only for us: {done.stderr.strip()}")
    with pytest.raises(OSError, match="Read-only"):
        (place / "file").touch()
    yield place
    subprocess.run(["umount", place], check=True)


def start_readers(runner, workdir, out):
    """All commands that read a run, at once: name -> process."""
    start = lambda name, *words: runner.start(None, *words, module=f"demetar.{name}")
    return {
        "evaluate": start("evaluate", f"--workdir={workdir}"),
        "predict": start("predict", "CCO", f"--model={workdir}"),
        "models": start("model_files", "save", f"--workdir={workdir}", f"--out={out}/model.zip"),
        "ls": start("checkpoints", "ls", str(workdir)),
        "verify": start("checkpoints", "verify", str(workdir)),
        "diff": start("checkpoints", "diff", str(workdir), str(workdir)),
        "doctor": start("doctor", f"--workdir={workdir}", *runner.flags("qm9.py:smoke"), *RUN),
    }


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return out


@pytest.mark.slow
def test_readers_leave_a_finished_run_as_it_is(runner, workdir, tmp_path):
    before = snapshot(workdir)
    said = {
        name: finish(process) for name, process in start_readers(runner, workdir, tmp_path).items()
    }
    assert snapshot(workdir) == before
    assert json.loads(said["evaluate"])["count"] == 50 and "CCO" in said["predict"]


@pytest.mark.slow
def test_readers_work_where_nothing_can_be_written(runner, read_only, tmp_path):
    for name, process in start_readers(runner, read_only, tmp_path).items():
        if name == "doctor":  # says that a run could not be trained there
            assert "annot be written" in process.communicate(timeout=240)[0]
        else:
            finish(process)


@pytest.mark.slow
def test_a_run_that_is_read_all_the_time_is_the_same_run(runner, tmp_path):
    """Saved at each second step, and looked at from all sides until it ends."""
    more = ["--config.train.num_steps=150", "--config.checkpoint.every_steps=2"]
    more += ["--config.train.eval_every=10"]
    start = lambda name: runner.start(tmp_path / name, *more, config="nbody.py:smoke,linear")
    alone, watched = start("alone"), start("watched")
    folder, looks = tmp_path / "watched", 0
    while watched.poll() is None and logged_step(folder) < 12:
        pass
    evaluated = runner.start(folder, module="demetar.evaluate")
    while watched.poll() is None:
        with contextlib.suppress(UserError):  # of a save that is under way
            list(checkpoint_files.verify(folder))
            checkpoint_files.table(folder)
            read_best(folder)
            looks += 1
    finish(watched)
    finish(alone)
    assert looks > 3
    assert json.loads(finish(evaluated))["count"] == 32
    first, second = (read_json(tmp_path / name / "result.json") for name in ("alone", "watched"))
    assert second["state_sha256"] == first["state_sha256"]
    assert not (folder / "damaged").exists()
