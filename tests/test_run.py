"""Whole runs: killed, interrupted, damaged, refused, resumed. What is promised of processes is
shown by real ones; what a message says, by the function that says it."""

import csv
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal

import jax
import pytest
from conftest import REPOSITORY, TINY, wait_for_steps

from data_pipelines.errors import UserError
from demetar import checkpoints as checkpoints_command
from demetar.config.command_line import load_config
from demetar.exits import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR, FilesGone, NotRestorable
from demetar.job.job import Job
from demetar.job.watch import Watch
from demetar.records.files import read_json, read_jsonl
from demetar.train import check_files, train_and_evaluate
from demetar.training import checkpoints as checkpoints_module
from demetar.training import manifest
from demetar.training.checkpoints import Checkpoints
from demetar.training.evaluator import Evaluator
from demetar.training.experiment import build_experiment
from demetar.training.trainer import Trainer

# What a resume must restore beside the weights: the dropout of a step, and the rate, which the
# validation lowers. A high rate, and no average of the weights: the best weights are early ones.
STATEFUL = [
    "--config.model.dropout=0.1",
    "--config.optim.schedule=plateau",
    "--config.optim.factor=0.5",
    "--config.optim.patience=0",
    "--config.optim.learning_rate=0.02",
    "--config.optim.ema_decay=0",
    "--config.train.eval_every=5",
]


def result(workdir):
    return read_json(workdir / "result.json")


def lines(workdir, part):
    return [line for line in read_jsonl(workdir / "metrics.jsonl") if line["split"] == part]


@pytest.fixture(scope="module")
def finished(runner, tmp_path_factory):
    """A run of 40 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished")
    runner.run(workdir, *STATEFUL)
    return workdir


@pytest.fixture
def half(finished, tmp_path):
    """The finished run as it was before its end: whole checkpoints, no result."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def config_of(cache_dir):
    """The config of `runner.run(workdir, *flags)`, or with other values: for one device here."""

    def config_of(flags=(), **values):
        pairs = [flag.removeprefix("--config.").split("=") for flag in TINY["qm9.py:smoke"]]
        pairs += [flag.removeprefix("--config.").split("=") for flag in flags]
        number = lambda text: json.loads(text) if text[0].isdigit() else text
        overrides = {key: number(text) for key, text in pairs}
        overrides |= {"data.cache_dir": cache_dir, "mesh.data": 1}
        overrides |= {key.replace("__", "."): value for key, value in values.items()}
        return load_config(f"{REPOSITORY}/configs/qm9.py:smoke", overrides)

    return config_of


# --- a run, disturbed or not ---------------------------------------------------------------------


def test_result_files_are_what_the_documentation_promises(finished):
    found = result(finished)
    assert found["dataset"] == "qm9" and found["split"] == "test" and found["count"] == 50
    assert found["targets"]["homo"]["unit"] == "meV" and found["targets"]["homo"]["mae"] > 0
    assert len(found["params_sha256"]) == len(found["state_sha256"]) == 64
    assert found["data_passport"]["molecules"] == 500
    assert found["config"]["data"]["targets"] == ["homo"]
    assert read_json(finished / "config.json")["config"] == found["config"]
    scores = {line["step"]: line["score"] for line in lines(finished, "validation")}
    assert list(scores) == list(range(5, 41, 5))
    assert found["step"] == min(scores, key=scores.get)
    assert found["validation_score"] == min(scores.values())
    assert [line["step"] for line in lines(finished, "train")] == list(range(1, 41))
    for picture in ("parity.png", "learning_curves.png"):
        assert (finished / picture).read_bytes()[:4] == b"\x89PNG"
    assert list((finished / "events").iterdir())


def test_the_rate_falls_where_validation_stops_improving(finished):
    rates = {line["step"]: line["learning_rate"] for line in lines(finished, "train")}
    best, scale = float("inf"), 1.0
    for line in lines(finished, "validation")[:-1]:
        if line["score"] >= best:
            scale *= 0.5
        best = min(best, line["score"])
        step = line["step"]  # the next one has done as many updates; ten of them warm up
        assert rates[step + 1] == pytest.approx(0.02 * min(1, step / 10) * scale), step
    assert scale < 0.5


def test_the_best_checkpoint_is_kept_and_is_what_is_tested(finished):
    scores = {line["step"]: line["score"] for line in lines(finished, "validation")}
    best = min(scores, key=scores.get)
    assert best < 35  # else the last two would be kept anyway
    assert result(finished)["step"] == best
    assert (finished / "checkpoints" / str(best)).is_dir()
    others = {int(p.name) for p in (finished / "checkpoints").iterdir()} - {best}
    assert others == {35, 40}


