"""Errors of a model on a file that has the truth in its columns."""

import csv
import math
import pathlib
import tempfile

import numpy as np

from data_pipelines.errors import UserError, check_known
from data_pipelines.molecules import readers, units
from demetar.inference.model import Model
from demetar.inference.prediction import Prediction, predict_file
from demetar.job.place import Place


def score_file(
    model: Model, path: pathlib.Path, columns: tuple[str, ...], smiles: str = ""
) -> dict:
    """Mean errors of the predictions for the rows that have a label and a prediction.

    Args:
      model: that predicts.
      path: file of molecules.
      columns: targets with the unit that they have in the file, as `homo:eV`.
      smiles: column of SMILES; "": found by its name.

    Returns:
      `rows`, `predicted`, `status` -> number, and for each target `mae` and `rmse` in the `unit` of
      the model, `count`, and `bias`, the mean of prediction minus label.
    """
    wanted = [units.parse_column(text) for text in columns]
    targets = {target.name: target for target in model.targets}
    known = readers.columns(path)
    for column in wanted:
        check_known(f"target of model {model.name}:", column.name, targets)
        check_known(f"column of {path.name}:", column.name, known)
        if targets[column.name].per_node:
            raise UserError(f"{column.name} is a target of atoms: a file has no column of it.")
        units.factor(column.unit, targets[column.name].unit)  # refused before any is predicted
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "predicted.csv"
        counts = predict_file(Prediction(model, path, out, smiles), Place("one process"))
        with out.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    found = {"rows": len(rows), "predicted": counts["ok"], "status": dict(counts), "targets": {}}
    for column in wanted:
        unit = targets[column.name].unit
        label = np.array([_number(row[column.name]) for row in rows])
        label = units.convert(label, column.unit, unit)
        error = np.array([_number(row[f"{column.name}_pred"]) for row in rows]) - label
        error = error[~np.isnan(error)]
        if not len(error):
            raise UserError(f"No row of {path} has both a label {column.name!r} and a prediction.")
        found["targets"][column.name] = {
            "mae": float(np.abs(error).mean()),
            "rmse": float(np.sqrt(np.square(error).mean())),
            "bias": float(error.mean()),
            "unit": unit,
            "count": len(error),
        }
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
