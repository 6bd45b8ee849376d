"""QM9 prepared once: ArrayRecord to keep, memory-mapped arrays to train from, a passport.

    source --our TFDS builder--> ArrayRecord --decoded once--> arrays/*.npy + passport.json

How a preparation survives kills, races and damage: `prepared.py`.
"""

import contextlib
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from data_pipelines.elements import check_elements, composition
from data_pipelines.errors import UserError, check_known
from data_pipelines.prepared import default_cache_dir, prepare, write
from data_pipelines.qm9.properties import ELEMENTS, PROPERTIES
from data_pipelines.qm9.sources import (
    NUM_CHARACTERIZED,
    SOURCES,
    characterized_indices,
    source_files,
)
from data_pipelines.qm9.splits import SPLIT_NAMES, get_split, split_hash

_PREPARATION_VERSION = 2  # raise it when prepared folders of before must not be used
_MOST_HASHED = 100  # files of a source; to open each of 133,885 takes longer than a start may
SAMPLE_FILE = pathlib.Path(__file__).parent / "sample.xyz.tar.bz2"
# What a float32-rounded, complete QM9 from qm9pack 1.0.x hashes to; see `_content_hash`.
_KNOWN_CONTENT = {"qm9pack": "e66e84f487dcf3a9ec66e87c2cb3c1e76f28af2c53fa09edf60047fb6790168e"}


@dataclasses.dataclass(frozen=True)
class MoleculeArrays:
    """All molecules, one after the other, as (memory-mapped) arrays.

    Attributes:
      index: [G] int32, published numbers, ascending.
      node_offset: [G + 1] int64; molecule g has atoms node_offset[g] to node_offset[g + 1].
      atomic_number: [atoms] uint8.
      position: [atoms, 3] float32, angstrom.
      bond_offset: [G + 1] int64.
      bonds: [bonds, 3] uint16, rows (i, j, BondType) with i < j inside the molecule.
      properties: [G, 15] float64 in the order of `COLUMNS`, source units.
    """

    index: np.ndarray
    node_offset: np.ndarray
    atomic_number: np.ndarray
    position: np.ndarray
    bond_offset: np.ndarray
    bonds: np.ndarray
    properties: np.ndarray

    def composition(self) -> np.ndarray:
        """How many atoms of each of `ELEMENTS` each molecule has: [G, 5] int64."""
        return composition(self.atomic_number, self.node_offset, ELEMENTS)


def load(source: str, path: str = "", cache_dir: str = "") -> tuple[MoleculeArrays, dict]:
    """The prepared molecules and their passport, preparing them first where needed.

    Args:
      source: `qm9pack`, `raw`, `tfds`, or `sample` (500 molecules that ship with demetar).
      path: the files, for `raw` and `tfds`.
      cache_dir: where prepared data live; empty: `default_cache_dir()`.
    """
    if source == "sample":
        source, path = "raw", str(SAMPLE_FILE)
    check_known("config.data.source", source, (*SOURCES, "sample"))
    folder = folder_of(source, path, cache_dir)
    arrays, passport = prepare(folder, lambda building: _build(source, path, building), "500 MB")
    return MoleculeArrays(**arrays), passport


def folder_of(source: str, path: str = "", cache_dir: str = "") -> pathlib.Path:
    """Where `load` with the same arguments keeps its preparation."""
    if source == "sample":
        source, path = "raw", str(SAMPLE_FILE)
    root = pathlib.Path(cache_dir or default_cache_dir()) / "qm9"
    return root / f"{source}-{_source_key(source, path)}"


def _source_key(source: str, path: str) -> str:
    """Names a preparation after what is in the files that it is made from, wherever they lie."""
    digest = hashlib.sha256(f"{_PREPARATION_VERSION}:{source}".encode())
    files = source_files(source, path)
    for file in files:
        if len(files) <= _MOST_HASHED:
            with file.open("rb") as stream:
                fact = hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            stat = file.stat()
            fact = f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}"
        digest.update(f":{fact}".encode())
    return digest.hexdigest()[:12]


# --- preparing ---------------------------------------------------------------------------------


def _build(source: str, path: str, folder: pathlib.Path) -> None:
    agreement = _build_records(SOURCES[source](path), folder)
    arrays = _decode_records(folder)
    write(folder, arrays, _passport(MoleculeArrays(**arrays), source, agreement))