def test_killed_interrupted_and_damaged_it_is_the_same_run(runner, finished, tmp_path):
    """Kill -9 at a drawn moment, SIGINT, SIGTERM, then the newest checkpoint is damaged."""
    rng = random.Random(20)
    runner.kill_after(tmp_path, rng.randrange(6, 12), *STATEFUL, delay=rng.random() * 0.1)
    for number, steps in ((signal.SIGINT, 17), (signal.SIGTERM, 26)):
        process = runner.start(tmp_path, *STATEFUL)
        wait_for_steps(tmp_path, steps, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == EXIT_PREEMPTED, said[-2000:]
        assert "The same command goes on from there" in said and "Traceback" not in said
        assert "resumed at step" in said
        saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
        assert f"after step {saved} of 40" in said
        assert len(lines(tmp_path, "train")) == saved < 40
    flip_a_bit(largest_file(tmp_path / "checkpoints" / str(saved)))
    said = runner.run(tmp_path, *STATEFUL)
    assert f"Checkpoint {saved} is not whole" in said and "Going back to the one before" in said
    assert "resumed at step" in said
    assert (tmp_path / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    for key in ("params_sha256", "state_sha256", "targets", "step", "validation_score"):
        assert result(tmp_path)[key] == result(finished)[key], key


def evaluated(runner, workdir, *flags):
    """What `demetar evaluate` prints of a run, in a process that has one device."""
    process = runner.start(workdir, *flags, module="demetar.evaluate")
    return json.loads(process.communicate(timeout=200)[0])


@pytest.mark.slow
def test_evaluate_repeats_the_result_from_the_folder_alone(runner, tmp_path):
    steps = ["--config.train.num_steps=12", "--config.train.eval_every=6"]
    runner.run(tmp_path, "--config.mesh.cpu_devices=1", *steps)
    again, first = evaluated(runner, tmp_path), result(tmp_path)
    assert again["targets"] == first["targets"] and again["count"] == first["count"]


def test_evaluate_needs_one_device_whatever_the_run_had(runner, finished, half):
    """Only the order of sums differs; what evaluate cannot set, it does not ask for."""
    saved = read_json(half / "config.json")
    saved["config"]["mesh"] |= {"data": 2, "fsdp": 2, "cpu_devices": 0}  # as four GPUs leave it
    (half / "config.json").write_text(json.dumps(saved))
    table = half / "test.csv"
    again, first = (
        found["targets"]["homo"]
        for found in (evaluated(runner, half, f"--out={table}"), result(finished))
    )
    assert again["mae"] == pytest.approx(first["mae"], rel=1e-6)
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    errors = [abs(float(row["homo"]) - float(row["homo_pred"])) for row in rows]
    assert sum(errors) / 50 == pytest.approx(again["mae"])
    assert len(errors) == len({row["index"] for row in rows}) == 50


# --- the first save -------------------------------------------------------------------------------


def _first_save_fails(cache_dir, workdir, message):
    values = {"data.cache_dir": cache_dir, "data.eval_batch_size": 4, "mesh.data": 1}
    config = load_config("nbody:smoke,linear", values | {"checkpoint.every_steps": 3})
    with pytest.raises(
        NotRestorable, match=f"first checkpoint of this run, .*/3, {message}"
    ) as end:
        train_and_evaluate(config, workdir, Job.alone())
    assert end.value.exit_code == EXIT_FAILED
    assert not list(workdir.glob("checkpoints/*/manifest.json"))  # no start relies on it


def test_a_first_save_that_the_disk_lost_stops_the_run(tmp_path, cache_dir, monkeypatch):
    """A stand-in for a disk that keeps nothing: the largest file is cut before it is read."""
    meta = Checkpoints.meta

    def meta_of_a_cut_file(self, step):
        largest_file(tmp_path / "checkpoints" / str(step)).write_bytes(b"")
        return meta(self, step)

    monkeypatch.setattr(Checkpoints, "meta", meta_of_a_cut_file)
    _first_save_fails(cache_dir, tmp_path, "cannot be restored: ")


def test_a_first_save_that_is_read_as_another_state_stops_the_run(tmp_path, cache_dir, monkeypatch):
    restore = Checkpoints.restore

    def other(self, step, abstract_state):
        state = restore(self, step, abstract_state)
        return state.replace(ema=jax.tree.map(lambda x: x + 1e-6, state.ema))

    monkeypatch.setattr(Checkpoints, "restore", other)
    _first_save_fails(cache_dir, tmp_path, "is restored as another state")


# --- a folder that has a run ---------------------------------------------------------------------


def test_finished_run_says_so_and_changes_nothing(runner, finished):
    files = [p for p in finished.rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files if p.parent.name not in ("logs", "processes")}
    assert "is finished" in runner.run(finished, *STATEFUL, "--config.log.every_steps=7")
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("seed", 1, "config.seed: 0 in the run, 1 today"),
        ("optim__learning_rate", 0.1, "config.optim.learning_rate: 0.02 in the run, 0.1 today"),
        ("model__width", 32, "config.model.width: 16 in the run, 32 today"),
    ],
)
def test_changed_config_is_refused_with_the_keys(config_of, finished, key, value, message):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config_of(STATEFUL, **{key: value}), finished, Job.alone())


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file, old, new):
    file.write_text(file.read_text().replace(old, new, 1))


