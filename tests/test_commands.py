"""The commands: what `demetar` starts and refuses, what the package carries, from any folder."""

import json
import pathlib
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

import demetar
from data_pipelines.errors import UserError
from demetar import cli, evaluate, main, model_files
from demetar.exits import EXIT_DONE, EXIT_USER_ERROR
from demetar.inference import package, runs
from demetar.training import runtime
from demetar.training.experiment import build_experiment

REPOSITORY = pathlib.Path(__file__).parents[1]


def refused(capsys, command, *arguments):
    """What a command that exits with 2 says."""
    with pytest.raises(SystemExit) as end:
        command(list(arguments))
    said = capsys.readouterr().err
    assert end.value.code == EXIT_USER_ERROR and "Traceback" not in said
    return said


@pytest.fixture
def foreign(tmp_path):
    """A folder of somebody else, with names of ours that must not be imported."""
    for name in ("data_pipelines", "demetar", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('foreign')")
    (tmp_path / "configs" / "nbody.py").write_text("raise RuntimeError('foreign')")
    return tmp_path


# --- demetar -------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)
    assert cli.main([]) == EXIT_USER_ERROR


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert not end.value.code and said.startswith("usage: demetar")
    assert len(said.splitlines()) > 5


def test_version(capsys):
    assert cli.main(["--version"]) == EXIT_DONE
    assert capsys.readouterr().out.split()[0] == "demetar"


def test_an_unknown_command_is_refused(capsys):
    said = refused(capsys, cli.main, "trian", "--config=qm9")
    assert "Unknown command 'trian'. Did you mean 'train'?" in said


def test_help_is_quick_and_import_is_lazy():
    code = (
        "import sys, demetar; from demetar import cli; cli.main(['--help']); "
        "heavy = {'jax', 'numpy', 'flax', 'absl', 'ml_collections'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: --config"),
        (["--config=qm8"], "Did you mean 'qm9'?"),
        (["--config=qm9:smoke", "--config.optim.learning_rat=1"], "Did you mean config.optim.lea"),
        (["--config=qm9:smoke", "--wrkdir=x"], "Did you mean '--workdir'?"),
        (["--config=qm9:smoke", "--num_processes=two"], "invalid int value: 'two'"),
    ],
)
def test_train_refuses_before_it_starts(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, main.main, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=nowhere"], "nowhere is not the folder of a run"),
        (["--pretrained=nbody-egnn-e3-seed3"], "Did you mean 'nbody-egnn-e3-seed"),
        (["--pretrained=x", "--workdir=y"], "not allowed with"),
        ([], "one of the arguments --workdir --pretrained --model is required"),
        (["--workdir=x", "--split=tests"], "invalid choice: 'tests'"),
        (["--workdir=x", "--config=qm9"], "demetar evaluate has no option '--config'"),
        (["--workdir=x", "--target=homo:eV"], "are columns of a FILE"),
        (["--pretrained=x", "--smiles=s"], "are columns of a FILE"),
        (["f.csv", "--model=x", "--split=train"], "a FILE is scored whole"),
    ],
)
def test_evaluate_refuses(arguments, message, capsys):
    assert message in refused(capsys, evaluate.main, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["save", "--workdir=x", f"--name={demetar.pretrained_names()[0]}"], "ships already"),
        (["save", "--workdir=x", "--name=new"], "holds no finished run"),
        (["save", "--workdir=x"], "one of the arguments --out --name is required"),
        (["verify", "nbody-egnn-e3-seed3"], "Did you mean 'nbody-egnn-e3-seed"),
        (["export", "nbody-egnn-e3-seed0", "--out=x", "--platforms=gpu"], "Unknown platform 'gpu'"),
        (["list"], "invalid choice: 'list'"),
    ],
)
def test_models_refuses(arguments, message, capsys):
    assert message in refused(capsys, model_files.main, *arguments)


