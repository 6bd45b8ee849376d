"""`demetar qm9-table`: which runs make which targets, and the table of what they found."""

import json

import pytest

from demetar import qm9_table
from demetar.config.command_line import load_config
from demetar.tools import local_job, qm9_page
from demetar.tools.qm9_page import BUDGETS, GROUPS

TWELVE = "mu alpha homo lumo gap r2 zpve U0 U H G Cv".split()


def finished(runs, group, errors, budget="quick", seed=0):
    """The files of a run that has ended, as far as the table reads them."""
    workdir = runs / f"{budget}-{group}-{seed}"
    workdir.mkdir(parents=True)
    targets = {
        name: {"mae": error, "interval_95": [error - 0.5, error + 0.5], "unit": "meV"}
        | {"mae_of_training_mean": 10 * error}
        for name, error in errors.items()
    }
    result = {
        "seed": seed, "step": 20, "train_seconds": 90.0, "split_name": "dimenet",
        "config": {"train": {"num_steps": 30}, "data": {"batch_size": 4}}, "targets": targets,
        "git_commit": "abc", "processor": "a CPU", "devices": "2 x cpu", "params_sha256": "0",
    }  # fmt: skip
    (workdir / "result.json").write_text(json.dumps(result))
    lines = [
        {"split": "validation", "step": step} | {f"{name}_mae": step for name in errors}
        for step in (10, 20, 30)
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return workdir


def test_the_groups_are_the_twelve_targets_once():
    assert sorted(sum(GROUPS.values(), ())) == sorted(TWELVE)


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_group_has_a_config_with_the_readout_that_suits_it(budget):
    for group, targets in GROUPS.items():
        config = load_config(f"qm9:{','.join((budget, *targets))}")
        assert config.data.targets == targets
        own = {"orbitals": "mean", "dipole": "dipole", "extent": "extent"}
        wanted = own.get(group, "auto")
        assert config.model.readout == wanted


def test_what_is_finished_is_read_and_what_is_missing_is_trained(tmp_path, monkeypatch, capsys):
    finished(tmp_path, "orbitals", {"homo": 40.25, "lumo": 35.0, "gap": 60.0})
    trained = []

    def train(command, count):
        trained.append(command)
        finished(tmp_path, "dipole", {"mu": 0.0312})
        return 0

    monkeypatch.setattr(local_job, "run", train)
    code = qm9_table.main(["--budget=quick", "--targets=gap,mu", f"--runs={tmp_path}"])
    assert code == 0
    (command,) = trained
    assert (
        command[0] == "--config=qm9:quick,mu" and f"--workdir={tmp_path}/quick-dipole-0" in command
    )
    said = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in said[-1].split("|")]
    assert cells[1:6] == ["`qm9:quick`, ten minutes", "0", "0.031", "", "40.2"]
    assert cells.count("") == 2 + 12 - 4  # what nothing was trained for is blank


def test_a_training_that_does_not_end_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(local_job, "run", lambda command, count: 75)
    assert qm9_table.main(["--budget=quick", f"--runs={tmp_path}"]) == 75


def test_an_unknown_target_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        qm9_table.main(["--budget=quick", "--targets=homu", f"--runs={tmp_path}"])
    assert "Did you mean 'homo'?" in capsys.readouterr().err


def test_a_row_says_how_it_was_made_and_what_validation_chose(tmp_path):
    workdir = finished(tmp_path, "dipole", {"mu": 0.0312})
    row = qm9_page.facts(workdir, "quick", ["--config=qm9:quick,mu"])
    assert row["command"] == "python -m demetar.main --config=qm9:quick,mu"
    assert row["targets"]["mu"]["validation"] == 20  # of the step whose weights were tested
    page = qm9_page.text([row])
    assert "| `python -m demetar.main --config=qm9:quick,mu` | μ 0.031 (-0.469 to 0.531) |" in page
    assert "abc" in page and "a CPU" in page


def test_rows_of_other_runs_stay(tmp_path, monkeypatch):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.setattr(qm9_page, "_ROOT", tmp_path)
    monkeypatch.setattr(qm9_page, "_JSON", tmp_path / "qm9.json")
    monkeypatch.setattr(qm9_page, "_PAGE", tmp_path / "qm9.md")
    for seed, error in ((1, 40.0), (0, 41.0), (1, 42.0)):
        folder = finished(tmp_path / f"{seed}-{error}", "orbitals", {"homo": error}, seed=seed)
        qm9_page.keep([qm9_page.facts(folder, "quick", [])])
    rows = json.loads((tmp_path / "qm9.json").read_text())
    assert [(row["seed"], row["targets"]["homo"]["test"]) for row in rows] == [(0, 41.0), (1, 42.0)]
