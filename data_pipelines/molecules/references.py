"""Atom references: what of an extensive target the elements of a molecule alone explain.

    label = target - sum over atoms of reference[element]

They are fitted by least squares over the training part in float64 (as MACE's average E0s), read
from a file, or left out. A total energy of -411 hartree in float32 is exact only to 0.8 meV; what
is left after the references is small.
"""

import json
import pathlib

import numpy as np

from data_pipelines.elements import atomic_number, symbols
from data_pipelines.errors import UserError
from data_pipelines.ranges import FINITE, check_range


def fit(label_g: np.ndarray, composition_gxZ: np.ndarray, elements) -> dict[int, float]:
    """Atomic number -> its reference in the unit of the labels; NaN labels are left out.

    An element that no labelled molecule has gets 0. Of elements that always stand in the same
    ratio, the solution of least norm.
    """
    known = ~np.isnan(label_g)
    solution, *_ = np.linalg.lstsq(composition_gxZ[known].astype(np.float64), label_g[known])
    return {int(z): float(value) for z, value in zip(elements, solution, strict=True)}


def read(path: str, target: str, elements) -> dict[int, float]:
    """References of a target from a JSON file `{"U0": {"H": -13.6, "C": -1029.8}}`, in its unit."""
    try:
        table = json.loads(pathlib.Path(path).read_text())
        given = {atomic_number(symbol): float(value) for symbol, value in table[target].items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"config.data.references ({path!r}) is neither 'fit' nor 'none' nor a JSON file with "
            f'the atoms of target {target!r} as {{"{target}": {{"H": -13.6}}}}: {error!r}.'
        ) from error
    missing = [symbols()[z] for z in elements if z not in given]
    if missing:
        raise UserError(
            f"{path} has no reference of {', '.join(missing)} for target {target!r}: add it."
        )
    for z in elements:
        check_range(f"The reference of {symbols()[z]} for {target!r} in {path}", given[z], FINITE)
    return {z: given[z] for z in elements}


def total(references: dict[int, float], composition_gxZ: np.ndarray, elements) -> np.ndarray:
    """[g] sum of the references of each molecule's atoms, float64."""
    return composition_gxZ.astype(np.float64) @ np.array([references[z] for z in elements])
