"""QM9 with the geometries that a prediction from SMILES has, prepared once for what is trained on.

The labels stay those of the published geometry. The SMILES is the first that QM9 gives of a
molecule (GDB-17's; it says nothing of stereo), atoms stand in its order, hydrogens after them.
A molecule whose geometry cannot be made is left out of its part and counted in the passport.
"""

import functools
import hashlib
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from data_pipelines.edges import row_numbers
from data_pipelines.errors import check_known
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.parallel import map_rows
from data_pipelines.molecules.record import Molecule, Row
from data_pipelines.prepared import default_cache_dir, prepare, write, write_parts
from data_pipelines.qm9 import preparation
from data_pipelines.qm9.preparation import MoleculeArrays

# "file+mmff": every molecule twice, in the same part.
QM9_GEOMETRIES = ("file", "etkdg", "mmff", "file+etkdg", "file+mmff")
_VERSION = 1  # raise it when geometries that were prepared before must not be used
_MOLECULES_OF_A_PART = 1_024
Parts = dict[str, np.ndarray]


def load(
    kind: str,
    molecules: MoleculeArrays,
    parts: Parts,
    passport: dict,
    source: str,
    path: str = "",
    cache_dir: str = "",
) -> tuple[MoleculeArrays, Parts, dict]:
    """Molecules of the parts with the geometries asked for, made first where needed.

    Args:
      kind: of `QM9_GEOMETRIES`.
      molecules, passport: of `preparation.load`.
      parts: positions of the molecules of each part.
      source, path, cache_dir: as `preparation.load` takes them.

    Returns:
      Molecules in ascending number (with `file+`: those of the file, then those made), the
      positions of each part in them, and the passport of these data.
    """
    check_known("config.data.geometry", kind, QM9_GEOMETRIES)
    if kind == "file":
        return molecules, parts, passport
    wanted_g = np.sort(np.concatenate(list(parts.values())))
    how = kind.removeprefix("file+")
    made, facts = _load_made(how, molecules, wanted_g, source, path, cache_dir)
    # Numbers are unique and ascending in both, so they say where a molecule is.
    found = {
        part: np.searchsorted(made.index, np.intersect1d(molecules.index[rows], made.index))
        for part, rows in parts.items()
    }
    if kind != how:
        made = joined(_taken(molecules, wanted_g), made)
        found = {
            part: np.concatenate(
                [np.searchsorted(wanted_g, np.sort(parts[part])), rows + len(wanted_g)]
            )
            for part, rows in found.items()
        }
    return made, found, passport | {"geometry": facts | {"kind": kind}}


def _load_made(how, molecules, wanted_g, source, path, cache_dir) -> tuple[MoleculeArrays, dict]:
    folder = preparation.folder_of(source, path, cache_dir)
    digest = hashlib.sha256(f"{_VERSION}:{how}:{folder.name}".encode())
    digest.update((folder / "passport.json").read_bytes())  # of all molecules, SMILES included
    digest.update(molecules.index[wanted_g].astype("<i8").tobytes())
    root = pathlib.Path(cache_dir or default_cache_dir()) / "qm9_geometry"
    name = f"{how}-{digest.hexdigest()[:12]}"
    # Made beside the final folder: what is done outlives a killed preparation.
    build = functools.partial(_build, how, folder, molecules, wanted_g, root / f"{name}.parts")
    arrays, passport = prepare(root / name, build, "1 KB for each molecule")
    rows = np.searchsorted(molecules.index, arrays["index"])
    return MoleculeArrays(**arrays, properties=molecules.properties[rows]), passport


def _taken(molecules: MoleculeArrays, rows_g: np.ndarray) -> MoleculeArrays:
    """Some of the molecules, in this order."""

    def rows_of(offset):
        counts = np.diff(offset)[rows_g]
        return np.concatenate([[0], np.cumsum(counts)]), row_numbers(offset[rows_g], counts)

    node_offset, nodes = rows_of(molecules.node_offset)
    bond_offset, bonds = rows_of(molecules.bond_offset)
    return MoleculeArrays(
        index=molecules.index[rows_g],
        node_offset=node_offset,
        atomic_number=molecules.atomic_number[nodes],
        position=molecules.position[nodes],
        bond_offset=bond_offset,
        bonds=molecules.bonds[bonds],
        properties=molecules.properties[rows_g],
    )


def joined(first: MoleculeArrays, second: MoleculeArrays) -> MoleculeArrays:
    """The molecules of both, one after the other."""
    both = {}
    for name, values in vars(first).items():
        others = getattr(second, name)
        if name.endswith("_offset"):
            others = others[1:] + values[-1]
        both[name] = np.concatenate([values, others])
    return MoleculeArrays(**both)


# --- making ----------------------------------------------------------------------------------


def _build(how, source: pathlib.Path, molecules, wanted_g, parts: pathlib.Path, folder) -> None:
    def make(done: int) -> Iterator:
        # Called by its own name, so that the processes import nothing of a data set, and no JAX.
        make_one = functools.partial(make_molecule, geometry=how)
        return map_rows(make_one, _rows(source, molecules, wanted_g[done:]))

    def pack(start: int, made: list) -> dict[str, np.ndarray]:
        return _columns(molecules.index[wanted_g[start : start + len(made)]], made)

    bar = {"desc": f"Making {how} geometries of QM9", "unit": " molecules", "total": len(wanted_g)}
    arrays, failed = _join(write_parts(parts, make, _MOLECULES_OF_A_PART, pack, bar))
    assert len(arrays["index"]) + len(failed) == len(wanted_g)
    write(folder, arrays, _passport(how, arrays, failed))
    shutil.rmtree(parts)


def _rows(source: pathlib.Path, molecules: MoleculeArrays, wanted_g) -> Iterator[Row]:
    records = preparation.records_of(source, "", positions=wanted_g)
    smiles = (record["smiles"].decode() for chunk in records for record in chunk)
    for index, text in zip(molecules.index[wanted_g].tolist(), smiles, strict=True):
        yield Row(index, smiles=text)


def _columns(index_g: np.ndarray, made: list) -> dict[str, np.ndarray]:
    good = np.array([isinstance(m, Molecule) for m in made])
    kept = [m for m in made if isinstance(m, Molecule)]
    joined = lambda name, empty: np.concatenate([empty, *(getattr(m, name) for m in kept)])
    return {
        "index": index_g[good],
        "failed": index_g[~good],
        "nodes": np.array([len(m.atomic_numbers) for m in kept], np.int64),
        "edges": np.array([len(m.bonds) for m in kept], np.int64),
        "atomic_number": joined("atomic_numbers", np.zeros(0, np.uint8)),
        "position": joined("positions", np.zeros((0, 3), np.float32)),
        "bonds": joined("bonds", np.zeros((0, 3), np.uint16)),
    }


def _join(files: list[pathlib.Path]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    parts = [dict(np.load(file, allow_pickle=False)) for file in files]
    all_of = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    offset = lambda counts: np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    arrays = {name: all_of[name] for name in ("index", "atomic_number", "position", "bonds")}
    arrays |= {"node_offset": offset(all_of["nodes"]), "bond_offset": offset(all_of["edges"])}
    return arrays, all_of["failed"]


def _passport(how: str, arrays: dict, failed: np.ndarray) -> dict:
    import rdkit

    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return {
        "made": how,
        "from": "the first SMILES of QM9, which says nothing of stereo",
        "rdkit": rdkit.__version__,
        "molecules": len(arrays["index"]),
        "failed": len(failed),
        "failed_numbers": failed.tolist(),
        "content_sha256": digest.hexdigest(),
    }
