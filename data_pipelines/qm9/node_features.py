"""What a model may be told of each atom beside its element, prepared once like the molecules."""

import hashlib
import pathlib

import numpy as np

from data_pipelines.bonds import chemistry_of_atoms
from data_pipelines.errors import check_known
from data_pipelines.prepared import default_cache_dir, prepare, write
from data_pipelines.qm9 import preparation
from data_pipelines.qm9.properties import ELEMENTS

_VERSION = 1  # raise it when features that were prepared before must not be used
# "pyg": as PyTorch Geometric describes QM9: one-hot H C N O F, atomic number, aromatic, sp, sp2,
# sp3, number of hydrogen neighbours.
NODE_FEATURES = ("none", "pyg")


def load(kind: str, source: str, path: str = "", cache_dir: str = "") -> np.ndarray | None:
    """[atoms, 11] uint8 in the order of `preparation.load` of the same source; None for `none`.

    Args:
      kind: of `NODE_FEATURES`.
      source, path, cache_dir: as `preparation.load` takes them, which has prepared the molecules.
    """
    check_known("config.data.node_features", kind, NODE_FEATURES)
    if kind == "none":
        return None
    molecules = preparation.folder_of(source, path, cache_dir)
    # The molecules' folder and passport name the source and its content, SMILES included.
    identity = molecules.name.encode() + (molecules / "passport.json").read_bytes()
    key = hashlib.sha256(f"{_VERSION}:".encode() + identity).hexdigest()[:12]
    root = pathlib.Path(cache_dir or default_cache_dir()) / "qm9_node_features"
    arrays, _ = prepare(
        root / f"{kind}-{key}", lambda folder: _build(molecules, kind, folder), "50 MB"
    )
    return arrays["node_feature"]


def _build(molecules: pathlib.Path, kind: str, folder: pathlib.Path) -> None:
    rows = []
    for records in preparation.records_of(molecules, "Describing atoms of QM9"):
        rows += [describe(r["smiles"].decode(), r["atomic_number"], r["bonds"]) for r in records]
    write(folder, {"node_feature": np.concatenate(rows)}, {"node_features": kind})


def describe(smiles: str, atomic_numbers_N: np.ndarray, bonds_bx3: np.ndarray) -> np.ndarray:
    """[N, 11] uint8 of one molecule, as "pyg" says; `bonds_bx3` of `find_bonds`."""
    one_hot_NxZ = atomic_numbers_N[:, None] == np.array(ELEMENTS)
    chemistry_Nx5 = chemistry_of_atoms(smiles, atomic_numbers_N, bonds_bx3)
    return np.concatenate([one_hot_NxZ, atomic_numbers_N[:, None], chemistry_Nx5], axis=1).astype(
        np.uint8
    )
