"""The model of a run: its best weights, read from its checkpoints, which are not changed."""

import dataclasses
import json
import pathlib

import jax

from data_pipelines.errors import UserError
from demetar.config import stored
from demetar.inference.card import describe
from demetar.inference.model import Model
from demetar.inference.package import Package, with_hash, write
from demetar.training import runtime
from demetar.training.checkpoints import read_best
from demetar.training.experiment import Experiment, build_experiment


def package_of_run(workdir: pathlib.Path, licence: str = "") -> tuple[Package, Experiment]:
    """The best weights of a run with their card, and its experiment, on one device.

    Args:
      workdir: of a run, finished or not.
      licence: of the weights.
    """
    step, params, saved = read_best(workdir)
    config = stored.on_one_device(stored.from_json(saved["config"]))
    with jax.enable_x64(stored.real_dtype(config) == "float64"):
        experiment = build_experiment(config)
    stored.check_same_run(saved, experiment.identity, workdir)
    result = {"step": step}
    if (workdir / "result.json").exists():
        result = json.loads((workdir / "result.json").read_text())
    found = Package(workdir.resolve().name, params, describe(experiment, result, licence))
    return with_hash(found), experiment


def model_of_run(workdir: pathlib.Path) -> Model:
    """The best weights of a run, to predict with."""
    return Model(*package_of_run(workdir))


def save(workdir: pathlib.Path, destination: pathlib.Path, licence: str = "") -> Package:
    """Writes the model of a finished run; returns what was written.

    Args:
      workdir: of the run.
      destination: a folder, or a file `.zip`; must not exist.
      licence: of the weights.
    """
    if not (workdir / "result.json").exists():
        raise UserError(f"{workdir} holds no finished run: it has no result.json.")
    found, experiment = package_of_run(workdir, licence)
    runtime.configure(found.config)
    if experiment.dataset.items == "molecules":
        domain = Model(found, experiment).domain
        found = dataclasses.replace(found, domain=domain.arrays() if domain else {})
    return write(found, destination)