def _build_records(molecules, data_dir: pathlib.Path) -> list[int]:
    """Writes ArrayRecord files through TFDS; returns how many molecules per `Agreement`."""
    import tensorflow_datasets as tfds  # heavy, and only needed to prepare

    from data_pipelines.qm9.builder import Qm9

    tfds.display_progress_bar(False)
    builder = Qm9(_checked(molecules), data_dir=data_dir, file_format="array_record")
    download_config = tfds.download.DownloadConfig(
        num_shards=1, compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it would speak of downloading
        builder.download_and_prepare(download_config=download_config)
    return builder.agreement


def _checked(molecules):
    """Refuses what would poison a training run; shows the progress."""
    last = 0
    for molecule in tqdm(molecules, "Preparing QM9", NUM_CHARACTERIZED, unit=" molecules"):
        if molecule.index <= last:
            raise UserError(
                f"Molecule {molecule.index} follows molecule {last}: the source must be in "
                "ascending order, each molecule once."
            )
        last = molecule.index
        _check(molecule)
        yield molecule


def _check(molecule) -> None:
    index = molecule.index
    for name, values in (
        ("coordinate", molecule.positions),
        ("property", molecule.properties),
    ):
        if not np.isfinite(values).all():
            raise UserError(
                f"Molecule {index} has a {name} that is not a finite number: {values.tolist()}. "
                "Repair or remove it in the source."
            )
    check_elements(molecule.atomic_numbers, ELEMENTS, index, "qm9")


def _decode_records(data_dir: pathlib.Path, chunk: int = 512) -> dict[str, np.ndarray]:
    """Reads the ArrayRecord files back into one array per field."""
    columns = {name: [] for name in ("index", "atomic_number", "position", "bonds", "properties")}
    for rows in records_of(data_dir, "Decoding QM9", chunk):
        for name, column in columns.items():
            column.extend(row[name] for row in rows)
    offsets = lambda column: np.concatenate([[0], np.cumsum([len(row) for row in column])])
    return {
        "index": np.array(columns["index"], np.int32),
        "node_offset": offsets(columns["atomic_number"]),
        "atomic_number": np.concatenate(columns["atomic_number"]),
        "position": np.concatenate(columns["position"]),
        "bond_offset": offsets(columns["bonds"]),
        "bonds": np.concatenate(columns["bonds"]),
        "properties": np.stack(columns["properties"]),
    }


def records_of(
    data_dir: pathlib.Path, doing: str, chunk: int = 512, positions: np.ndarray | None = None
) -> Iterator[list[dict]]:
    """The records of a preparation in chunks, SMILES included.

    Args:
      data_dir: of the preparation.
      doing: names the progress bar; "": there is none.
      chunk: records read at once.
      positions: of the molecules; None: all.
    """
    import tensorflow_datasets as tfds

    (info_file,) = data_dir.glob("**/dataset_info.json")
    records = tfds.builder_from_directory(info_file.parent).as_data_source("molecules")
    rows = range(len(records)) if positions is None else positions.tolist()
    starts = range(0, len(rows), chunk)
    for start in tqdm(starts, doing, unit=f" x {chunk} molecules", disable=not doing):
        yield records.__getitems__(list(rows[start : start + chunk]))


def _passport(molecules: MoleculeArrays, source: str, agreement: list[int]) -> dict:
    """What these data are: counts, ids, units, hashes. Goes into every run's config.json."""
    index = molecules.index
    complete = np.array_equal(index, characterized_indices())
    names = SPLIT_NAMES if complete else ("random",)
    content = _content_hash(molecules)
    known = _KNOWN_CONTENT.get(source)
    if complete and known and content != known:
        raise UserError(
            f"The numbers of QM9 from {source!r} hash to {content}, not to {known} as published. "
            "The files are altered: reinstall the package qm9pack."
        )
    return {
        "dataset": "qm9",
        "preparation_version": _PREPARATION_VERSION,
        "source": source,
        "complete": complete,
        "molecules": len(index),
        "atoms": len(molecules.atomic_number),
        "bonds": len(molecules.bonds),
        "smiles_and_geometry": {
            "agree": agreement[0],
            "heavy_graph_differs": agreement[1],
            "smiles_unusable": agreement[2],
        },
        "units": {"position": "angstrom"} | {p.column: p.source_unit for p in PROPERTIES.values()},
        "ids_sha256": hashlib.sha256(index.astype("<i8").tobytes()).hexdigest(),
        "content_sha256": content,
        "bonds_sha256": hashlib.sha256(molecules.bonds.tobytes()).hexdigest(),
        "splits": {name: split_hash(get_split(name, index), index) for name in names},
    }


def _content_hash(molecules: MoleculeArrays) -> str:
    """SHA-256 over ids, atoms, positions (float32) and properties (rounded to float32)."""
    digest = hashlib.sha256(molecules.index.astype("<i4").tobytes())
    digest.update(molecules.node_offset.astype("<i8").tobytes())
    digest.update(molecules.atomic_number.tobytes())
    digest.update(molecules.position.astype("<f4").tobytes())
    digest.update(molecules.properties.astype("<f4").tobytes())
    return digest.hexdigest()
