"""`demetar faults`: some of the 72 for real, and that its oracles can fail."""

import json
import subprocess
import sys

import pytest

from demetar import faults
from demetar.exits import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from demetar.tools.faults import CASES, page
from demetar.tools.faults.bench import LOST, NOT_MADE, REFUSED, SURVIVED, Bench, Case, NotMade
from demetar.tools.faults.scene import perform

# Of each group some that are fast.
QUICK = {
    30: SURVIVED,
    36: SURVIVED,
    47: REFUSED,
    59: REFUSED,
    61: REFUSED,
    66: REFUSED,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def judged(bench, make):
    return perform(Case(0, "a fault", "somehow", "nothing lost", make), bench)


@pytest.mark.parametrize("number", QUICK)
def test_a_fault_of_each_group(bench, number):
    row = perform(CASES[number], bench)
    assert row["verdict"] == QUICK[number], row


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_of_them():
    done = subprocess.run([sys.executable, "-m", "demetar.faults"], stdout=subprocess.PIPE)
    assert done.returncode == EXIT_DONE, done.stdout
    assert json.loads(done.stdout)["counts"][LOST] == 0


def test_the_matrix_is_whole():
    assert list(CASES) == list(range(1, 73))
    assert all(case.fault and case.wanted for case in CASES.values())


# --- the oracles can fail ------------------------------------------------------------------------


def another_seed(scene):
    scene.train(1, "--config.seed=1")
    scene.ends_the_same()


def foreign_file(scene):
    (scene.half() / "checkpoints" / "40.orbax-checkpoint-tmp").mkdir()
    scene.no_damage()


def damaged_checkpoint(scene):
    (scene.half() / "checkpoints" / "40" / "commit_success.txt").unlink()
    scene.no_damage()


def changed_file(scene):
    before, file = scene.half() and scene.listing(), scene.run / "config.json"
    file.write_text(file.read_text() + " ")
    scene.unchanged(before)


def other_code(scene):
    scene.command("cli", "no_command", code=0)


def nothing_said(scene):
    scene.command("cli", "no_command", code=2, says="all is well")


def too_slow(scene):
    scene.train(within=0.1)


def nothing_refused(scene):
    scene.refuses(lambda: None, says="no")


def looks_at_nothing(scene):
    pass


def breaks(scene):
    raise RuntimeError("in the case itself")


@pytest.mark.parametrize(
    "make, oracle",
    [
        (another_seed, "state"),
        (foreign_file, "files"),
        (damaged_checkpoint, "files"),
        (changed_file, "files"),
        (other_code, "exit code"),
        (nothing_said, "sentence"),
        (too_slow, "time"),
        (nothing_refused, "sentence"),
        (breaks, "the case itself"),
        (looks_at_nothing, ""),
    ],
)
def test_a_fault_that_is_lost_is_called_so(bench, make, oracle):
    row = judged(bench, make)
    assert row["verdict"] == LOST
    assert any(line.startswith(oracle) for line in row["failed"]) or not oracle


def test_what_cannot_be_made_here_is_no_success(bench):
    def make(scene):
        raise NotMade("it needs a TPU")

    row = judged(bench, make)
    assert row["verdict"] == NOT_MADE and row["seen"] == ["it needs a TPU"]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_ends_with_1_if_one_is_lost(bench, monkeypatch, capsys):
    for verdict, code in ((SURVIVED, EXIT_DONE), (NOT_MADE, EXIT_DONE), (LOST, EXIT_FAILED)):
        row = judged(bench, looks_at_nothing) | {"verdict": verdict, "number": 7}
        monkeypatch.setattr(faults, "run", lambda numbers, folder, row=row: [row])
        assert faults.main(["--only=7"]) == code
        found = json.loads(capsys.readouterr().out)
        assert found["counts"][verdict] == 1 and found["commands"][0].endswith("--only=7")
        assert f"**{verdict}**" in page.text(found)


def test_rows_of_one_commit_are_joined_and_others_are_not():
    rows = [{"number": n, "verdict": SURVIVED} for n in (1, 2)]
    first, second = (page.facts([row], [f"--only={row['number']}"]) for row in rows)
    both = page.joined(first, second)
    assert both["rows"] == rows and both["counts"][SURVIVED] == len(both["commands"]) == 2
    assert page.joined(first | {"commit": "another"}, second) == second


def test_unknown_faults_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        faults.main(["--only=7,73"])
    assert end.value.code == EXIT_USER_ERROR
    assert "Unknown fault of --only '73'" in capsys.readouterr().err
