"""`metrics.jsonl` and the writers: what they hold, also after a resume; that none stops a run."""

import json
import re
import threading

import numpy as np
import pytest
from conftest import REPOSITORY

from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from demetar.records import files, writers
from demetar.records.metrics import Writers
from demetar.training.progress import Progress

CONFIG = {"seed": 0, "optim": {"name": "adamw", "learning_rate": 1e-3}, "log": {"writers": []}}


def open_writers(workdir, *names, step=0, last_eval_step=0, is_main=True):
    return Writers(workdir, step, last_eval_step, CONFIG, names, "a project", is_main)


def write_run(write, steps):
    """As the loop: train and speed at each step, a validation at even ones."""
    for step in steps:
        write.write(step, "train", {"loss": 1 / step, "learning_rate": 1e-3})
        write.write_speed(step, {"rate": 100.0})
        if step % 2 == 0:
            write.write(step, "validation", {"homo_mae": 0.25, "score": 0.5})


@pytest.fixture
def said(monkeypatch):
    """What was complained about."""
    lines = []
    monkeypatch.setattr(writers, "complain", lines.append)
    return lines


# --- metrics.jsonl -------------------------------------------------------------------------------


def test_metrics_file_has_these_bytes(tmp_path):
    write = open_writers(tmp_path)
    write_run(write, (1, 2))
    write.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "split": "train", "loss": 1.0, "learning_rate": 0.001}\n'
        '{"step": 2, "split": "train", "loss": 0.5, "learning_rate": 0.001}\n'
        '{"step": 2, "split": "validation", "homo_mae": 0.25, "score": 0.5}\n'
    )


def test_json_is_written_in_one_place_and_never_with_nan():
    """A reader of JSON in another language refuses the whole file for one NaN."""
    content = {"a": [float("nan"), 1.5, (float("-inf"), "b")], "c": {"d": float("inf")}}
    text = json_text(content, indent=1)
    refuse = lambda word: pytest.fail(word)
    assert json.loads(text, parse_constant=refuse) == {
        "a": [None, 1.5, [None, "b"]],
        "c": {"d": None},
    }
    rooms = ("demetar", "data_pipelines", "benchmarks", "configs")
    sources = [file for room in rooms for file in (REPOSITORY / room).rglob("*.py")]
    writers = [file.name for file in sources if re.search(r"json\.dumps?\(", file.read_text())]
    assert writers == ["json_text.py"]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    write = open_writers(tmp_path)
    write.write(1, "validation", {"mu_r2": float("nan"), "score": np.float64("inf")})
    write.close()
    line = '{"step": 1, "split": "validation", "mu_r2": null, "score": null}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line
    files.write_json(tmp_path / "x.json", {"a": [1.5, (float("nan"), {"b": float("-inf")})]})
    assert files.read_json(tmp_path / "x.json") == {"a": [1.5, [None, {"b": None}]]}
    fresh = Progress.new(2)
    text = json.dumps(fresh.to_json(), allow_nan=False)
    assert Progress.from_json(json.loads(text)) == fresh


@pytest.mark.parametrize("stopped", range(1, 7))
@pytest.mark.parametrize("cut", [0, 7])
def test_a_resume_repeats_the_file_byte_by_byte(tmp_path, stopped, cut):
    """Killed at a step, within a line or not, after a checkpoint of at most step 4."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    write = open_writers(whole)
    write_run(write, range(1, 7))
    write.close()
    write = open_writers(resumed)
    write_run(write, range(1, stopped + 1))
    write.close()
    text = (resumed / "metrics.jsonl").read_text()
    (resumed / "metrics.jsonl").write_text(text[: len(text) - cut])
    saved = min(stopped - 1, 4)
    write = open_writers(resumed, step=saved, last_eval_step=saved // 2 * 2)
    write_run(write, range(saved + 1, 7))
    write.close()
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_an_evaluation_that_is_done_again_stands_there_once(tmp_path):
    """The checkpoint is of step 4, but was saved before that step was evaluated."""
    write = open_writers(tmp_path)
    write_run(write, range(1, 5))
    write.close()
    open_writers(tmp_path, step=4, last_eval_step=2).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = [(line["step"], line["split"]) for line in lines]
    assert kept == [(1, "train"), (2, "train"), (2, "validation"), (3, "train"), (4, "train")]


def test_only_process_0_writes(tmp_path):
    write = open_writers(tmp_path, "tensorboard", is_main=False)
    write_run(write, (1, 2))
    write.close()
    assert not list(tmp_path.iterdir())


# --- the writers ---------------------------------------------------------------------------------


class Recorder:
    """A test double: a writer that keeps what it is given."""

    package = "json"
    opened = []

    def __init__(self, run):
        self.run, self.points, self.closed = run, [], False
        Recorder.opened.append(self)

    def scalars(self, step, values):
        self.points.append((step, values))

    def close(self):
        self.closed = True


@pytest.fixture
def recorder(monkeypatch):
    """Is a writer now; the list of those that were opened."""
    monkeypatch.setattr(Recorder, "opened", [])
    monkeypatch.setitem(writers.WRITERS, "recorder", Recorder)
    return Recorder.opened


def test_a_writer_is_told_of_the_run_and_given_every_value_in_order(tmp_path, recorder):
    workdir = tmp_path / "qm9-quick"
    workdir.mkdir()
    write = open_writers(workdir, "recorder", "recorder", step=0)  # twice is once
    write_run(write, (1, 2))
    write.close()
    (opened,) = recorder
    run = opened.run
    assert (run.name, run.project, run.config, run.step) == ("qm9-quick", "a project", CONFIG, 0)
    assert opened.closed
    assert opened.points == [
        (1, {"train/loss": 1.0, "train/learning_rate": 1e-3}),
        (1, {"speed/rate": 100.0}),
        (2, {"train/loss": 0.5, "train/learning_rate": 1e-3}),
        (2, {"speed/rate": 100.0}),
        (2, {"validation/homo_mae": 0.25, "validation/score": 0.5}),
    ]


def read_events(folder):
    """{(step, name): value} of all event files, and the steps from which they purge."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points, purges = {}, []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.session_log.status == SessionLog.START:
                purges.append(event.step)
            for value in event.summary.value:
                points[event.step, value.tag] = value.simple_value
    return points, purges


