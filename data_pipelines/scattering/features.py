"""Scattering coefficients of all molecules of a data set, computed once and kept.

Each molecule first turns its principal axes to those of the grid, the longest to the first: the
grid can be small, and a molecule's own orientation in the file does not matter (where two axes are
equally long, as in methane, it does).

Finished parts lie beside the preparation while it is being made, so that a killed one goes on
where it was.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import socket

import jax
import numpy as np
from tqdm import tqdm

from data_pipelines.cores import usable_cores
from data_pipelines.errors import UserError, check_known
from data_pipelines.json_text import json_text
from data_pipelines.prepared import default_cache_dir, prepare, write
from data_pipelines.scattering.transform import Scattering, coefficients

GRAPH_FEATURES = ("none", "scattering")
# 171 numbers in 27 milliseconds of one core for each molecule; all of QM9 fits the grid.
DEFAULTS = {
    "shape": (39, 25, 21),  # pixels along each axis; odd numbers cost half
    "J": 2,  # largest wavelet is sigma 2^J wide
    "L": 2,  # highest degree of the harmonics
    "sigma": 1.0,  # width of an atom and of the smallest wavelet, pixels
    "powers": (1.0, 2.0, 3.0),  # of the fields that are summed over the grid
    "pixels_per_angstrom": 2.0,
}
_VERSION = 1  # raise it when features that were prepared before must not be used
_MARGIN = 3  # widths of an atom between its centre and the end of the grid
_PART, _TOGETHER = 512, 4  # molecules of a file, and of one call
# Coefficients are almost linear in each other: spreads of directions go from 6 to 1e-14, and below
# 1e-12 there is only the rounding of float32. Directions narrower than this are not widened to 1.
_NARROWEST = 1e-8


def load(kind: str, options, molecules, train_g: np.ndarray, cache_dir: str = ""):
    """[G, P] float64 to learn from, see `decorrelated`; None for `none`.

    Args:
      kind: of `GRAPH_FEATURES`.
      options: keys of `DEFAULTS`.
      molecules: see `compute`.
      train_g: positions of the training part.
      cache_dir: where prepared data live; empty: `default_cache_dir()`.
    """
    check_known("config.data.graph_features", kind, GRAPH_FEATURES)
    if kind == "none":
        return None
    return decorrelated(compute(options, molecules, cache_dir), train_g)


def compute(options, molecules, cache_dir: str = "") -> np.ndarray:
    """[G, P] float32: `transform.coefficients` of all molecules, prepared first where needed.

    Args:
      options: keys of `DEFAULTS`.
      molecules: `index`, `node_offset`, `atomic_number` and `position` (angstrom) of all.
      cache_dir: as of `load`.
    """
    scattering = make_scattering(options)
    root = pathlib.Path(cache_dir or default_cache_dir()) / "scattering"
    folder = root / _key(scattering, molecules)
    parts = root / f"{folder.name}.parts"
    size = len(molecules.index) * scattering.num_coefficients * 8 // 10**6 + 1
    arrays, _ = prepare(
        folder, lambda building: _build(scattering, molecules, parts, building), f"{size} MB"
    )
    shutil.rmtree(parts, ignore_errors=True)
    return arrays["graph_feature"]


def standardized(feature_GxP: np.ndarray, train_g: np.ndarray) -> np.ndarray:
    """[G, P] float64: each column with mean 0 and deviation 1 over the training part."""
    feature_GxP = feature_GxP.astype(np.float64)
    mean_P, deviation_P = feature_GxP[train_g].mean(axis=0), feature_GxP[train_g].std(axis=0)
    return (feature_GxP - mean_P) / np.where(deviation_P > 0, deviation_P, 1)


def decorrelated(feature_GxP: np.ndarray, train_g: np.ndarray) -> np.ndarray:
    """[G, P] float64: standardised, then times covariance^(-1/2) of the training part.

    A gradient descent sees only the widest directions of what is just standardised. The
    symmetric root does not depend on signs that another machine would choose for eigenvectors.
    """
    standard_GxP = standardized(feature_GxP, train_g)
    spread_P, directions_PxP = np.linalg.eigh(
        standard_GxP[train_g].T @ standard_GxP[train_g] / len(train_g)
    )
    widen_P = 1 / np.sqrt(np.maximum(spread_P, 0) + _NARROWEST)
    return standard_GxP @ ((directions_PxP * widen_P) @ directions_PxP.T)


def make_scattering(options) -> Scattering:
    """The options of `config.data.scattering`, checked."""
    shape, powers = tuple(options["shape"]), tuple(float(q) for q in options["powers"])
    if len(shape) != 3 or any(type(n) is not int or n < 4 for n in shape):
        raise UserError(
            f"config.data.scattering.shape is {shape}: give three numbers of pixels, each at "
            "least 4, such as (39, 25, 21)."
        )
    if not powers or min(powers) <= 0:
        raise UserError(f"config.data.scattering.powers is {powers}: give numbers above 0.")
    for key, least in (("J", 0), ("L", 0)):
        if options[key] < least:
            raise UserError(f"config.data.scattering.{key} ({options[key]}) must be at least 0.")
    for key in ("sigma", "pixels_per_angstrom"):
        if not options[key] > 0:
            raise UserError(f"config.data.scattering.{key} ({options[key]}) must be above 0.")
    return Scattering(**(dict(options) | {"shape": shape, "powers": powers}))


def _key(scattering: Scattering, molecules) -> str:
    """Names a preparation after what it is made from: options, atoms and positions."""
    text = f"{_VERSION}:{json_text(dataclasses.asdict(scattering))}"
    digest = hashlib.sha256(text.encode())
    digest.update(molecules.node_offset.astype("<i8").tobytes())
    digest.update(molecules.atomic_number.astype("<i4").tobytes())
    digest.update(molecules.position.astype("<f4").tobytes())
    return digest.hexdigest()[:12]


# --- preparing ---------------------------------------------------------------------------------


def _build(scattering: Scattering, molecules, parts: pathlib.Path, folder: pathlib.Path) -> None:
    positions_GxNx3, numbers_GxN = _padded(molecules)
    _check_fit(scattering, positions_GxNx3, numbers_GxN, molecules.index)
    num = len(molecules.index)
    files = {start: parts / f"{start:08d}.npy" for start in range(0, num, _PART)}
    parts.mkdir(exist_ok=True)
    ready = sum(min(_PART, num - start) for start, file in files.items() if file.exists())
    cores = len(usable_cores())
    with (
        concurrent.futures.ThreadPoolExecutor(cores) as threads,
        tqdm(total=num, initial=ready, desc="Scattering", unit=" molecules") as bar,
    ):
        for start, file in files.items():
            if not file.exists():
                rows = slice(start, start + _PART)
                found = _compute(scattering, positions_GxNx3[rows], numbers_GxN[rows], threads, bar)
                unfinished = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
                with unfinished.open("wb") as stream:
                    np.save(stream, found)
                unfinished.rename(file)
    feature_GxP = np.concatenate([np.load(file) for file in files.values()])
    if not np.isfinite(feature_GxP).all():
        row = np.flatnonzero(~np.isfinite(feature_GxP).all(axis=1))[0]
        raise UserError(
            f"Scattering of molecule {molecules.index[row]} is not finite: choose other "
            "config.data.scattering.powers."
        )
    write(folder, {"graph_feature": feature_GxP}, {"scattering": dataclasses.asdict(scattering)})


def _compute(scattering, positions_gxNx3, numbers_gxN, threads, bar) -> np.ndarray:
    """[g, P] float32, a few molecules in each call, calls side by side on all cores."""
    function = _compiled(scattering)

    def few(start: int) -> np.ndarray:
        rows = slice(start, start + _TOGETHER)
        given = positions_gxNx3[rows], numbers_gxN[rows]
        count = len(given[1])
        padded = [np.pad(x, [(0, _TOGETHER - count)] + [(0, 0)] * (x.ndim - 1)) for x in given]
        found = np.asarray(function(*padded))[:count]
        bar.update(count)
        return found

    return np.concatenate(list(threads.map(few, range(0, len(numbers_gxN), _TOGETHER))))


@functools.cache
def _compiled(scattering: Scattering):
    return jax.jit(jax.vmap(lambda position, number: coefficients(position, number, scattering)))


def _padded(molecules) -> tuple[np.ndarray, np.ndarray]:
    """Positions along the principal axes [G, N, 3] float32, atomic numbers [G, N] int32."""
    starts, counts = molecules.node_offset[:-1], np.diff(molecules.node_offset)
    slots = np.arange(counts.max())
    mask = slots < counts[:, None]
    atoms = np.where(mask, starts[:, None] + slots, 0)
    x_GxNx3 = molecules.position[atoms].astype(np.float64) * mask[..., None]
    x_GxNx3 -= x_GxNx3.sum(axis=1, keepdims=True) / counts[:, None, None]
    x_GxNx3 *= mask[..., None]
    _, axes_Gx3x3 = np.linalg.eigh(x_GxNx3.swapaxes(1, 2) @ x_GxNx3)
    numbers_GxN = np.where(mask, molecules.atomic_number[atoms], 0)
    return (x_GxNx3 @ axes_Gx3x3[..., ::-1]).astype(np.float32), numbers_GxN.astype(np.int32)


def _check_fit(scattering: Scattering, positions_GxNx3, numbers_GxN, index_G) -> None:
    reach_Gx3 = np.abs(positions_GxNx3).max(axis=1) * scattering.pixels_per_angstrom
    needed_Gx3 = 2 * (reach_Gx3 + _MARGIN * scattering.sigma)
    if (needed_Gx3 > scattering.shape).any():
        row = (needed_Gx3 - scattering.shape).max(axis=1).argmax()
        enough = tuple(int(n) // 2 * 2 + 1 for n in np.ceil(needed_Gx3.max(axis=0)))
        needs = tuple(np.ceil(needed_Gx3[row]).astype(int).tolist())
        raise UserError(
            f"Molecule {index_G[row]} needs {needs} pixels, but config.data.scattering.shape "
            f"is {scattering.shape}: set it to {enough} or more, or "
            "config.data.scattering.pixels_per_angstrom to less."
        )
