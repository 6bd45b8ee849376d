"""Files of molecules, read row by row: CSV, Parquet, SDF, xyz, what ase reads, NPZ, HDF5.

    for row in read_rows("mine.sdf.gz"): ...

Reading streams, so a file may be larger than the memory. Where parsing costs more than reading,
the two are apart, so that other processes can parse:

    parse = parser(path)                       # can be pickled
    for row in read_rows(path, parse=False):   # of SDF and xyz: the number and the text alone
        row = parse(row)                       # anywhere

A damaged row comes as a `Row` with a refusal. So does the end of a file that is cut off; the rows
before it come first. Nothing is unpickled, and no archive is unpacked.
"""

import contextlib
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from data_pipelines.errors import UserError
from data_pipelines.molecules.readers import ase_files, grouped, npz, sdf, tables, xyz
from data_pipelines.molecules.readers.fields import Damaged
from data_pipelines.molecules.record import Refusal, Row

# "all"; "atoms": all but a SMILES that the atoms of the file imply; "columns": `Row.columns` alone.
NEEDS = ("all", "atoms", "columns")


def _whole(row: Row, need: str) -> Row:
    """What is left to parse of a row that is whole: nothing."""
    return row


def _unknown(path: pathlib.Path) -> None:
    """The number of rows of a file that does not say it."""


class Format(NamedTuple):
    """How one kind of file is read.

    Attributes:
      name: for a person.
      read: path, name of the column of SMILES ("": found by its name) -> rows. Where `parse` has
        something left to do, they have only a number and a text.
      parse: such a row and one of `NEEDS` -> the row; can be pickled.
      columns: path -> names of all its columns, in the order in which they are first met.
      count: path -> number of rows, or None where only reading would tell.
      files: path -> the other files that its rows are in, such as the xyz files of a table.
    """

    name: str
    read: Callable[[pathlib.Path, str], Iterator[Row]]
    columns: Callable[[pathlib.Path], tuple[str, ...]]
    parse: Callable[[Row, str], Row] = _whole
    count: Callable[[pathlib.Path], int | None] = _unknown
    files: Callable[[pathlib.Path], Iterable[pathlib.Path]] = lambda path: ()


_CSV = Format("CSV", tables.read_csv, tables.csv_columns, files=tables.csv_files)
_SDF = Format("SDF", sdf.read, sdf.columns, sdf.parse)
_XYZ = Format("xyz", xyz.read, xyz.columns, xyz.parse)
_ASE = Format("ASE", ase_files.read, ase_files.columns)
_HDF5 = Format("HDF5", grouped.read, grouped.columns, count=grouped.count)

FORMATS = {
    ".csv": _CSV,
    ".csv.gz": _CSV,
    ".tsv": _CSV,
    ".tsv.gz": _CSV,
    ".parquet": Format(
        "Parquet",
        tables.read_parquet,
        tables.parquet_columns,
        count=tables.parquet_count,
        files=tables.parquet_files,
    ),
    ".sdf": _SDF,
    ".sdf.gz": _SDF,
    ".xyz": _XYZ,
    ".xyz.gz": _XYZ,
    ".extxyz": _XYZ,
    ".extxyz.gz": _XYZ,
    ".traj": _ASE,
    ".db": _ASE,
    ".npz": Format("NPZ", npz.read, npz.columns, count=npz.count),
    ".h5": _HDF5,
    ".hdf5": _HDF5,
}


def suffix_of(path, known=FORMATS) -> str:
    """The suffix among `known` that a file's name ends in; any other name is a `UserError`."""
    name = pathlib.Path(path).name.lower()
    found = [suffix for suffix in known if name.endswith(suffix)]
    if not found:
        raise UserError(f"{path}: the name must end in one of {', '.join(known)}.")
    return max(found, key=len)


def format_of(path) -> Format:
    """How a file is read, by its suffix; no such file, or another suffix, is a `UserError`."""
    chosen = FORMATS[suffix_of(path)]
    if not pathlib.Path(path).is_file():
        folder = pathlib.Path(path).absolute().parent
        raise UserError(f"There is no file {path} (looked in {folder}).")
    return chosen


def read_rows(path, *, smiles_column: str = "", parse: bool = True) -> Iterator[Row]:
    """The rows of a file in its order, numbered from 1.

    Args:
      path: of the file; its suffix is one of `FORMATS`.
      smiles_column: of CSV and Parquet; empty: the one called "smiles", in any case.
      parse: False: rows of SDF and xyz have only a number and a text, or a refusal; `parser` does
        the rest.

    Raises:
      UserError: at the first row, if the file is not what its suffix says, has no molecules, or
        nothing of it can be read.
    """
    chosen = format_of(path)
    path = pathlib.Path(path)
    number = 0
    try:
        for row in chosen.read(path, smiles_column):
            number = row.number
            yield chosen.parse(row, "all") if parse else row
    except Damaged as damage:
        if not number:
            raise UserError(f"{path} cannot be read as {chosen.name}: {damage}.") from damage
        message = f"{path.name} cannot be read from row {number + 1} on: {damage}; repair the file"
        yield Row(number + 1, refusal=Refusal("bad_row", message))
    else:
        if not number:
            raise UserError(f"{path} has no rows: give a file with at least one molecule.")


def parser(path, need: str = "all") -> Callable[[Row], Row]:
    """What makes a whole row of one that `read_rows(path, parse=False)` gave; can be pickled.

    Args:
      path: of the file.
      need: of `NEEDS`, what will be looked at: what costs time and is not needed may be left out.
    """
    return functools.partial(format_of(path).parse, need=need)


def columns(path) -> tuple[str, ...]:
    """Names of all columns of a file; of SDF, xyz and ase files this reads it once.

    What stands behind a damage is not seen.
    """
    chosen = format_of(path)
    try:
        return chosen.columns(pathlib.Path(path))
    except Damaged as damage:
        raise UserError(f"{path} cannot be read as {chosen.name}: {damage}.") from damage


def content_sha256(path) -> str:
    """SHA-256 of a file; where its rows are in other files too, of the content of all."""
    chosen = format_of(path)
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    others = set()
    with contextlib.suppress(Damaged):  # the rows before the damage are what there is
        others.update(chosen.files(pathlib.Path(path)))
    for file in sorted(others):
        with contextlib.suppress(OSError, ValueError):  # no file, or no name of one: row refused
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def count_rows(path) -> int | None:
    """How many rows a file has, where it says so (Parquet, NPZ, HDF5); else None."""
    try:
        return format_of(path).count(pathlib.Path(path))
    except Damaged as damage:
        raise UserError(f"{path} cannot be read: {damage}.") from damage