def make_a_link(file):
    """To its own content, elsewhere."""
    file.symlink_to(file.rename(file.with_suffix(".moved")))


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda folder: flip_a_bit(largest_file(folder)), "its manifest says"),
        (lambda folder: largest_file(folder).unlink(), "missing file"),
        (lambda folder: (folder / "manifest.json").unlink(), "the save was cut off"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: edit(folder / "manifest.json", "bytes", "bites"), "cannot be read"),
        (lambda folder: make_a_link(largest_file(folder)), "is a link"),
    ],
    ids=["flip", "remove", "cut off", "cut manifest", "other key", "link"],
)
def test_damaged_checkpoint_falls_back_and_says_so(half, damage, reason, capsys):
    steps = sorted(int(p.name) for p in (half / "checkpoints").iterdir() if p.name.isdigit())
    damage(half / "checkpoints" / "40")
    checkpoints = Checkpoints(half, 2, Job.alone())
    assert checkpoints.latest_step() == steps[-2] == 35
    _, progress = checkpoints.meta(35)  # it can be read
    assert progress.last_eval_step == 35
    assert (half / "damaged" / "40").is_dir()
    said = capsys.readouterr().err
    assert "Checkpoint 40 is not whole" in said and "Going back to the one before" in said
    assert reason in said


def test_a_run_goes_on_without_its_best_checkpoint(config_of, half, capsys):
    best = Checkpoints(half, 2, Job.alone()).meta(40)[1].best_step
    assert best < 35
    flip_a_bit(largest_file(half / "checkpoints" / str(best)))
    train_and_evaluate(config_of(STATEFUL), half, Job.alone())
    said = capsys.readouterr().err
    assert f"The checkpoint of step {best}, which had the best validation score, is not" in said
    assert result(half)["step"] == 40 and lines(half, "validation")[-1]["step"] == 40


def test_a_checkpoint_that_the_disk_does_not_give_is_set_aside(half, monkeypatch, capsys):
    read = manifest._files

    def files(folder):
        if folder.name == "40":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(folder)

    monkeypatch.setattr(manifest, "_files", files)
    assert Checkpoints(half, 2, Job.alone()).latest_step() == 35
    assert "it cannot be read: [Errno 5]" in capsys.readouterr().err


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(config_of, half):
    for file in half.glob("checkpoints/*/manifest.json"):
        file.write_text('{"files": {"gone": {}}}')
    with pytest.raises(UserError, match="No checkpoint in .* is whole"):
        train_and_evaluate(config_of(STATEFUL), half, Job.alone())
    assert not (half / "result.json").exists()


def test_the_step_of_a_finished_run_is_that_of_its_result(finished, monkeypatch):
    """The last save may be from before the last evaluation."""
    read = checkpoints_module.read_meta

    def before(folder):
        identity, progress = read(folder)
        return identity, dataclasses.replace(progress, best_step=0)

    monkeypatch.setattr(checkpoints_module, "read_meta", before)
    assert checkpoints_module.read_best(finished)[0] == result(finished)["step"]


# --- demetar checkpoints --------------------------------------------------------------------------


def snapshot(folder):
    return sorted((str(f), f.stat().st_mtime_ns) for f in folder.rglob("*"))


@pytest.fixture
def command(capsys):
    """Runs `demetar checkpoints`; gives its exit code and all that it says."""

    def command(*arguments):
        try:
            code = checkpoints_command.main([str(word) for word in arguments])
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())

    return command


def test_ls_verify_and_diff_say_what_is_there_and_change_nothing(half, command):
    steps = sorted(int(f.name) for f in (half / "checkpoints").iterdir())
    best = next(step for step in steps if step not in (35, 40))
    (half / "checkpoints" / "45").mkdir()  # a save that was cut off
    flip_a_bit(largest_file(half / "checkpoints" / "40"))
    before = snapshot(half)
    code, said = command("ls", half)
    rows = {line.split()[0]: line for line in said.splitlines()[:-1]}
    assert code == 0 and list(rows) == [str(step) for step in (best, 35, 40, 45)]
    assert "whole, best, validation score" in rows[str(best)] and "whole, latest" in rows["35"]
    assert "SHA-256" in rows["40"] and "the save was cut off" in rows["45"]
    assert "keeps the newest 2" in said
    code, said = command("verify", half)
    assert code == EXIT_USER_ERROR and "numbers in" in said
    assert "2 of 4 checkpoints" in said and "40, 45. The run will go on from step 35" in said
    code, said = command("diff", half, half / "checkpoints" / "35")
    assert code == 0 and "Config and data are the same" in said and "score" in said
    assert snapshot(half) == before