def test_tensorboard_has_the_curves_and_purges_steps_that_run_again(tmp_path):
    write = open_writers(tmp_path, "tensorboard")
    write_run(write, (1, 2))
    write.close()
    points, purges = read_events(tmp_path / "events")
    assert points[2, "train/loss"] == 0.5
    assert points[2, "validation/score"] == 0.5
    assert points[1, "speed/rate"] == 100.0
    assert purges == [1]
    open_writers(tmp_path, "tensorboard", step=1).close()
    assert read_events(tmp_path / "events")[1][-1] == 2


class Broken:
    """A test double: a writer that fails in one of its parts, as one whose server is gone."""

    package = "json"

    def __init__(self, where, error):
        self._where, self._error, self.calls = where, error, []

    def __call__(self, run):
        return self._do("open") or self

    def scalars(self, step, values):
        self._do("scalars")

    def close(self):
        self._do("close")

    def _do(self, part):
        self.calls.append(part)
        if part == self._where:
            raise self._error


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), SystemExit(1)], ids=type)
@pytest.mark.parametrize("where", ["open", "scalars", "close"])
def test_a_writer_that_fails_is_switched_off_and_stops_nothing(
    tmp_path, monkeypatch, said, recorder, where, error
):
    broken = Broken(where, error)
    monkeypatch.setitem(writers.WRITERS, "broken", broken)
    write = open_writers(tmp_path, "broken", "recorder")
    write_run(write, range(1, 5))
    write.close()
    (line,) = said
    assert "'broken'" in line and type(error).__name__ in line and "\n" not in line
    assert broken.calls.count(where) == 1  # nothing is tried again
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert len(recorder[0].points) == 10 and recorder[0].closed


class Hanging:
    """A test double: a writer that waits, for ever unless it is let go."""

    package = "json"

    def __init__(self, let_go):
        self._let_go = let_go

    def __call__(self, run):
        self._let_go.wait(60)
        return self

    def scalars(self, step, values): ...

    def close(self): ...


@pytest.mark.parametrize("most, reason", [(100, "did not finish"), (3, "3 lines behind")])
def test_a_writer_that_hangs_delays_nothing(tmp_path, monkeypatch, said, most, reason):
    let_go = threading.Event()
    monkeypatch.setitem(writers.WRITERS, "hanging", Hanging(let_go))
    monkeypatch.setattr(writers, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(writers, "_MOST_WAITING", most)
    write = open_writers(tmp_path, "hanging")
    write_run(write, range(1, 5))  # would wait a minute in each line, and pytest's limit end it
    write.close()
    let_go.set()
    (line,) = said
    assert "'hanging'" in line and reason in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


# --- errors at the start -------------------------------------------------------------------------


@pytest.mark.parametrize("is_main", [True, False])
def test_an_unknown_writer_is_refused_on_every_process(tmp_path, is_main):
    with pytest.raises(UserError, match="'wandbb'.* Did you mean 'wandb'.*mlflow"):
        open_writers(tmp_path, "wandbb", is_main=is_main)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [False, True])
def test_a_package_that_is_not_installed_names_the_extra(tmp_path, monkeypatch, folder):
    """A folder `wandb/`, as wandb leaves behind, is no package."""

    class Missing(Recorder):
        package = "demetar_absent_package"

    monkeypatch.setitem(writers.WRITERS, "missing", Missing)
    if folder:
        (tmp_path / Missing.package).mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"pip install 'demetar\[missing\]'"):
        open_writers(tmp_path, "missing")


# --- the real ones -------------------------------------------------------------------------------


def two_starts(workdir, name):
    """A run that is stopped after step 4, and goes on from its checkpoint of step 2."""
    for steps in (range(1, 5), range(3, 7)):
        write = open_writers(workdir, name, step=steps[0] - 1, last_eval_step=steps[0] - 1)
        write_run(write, steps)
        write.close()


@pytest.mark.slow
def test_wandb_offline_goes_on_with_the_same_run(tmp_path, monkeypatch, said):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody is logged in
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    workdir = tmp_path / "run"
    workdir.mkdir()
    two_starts(workdir, "wandb")
    assert not said
    run_id = json.loads((workdir / "wandb_run.json").read_text())["id"]
    # Named by second and id: two starts within a second share one.
    starts = list((workdir / "wandb").glob("offline-run-*"))
    assert {start.name.split("-")[-1] for start in starts} == {run_id}
    assert all((start / f"run-{run_id}.wandb").stat().st_size > 0 for start in starts)


@pytest.mark.slow
def test_mlflow_goes_on_with_the_same_run(tmp_path, monkeypatch, said):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    workdir = tmp_path / "run"
    workdir.mkdir()
    monkeypatch.setattr(writers, "CLOSE_SECONDS", 120)  # a new database takes its time
    two_starts(workdir, "mlflow")
    assert not said
    experiment = mlflow.get_experiment_by_name("a project")
    (run,) = mlflow.MlflowClient().search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["optim.learning_rate"] == "0.001"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == {n: 1 / n for n in range(1, 7)}
