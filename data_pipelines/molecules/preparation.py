"""A file of molecules prepared once: arrays to train from, what was refused, a passport.

    rows of the files --make_molecule, in parallel--> parts/*.npz --joined--> arrays/*.npy

A part is 2,048 rows. A killed preparation goes on after its last whole part. What a folder is
named after decides its content: the bytes of the files, the geometry, the columns.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from data_pipelines.elements import symbols
from data_pipelines.errors import UserError, check_known
from data_pipelines.json_text import json_text
from data_pipelines.molecules import readers
from data_pipelines.molecules.making.geometry import GEOMETRIES
from data_pipelines.molecules.making.identity import identity_key, scaffold
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.parallel import map_rows
from data_pipelines.molecules.parts import columns_of_part, join
from data_pipelines.molecules.record import BLANK, Molecule, Refusal, Row
from data_pipelines.molecules.units import Column
from data_pipelines.prepared import default_cache_dir, prepare, write, write_parts

_PREPARATION_VERSION = 2  # raise it when prepared folders of before must not be used
ROWS_OF_A_PART = 2_048
_ROWS_OF_A_BLOCK = 64  # that a worker gets at once


@dataclasses.dataclass(frozen=True)
class Request:
    """What a preparation depends on.

    Attributes:
      paths: files, in their order.
      targets: columns to learn, with their units.
      smiles: column of the SMILES; "": found by its name.
      geometry: of `GEOMETRIES`.
      group, part: columns that a split looks at; "": none.
      scaffolds: whether a split looks at them: they cost time.
    """

    paths: tuple[str, ...]
    targets: tuple[Column, ...]
    smiles: str = ""
    geometry: str = "file"
    group: str = ""
    part: str = ""
    scaffolds: bool = False


@dataclasses.dataclass(frozen=True)
class OwnMolecules:
    """All molecules of the files, one after the other, as (memory-mapped) arrays.

    Attributes:
      index: [G] int32, number of the row, counted over all files from 1, ascending.
      number, source: [G] row in its own file, and which file.
      node_offset: [G + 1] int64.
      atomic_number: [atoms] uint8.
      position: [atoms, 3] float32, angstrom.
      bond_offset: [G + 1] int64.
      bonds: [bonds, 3] uint16, rows (i, j, BondType).
      charge, multiplicity: [G] int8 and int16.
      labels: [G, T] float64 in the units declared; NaN: none, or one of every atom.
      identity, scaffold, group, part: [G] int64, equal where the texts are.
      node_labels: name of a column -> [atoms] or [atoms, 3] float64.
    """

    index: np.ndarray
    number: np.ndarray
    source: np.ndarray
    node_offset: np.ndarray
    atomic_number: np.ndarray
    position: np.ndarray
    bond_offset: np.ndarray
    bonds: np.ndarray
    charge: np.ndarray
    multiplicity: np.ndarray
    labels: np.ndarray
    identity: np.ndarray
    scaffold: np.ndarray
    group: np.ndarray
    part: np.ndarray
    node_labels: dict[str, np.ndarray]


def load(request: Request, cache_dir: str = "") -> tuple[OwnMolecules, dict]:
    """The prepared molecules and their passport, preparing them first where needed."""
    check_known("config.data.geometry", request.geometry, GEOMETRIES)
    hashes = [readers.content_sha256(path) for path in request.paths]
    identity = [_PREPARATION_VERSION, hashes, request.geometry, request.smiles]
    identity += [[(c.name, c.unit) for c in request.targets], request.group, request.part]
    identity += [request.scaffolds]
    key = hashlib.sha256(json_text(identity).encode()).hexdigest()[:12]
    name = pathlib.Path(request.paths[0]).name.partition(".")[0]
    folder = pathlib.Path(cache_dir or default_cache_dir()) / "molecules" / f"{name}-{key}"
    build = functools.partial(_build, request, hashes, folder.parent / f"{folder.name}.parts")
    arrays, passport = prepare(folder, build, "2 KB for each molecule")
    columns = {c: arrays.pop(f"node_{c}") for c in passport["node_columns"]}
    return OwnMolecules(**arrays, node_labels=columns), passport


def first_row(path: str, smiles: str) -> Row:
    """The first row of a file that can be read."""
    for row in itertools.islice(readers.read_rows(path, smiles_column=smiles), 100):
        if row.refusal is None:
            return row
    raise UserError(f"{path} has no row that can be read in its first 100: run `demetar check`.")


# --- some rows, in a worker ----------------------------------------------------------------------


def _prepare_rows(request: Request, parsers: tuple, items: list[tuple[int, Row]]) -> list[dict]:
    """What a part keeps of each row."""
    # All are parsed, then all are made: the code stays in the caches.
    parsed = [(source, parsers[source](row)) for source, row in items]
    return [_prepare_row(request, source, row) for source, row in parsed]


def _prepare_row(request: Request, source: int, row: Row) -> dict:
    """A refusal, or a molecule with its labels and keys."""
    made = make_molecule(row, request.geometry)
    node_labels = {
        column.name: np.asarray(row.node_columns[column.name], np.float64)
        for column in request.targets
        if column.name in row.node_columns
    }
    if isinstance(made, Molecule):
        for name, values in node_labels.items():
            if len(values) != (atoms := len(made.atomic_numbers)):
                message = f"{name} has {len(values)} numbers for {atoms} atoms: give one for each."
                made = Refusal("bad_row", message)
    found = {"number": row.number, "source": source, "made": made}
    if isinstance(made, Refusal):
        return found
    file = pathlib.Path(request.paths[source]).name
    return found | {
        "labels": np.array([_label(row, column, file) for column in request.targets]),
        "node_labels": node_labels,
        "identity": identity_key(made),
        "scaffold": scaffold(made) if request.scaffolds else "",
        # A row without a group is one of its own.
        "group": _text(row, request.group) or f"row {source}:{row.number}",
        "part": _text(row, request.part),
    }


def _text(row: Row, column: str) -> str:
    """A cell as text; "" where it is blank, or no column is asked for."""
    value = row.columns.get(column) if column else None
    text = "" if value is None else str(value).strip()
    return "" if text.lower() == "nan" else text  # a blank cell of a column of numbers


def _label(row: Row, column: Column, file: str) -> float:
    """A number; NaN where the cell is blank."""
    value = row.columns.get(column.name)
    if value is None or (isinstance(value, str) and value.strip().lower() in BLANK):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise UserError(
            f"{file}, row {row.number}: {column.name} is {value!r}, which is no finite number. "
            "Correct it, or leave the cell blank where there is no label."
        )
    return number


# --- parts ---------------------------------------------------------------------------------------


def _build(request: Request, hashes: list[str], parts: pathlib.Path, folder: pathlib.Path) -> None:
    make_rows = functools.partial(
        _prepare_rows, request, tuple(readers.parser(path) for path in request.paths)
    )

    def make(done: int) -> Iterator[dict]:
        rows = itertools.islice(_rows(request), done, None)
        blocks = iter(lambda: list(itertools.islice(rows, _ROWS_OF_A_BLOCK)), [])
        for made in map_rows(make_rows, blocks, chunk=1):
            yield from made

    def pack(start: int, chunk: list[dict]) -> dict[str, np.ndarray]:
        return columns_of_part(request.targets, chunk, start + 1)

    bar = {"desc": "Preparing molecules", "unit": " rows"}
    files = write_parts(parts, make, ROWS_OF_A_PART, pack, bar)
    if not files:
        raise UserError(f"{', '.join(request.paths)} has no rows.")
    arrays, facts = join(files, request.targets)
    write(folder, arrays, _passport(request, hashes, arrays, facts))
    shutil.rmtree(parts)


def _rows(request: Request) -> Iterator[tuple[int, Row]]:
    for source, path in enumerate(request.paths):
        for row in readers.read_rows(path, smiles_column=request.smiles, parse=False):
            yield source, row


def _passport(request: Request, hashes: list[str], arrays: dict, facts: dict) -> dict:
    """What these data are: files, counts, units, hashes. Goes into every run's config.json."""
    sizes = [os.stat(path).st_size for path in request.paths]
    elements, counts = np.unique(arrays["atomic_number"], return_counts=True)
    content = hashlib.sha256(arrays["index"].astype("<i4").tobytes())
    for name, kind in (
        ("node_offset", "<i8"),
        ("atomic_number", "u1"),
        ("position", "<f4"),
        ("labels", "<f4"),
    ):
        content.update(arrays[name].astype(kind).tobytes())
    return {
        "dataset": "molecules",
        "preparation_version": _PREPARATION_VERSION,
        "sources": [
            {"name": pathlib.Path(path).name, "bytes": size, "sha256": digest}
            for path, size, digest in zip(request.paths, sizes, hashes, strict=True)
        ],
        "geometry": request.geometry,
        "molecules": len(arrays["index"]),
        "atoms": len(arrays["atomic_number"]),
        "bonds": len(arrays["bonds"]),
        "elements": {symbols()[z]: int(n) for z, n in zip(elements, counts, strict=True)},
        "charges": {
            str(c): int((arrays["charge"] == c).sum()) for c in np.unique(arrays["charge"])
        },
        "units": {"position": "angstrom"} | {c.name: c.unit for c in request.targets},
        "content_sha256": content.hexdigest(),
        "bonds_sha256": hashlib.sha256(arrays["bonds"].tobytes()).hexdigest(),
    } | facts