def test_diff_parts_what_matters_from_what_does_not(half, command, tmp_path):
    other = read_json(half / "config.json")
    other["config"]["seed"], other["config"]["log"]["every_steps"] = 7, 9
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    code, said = command("diff", half, tmp_path / "other")
    matters, free = said.split("These change no number")
    assert code == 0 and "config.seed: 0 in" in matters and f"7 in {tmp_path / 'other'}" in matters
    assert "config.log.every_steps" in free and "config.log" not in matters


def test_prune_keeps_the_newest_and_the_best(half, command):
    folder = half / "checkpoints"
    best = next(f.name for f in folder.iterdir() if f.name not in ("35", "40"))
    shutil.copytree(folder / "35", folder / "34")
    (folder / "34" / "manifest.json").unlink()
    (half / "damaged" / "10").mkdir(parents=True)
    code, said = command("prune", half, "--keep=1")
    assert code == EXIT_USER_ERROR and "say --yes" in said and (folder / "35").exists()
    watch = Watch(half, 0, 1, 10, 10)
    code, said = command("prune", half, "--keep=1", "--yes")
    assert code == EXIT_USER_ERROR and f"A job works in {half}: process" in said
    watch.end("done", 0)
    watch._file.close()
    code, said = command("prune", half, "--keep=1", "--yes")
    assert code == 0 and "3 deleted" in said
    assert {f.name for f in folder.iterdir()} == {best, "40"}
    assert not list((half / "damaged").iterdir())
    flip_a_bit(largest_file(folder / best))
    flip_a_bit(largest_file(folder / "40"))
    code, said = command("prune", half, "--keep=1", "--yes")
    assert code == EXIT_USER_ERROR and "is whole, so none is deleted" in said
    assert len(list(folder.iterdir())) == 2


# --- bad input, bad numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data__targets": ("hommo",)}, "Did you mean 'homo'"),
        ({"data__split": "dimnet"}, "Did you mean 'dimenet'"),
        ({"data__split": "dimenet"}, "hold 500"),
        ({"data__buckets": (12,)}, "the largest bucket holds 12"),
        ({"data__batch_size": 15, "mesh__data": 2}, "must be a positive multiple of 2"),
        ({"data__source": "raw", "data__path": "/nowhere"}, "does not exist"),
        ({"model__edge_attention": "ful"}, "Did you mean 'full'"),
        ({"model__num_heads": 5}, "multiple of"),
    ],
)
def test_bad_input_is_explained(config_of, values, message):
    with pytest.raises(UserError, match=message):
        Trainer(build_experiment(config_of(**values)))


def test_bad_input_ends_a_process_with_one_line(runner, tmp_path):
    for flag, message in (
        ("--config.data.targets=('hommo',)", "Did you mean 'homo'"),  # of the data
        ("--config.optim.learning_rat=1", "learning_rate"),  # of the config
    ):
        said = runner.run(tmp_path / "run", flag, code=EXIT_USER_ERROR)
        assert message in said and "Traceback" not in said
        assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Watch(tmp_path / "file" / "run", 0, 1, lost_seconds=30, stuck_seconds=80)


def test_a_run_whose_files_are_deleted_says_so(tmp_path):
    """It must not end as if it had kept its promises."""
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    check_files(tmp_path, Job.alone())
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(FilesGone, match="metrics.jsonl of the run in .* deleted while it ran"):
        check_files(tmp_path, Job.alone())


@pytest.mark.slow  # the whole of it: the folder goes at the first evaluation
def test_a_run_whose_folder_is_deleted_fails(tmp_path, monkeypatch, config_of):
    evaluate = Evaluator.run

    def run(self, params, part):
        shutil.rmtree(tmp_path / "run")
        return evaluate(self, params, part)

    monkeypatch.setattr(Evaluator, "run", run)
    with pytest.raises(FilesGone, match="config.json and metrics.jsonl"):
        train_and_evaluate(config_of(checkpoint__every_steps=99), tmp_path / "run", Job.alone())


def test_non_finite_loss_names_step_and_graphs(runner, tmp_path):
    flag = "--config.optim.learning_rate=1e30"
    said = runner.run(tmp_path, flag, config="nbody.py:smoke,linear", code=EXIT_FAILED)
    assert re.search(r"error: Step \d+: the loss is (inf|nan).* systems \d+", said)
    assert "Nothing of this step was saved" in said and "Traceback" not in said
    [line] = read_jsonl(tmp_path / "failures.jsonl")
    assert line["error"].startswith("NonFiniteLoss: Step ")