# --- from any folder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `pip install .` would install, as a file."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("demetar", "data_pipelines", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / file, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_carries_all_that_the_code_reads(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        str(file.relative_to(REPOSITORY))
        for folder in ("demetar", "data_pipelines", "configs")
        for file in (REPOSITORY / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert inside == {f"demetar/{x}" if x.startswith("configs/") else x for x in wanted}
    scripts = next(x for x in zipfile.ZipFile(wheel).namelist() if x.endswith("entry_points.txt"))
    assert b"demetar = demetar.cli:console" in zipfile.ZipFile(wheel).read(scripts)


def test_an_installed_package_finds_its_configs_and_its_own_modules(wheel, foreign):
    """The files of the wheel before all others on the path, as in a fresh environment."""
    site = foreign / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sys, demetar.cli, data_pipelines\n"
        "print(demetar.__file__, data_pipelines.__file__)\n"
        "from demetar.config import command_line\n"
        "print(*command_line.packaged_configs().values())\n"
        "sys.exit(demetar.cli.main(['train', '--config=qm9:smoke', '--config.sed=1']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=foreign,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_USER_ERROR and "Did you mean config.seed?" in done.stderr
    assert all(path.startswith(f"{site}/") for path in done.stdout.split())
    assert f"{site}/demetar/configs/qm9.py" in done.stdout


@pytest.fixture(scope="module")
def finished(runner, tmp_path_factory):
    """A run of `demetar train --config=nbody:...` in a folder with a `data_pipelines/`."""
    folder = tmp_path_factory.mktemp("anywhere")
    (folder / "data_pipelines").mkdir()
    (folder / "data_pipelines" / "__init__.py").write_text("raise RuntimeError('foreign')")
    options = [f"--config.data.cache_dir={runner.cache_dir}", "--config.data.eval_batch_size=16"]
    options += ["--config.train.num_steps=20", "--config.log.every_steps=20"]
    command = [sys.executable, "-P", "-m", "demetar.cli", "train", "--config=nbody:smoke,linear"]
    subprocess.run(
        [*command, *options],
        cwd=folder,
        env=runner.environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return folder / "runs" / "nbody-smoke-linear"


def test_a_run_from_any_folder_has_its_default_workdir(finished):
    assert json.loads((finished / "result.json").read_text())["step"] == 20


# --- weights that ship ---------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Commands run here, where JAX has started already; what they ship lies elsewhere."""
    monkeypatch.setattr(runtime, "configure", lambda config: None)
    monkeypatch.setattr(package, "SHIPPED", tmp_path)
    return tmp_path


def test_what_a_run_ships_is_what_it_was_tested_with(finished, in_this_process, capsys):
    """The same error by `evaluate` of the run, of the shipped model, and by `load_pretrained`."""
    assert model_files.main(["save", f"--workdir={finished}", "--name=mine"]) == EXIT_DONE
    assert "mine: position MSE" in capsys.readouterr().out
    of_run, of_model = (
        evaluate.main([argument]) or json.loads(capsys.readouterr().out)
        for argument in (f"--workdir={finished}", "--pretrained=mine")
    )
    assert of_model["same_data"] and of_model["targets"] == of_run["targets"]
    first = json.loads((finished / "result.json").read_text())
    assert of_model["published"]["targets"] == first["targets"]
    error = of_run["targets"]["position"]["mse"]
    assert error == pytest.approx(first["targets"]["position"]["mse"], rel=1e-6)
    dataset = build_experiment(package.read("mine").config).dataset
    test, arrays, n = dataset.split["test"], dataset.arrays, 4
    x, v, q = (
        a.reshape(-1, n, *a.shape[1:])[test]
        for a in (arrays.position, arrays.velocity, arrays.charge)
    )
    y = dataset.labels_of(dataset.targets[0], test).reshape(-1, n, 3).astype(np.float32)
    predicted = demetar.load_pretrained("mine")(position=x, velocity=v, charge=q)
    assert np.square(predicted - y).mean() == pytest.approx(error, rel=1e-5)


def test_a_card_says_all_that_a_model_needs(finished, in_this_process):
    model = runs.save(finished, in_this_process / "mine")
    assert model.targets[0].readout == "position" and model.facts["elements"] == (1,)
    assert model.facts["horizon"] == pytest.approx(0.02)
    assert model.config.data.cache_dir == "" and model.config.mesh.cpu_devices == 0
    assert model.network().horizon == model.facts["horizon"]


def test_a_shipped_model_is_compared_with_the_data_of_here(finished, in_this_process):
    runs.save(finished, in_this_process / "mine")
    file = in_this_process / "mine" / "model.json"
    card = json.loads(file.read_text())
    card["passport"]["content_sha256"] = "0" * 64  # another machine rounds differently
    file.write_text(json.dumps(card))
    assert evaluate.evaluate_pretrained("mine", "test")["same_data"] is False
    card["passport"]["protocol"]["num_particles"] = 5
    file.write_text(json.dumps(card))
    with pytest.raises(UserError, match="protocol.num_particles: 5 in the run, 4 today"):
        evaluate.evaluate_pretrained("mine", "test")
