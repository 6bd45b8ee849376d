"""Whole runs as real processes: killed, interrupted, damaged, refused, resumed."""

import json
import random
import shutil
import signal
import time

import pytest
from conftest import wait_for_steps


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def steps(workdir, split="train"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["split"] == split]


@pytest.fixture(scope="module")
def finished(runner, tmp_path_factory):
    """A run of 40 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished")
    runner.run(workdir)
    return workdir


def test_result_files_are_what_the_documentation_promises(finished):
    found = result(finished)
    assert found["dataset"] == "qm9" and found["split"] == "test" and found["count"] == 50
    assert found["targets"]["homo"]["unit"] == "meV" and found["targets"]["homo"]["mae"] > 0
    assert len(found["params_sha256"]) == 64 and found["step"] in (20, 40)
    assert found["data_passport"]["molecules"] == 500
    assert found["config"]["data"]["targets"] == ["homo"]
    assert json.loads((finished / "config.json").read_text())["config"] == found["config"]
    scores = {
        line["step"]: line["score"]
        for line in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "validation"
    }
    assert found["step"] == min(scores, key=scores.get)
    assert found["validation_score"] == min(scores.values())
    assert steps(finished) == list(range(1, 41))
    assert steps(finished, "validation") == [20, 40]
    for picture in ("parity.png", "learning_curves.png"):
        assert (finished / picture).read_bytes()[:4] == b"\x89PNG"
    assert list((finished / "events").iterdir())


def test_killed_at_a_random_moment_and_resumed_is_the_same_run(runner, finished, tmp_path):
    rng = random.Random(time.time_ns())
    moments = [rng.randrange(1, 39), rng.randrange(15, 39)]
    for moment in moments:
        runner.kill_after(tmp_path, moment, delay=rng.random() * 0.1)
    assert "resumed at step" in runner.run(tmp_path), moments
    expected = (finished / "metrics.jsonl").read_text()
    assert (tmp_path / "metrics.jsonl").read_text() == expected, moments
    assert result(tmp_path)["params_sha256"] == result(finished)["params_sha256"], moments
    assert result(tmp_path)["targets"] == result(finished)["targets"], moments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_says_how_to_resume_and_has_its_own_code(runner, finished, tmp_path, number):
    process = runner.start(tmp_path)
    wait_for_steps(tmp_path, 12, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err[-2000:]
    assert "The same command goes on from there" in err and "Traceback" not in err
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert f"after step {saved} of 40" in err
    assert "resumed at" in runner.run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    assert result(tmp_path)["params_sha256"] == result(finished)["params_sha256"]


def test_the_best_checkpoint_is_kept_and_is_what_is_tested(runner, tmp_path):
    """A decay that takes the weights away as the rate grows: the best are early ones."""
    flags = ["--config.optim.schedule=constant", "--config.optim.learning_rate=0.01"]
    flags += ["--config.optim.warmup_steps=39", "--config.optim.weight_decay=100"]
    flags += ["--config.train.eval_every=5", "--config.optim.ema_decay=0.0"]
    runner.run(tmp_path, *flags)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {x["step"]: x["score"] for x in lines if x["split"] == "validation"}
    best = min(scores, key=scores.get)
    assert best < 35  # else the last two would be kept anyway
    assert result(tmp_path)["step"] == best
    assert (tmp_path / "checkpoints" / str(best)).is_dir()


def test_finished_run_says_so_and_changes_nothing(runner, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name == "result.json"}
    assert "is finished" in runner.run(finished)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_changed_config_is_refused_with_the_keys(runner, finished):
    for flag, key in (
        ("--config.seed=1", "config.seed: 0 in the run, 1 today"),
        ("--config.optim.learning_rate=0.1", "config.optim.learning_rate"),
        ("--config.model.width=32", "config.model.width: 16 in the run, 32 today"),
    ):
        assert key in runner.run(finished, flag, code=2)
    runner.run(finished, "--config.log.every_steps=7")  # changes no number


def test_evaluate_repeats_the_result_from_the_folder_alone(runner, finished):
    out = runner.start(finished, module="demetar.evaluate").communicate(timeout=200)[0]
    again, first = json.loads(out), result(finished)
    assert again["targets"] == first["targets"] and again["count"] == first["count"]


@pytest.fixture
def half(runner, finished, tmp_path):
    """The finished run as it was before its end: whole checkpoints, no result."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["flip", "remove", "cut off"])
def test_damaged_checkpoint_falls_back_and_says_so(runner, finished, half, damage):
    newest = half / "checkpoints" / "40"
    file = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    else:
        (newest / "manifest.json").unlink()
    said = runner.run(half)
    assert "Checkpoint 40 is not whole" in said and "Going back to the one before" in said
    assert result(half)["params_sha256"] == result(finished)["params_sha256"]


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(runner, half):
    for file in half.glob("checkpoints/*/manifest.json"):
        file.write_text('{"files": {"gone": {}}}')
    assert "is whole" in runner.run(half, code=2)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.data.targets=('hommo',)"], "Did you mean 'homo'"),
        (["--config.data.split=dimnet"], "Did you mean 'dimenet'"),
        (["--config.data.split=dimenet"], "hold 500"),
        (["--config.data.buckets=(12,)"], "the largest bucket holds 12"),
        (["--config.data.batch_size=15"], "must be a positive multiple of 2"),
        (["--config.data.source=raw", "--config.data.path=/nowhere"], "does not exist"),
        (["--config.model.edge_attention=ful"], "Did you mean 'full'"),
        (["--config.model.num_heads=5"], "multiple of"),
    ],
)
def test_bad_input_is_explained(runner, tmp_path, flags, message):
    said = runner.run(tmp_path / "run", *flags, code=2)
    assert message in said and "Traceback" not in said


def test_unknown_config_key(runner, tmp_path):
    said = runner.run(tmp_path / "run", "--config.optim.learning_rat=1", code=2)
    assert "learning_rat" in said and "learning_rate" in said and "Traceback" not in said


def test_workdir_that_cannot_be_written(runner, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in runner.run(tmp_path / "file" / "run", code=2)


def test_non_finite_loss_names_step_and_molecules(runner, tmp_path):
    said = runner.run(tmp_path / "run", "--config.optim.learning_rate=1e30", code=1)
    assert "Step " in said and "molecules" in said and "Traceback" not in said
