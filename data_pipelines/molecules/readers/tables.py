"""CSV and Parquet, with a column of SMILES, a column of paths of xyz files, or both."""

import csv
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.errors import UserError, suggest
from data_pipelines.molecules.readers import xyz
from data_pipelines.molecules.readers.fields import (
    LARGEST_RECORD,
    Damaged,
    charge_and_multiplicity,
    clean,
    open_text,
)
from data_pipelines.molecules.record import Refusal, Row

_XYZ = ("xyz", "xyz_path")  # names of a column of paths
_BATCH = 1024  # rows of Parquet in memory
csv.field_size_limit(LARGEST_RECORD)  # a cell of a record may be as long as the record


# --- CSV -----------------------------------------------------------------------------------------


def read_csv(path: pathlib.Path, smiles_column: str) -> Iterator[Row]:
    """Rows of text; blank lines are no rows."""
    with open_text(path, newline="") as stream:
        lines = csv.reader(stream.lines(), delimiter=_delimiter(path))
        header = _header(lines, path)
        build = _Builder(path, header, smiles_column)
        number = 0
        for fields, first, last in _records(lines):
            stream.begin_record()
            if not fields:
                continue
            number += 1
            if isinstance(fields, str):
                yield _bad(number, {}, f"line {first}: {fields}; repair it")
            elif len(fields) != len(header):
                cut = {name: field or None for name, field in zip(header, fields, strict=False)}
                message = f"line {first} has {len(fields)} fields, the header has {len(header)}"
                yield _bad(number, cut, f"{message}: repair the line, or quote its commas")
            elif build.swallowed(fields):
                yield _bad(
                    number,
                    dict(zip(header, fields, strict=True)),
                    f"a quote that opens in line {first} closes in line {last}: repair it",
                )
            else:
                values = (field or None for field in fields)
                yield build.row(number, dict(zip(header, values, strict=True)))


def csv_files(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The xyz files that a column names, in the order of the rows."""
    with open_text(path, newline="") as stream:
        lines = csv.reader(stream.lines(), delimiter=_delimiter(path))
        place = _place_of_xyz(_header(lines, path))
        for fields, *_ in _records(lines) if place is not None else ():
            stream.begin_record()
            if len(fields) > place and not isinstance(fields, str) and fields[place].strip():
                yield path.parent / fields[place].strip()


def csv_columns(path: pathlib.Path) -> tuple[str, ...]:
    """Names in the header."""
    with open_text(path, newline="") as stream:
        return tuple(_header(csv.reader(stream.lines(), delimiter=_delimiter(path)), path))


def _records(lines) -> Iterator[tuple[list[str] | str, int, int]]:
    """(Fields, or what is wrong with them; their first line; their last line)."""
    while True:
        first = lines.line_num + 1
        try:
            fields = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            fields = str(error)
        yield fields, first, lines.line_num


def _delimiter(path: pathlib.Path) -> str:
    return "\t" if ".tsv" in path.name.lower() else ","


def _header(lines, path: pathlib.Path) -> list[str]:
    try:
        header = [name.strip() for name in next(lines, [])]
    except csv.Error as error:
        raise Damaged(f"line 1: {error}") from error
    if "\0" in "".join(header):
        raise Damaged("it has bytes 0, as UTF-16 has: save it as UTF-8")
    if not any(header):
        raise UserError(f"{path} has no header: name its columns in the first line.")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UserError(f"{path} has two columns called {repeated[0]!r}: rename one of them.")
    return header


# --- Parquet -------------------------------------------------------------------------------------


def read_parquet(path: pathlib.Path, smiles_column: str) -> Iterator[Row]:
    """Rows with the types of the file; null is None."""
    number = 0
    with _open_parquet(path) as file:
        build = _Builder(path, file.schema_arrow.names, smiles_column)
        batches = file.iter_batches(batch_size=_BATCH)
        while True:
            try:
                batch = next(batches, None)
                values = batch.to_pylist() if batch is not None else None
            except Exception as error:  # of damaged bytes pyarrow raises almost anything
                raise Damaged(str(error)) from error
            if values is None:
                return
            for columns in values:
                number += 1
                yield build.row(number, columns)


def parquet_files(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """As `csv_files`."""
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        if (place := _place_of_xyz(names)) is None:
            return
        try:
            for batch in file.iter_batches(batch_size=_BATCH, columns=[names[place]]):
                yield from (path.parent / str(name) for name in batch[0].to_pylist() if name)
        except Exception as error:  # as above
            raise Damaged(str(error)) from error


def parquet_columns(path: pathlib.Path) -> tuple[str, ...]:
    """Names in the schema."""
    with _open_parquet(path) as file:
        return tuple(file.schema_arrow.names)


def parquet_count(path: pathlib.Path) -> int:
    """Rows by the metadata."""
    with _open_parquet(path) as file:
        return file.metadata.num_rows


def _parquet():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet needs the package pyarrow: pip install 'demetar[parquet]'."
        ) from error
    return pyarrow


def _open_parquet(path: pathlib.Path):
    arrow = _parquet()
    try:
        file = arrow.parquet.ParquetFile(path)
        _ = file.schema_arrow.names  # is decoded when it is asked for
    except Exception as error:  # as above
        raise Damaged(str(error)) from error
    return file


# --- both ----------------------------------------------------------------------------------------


def _place_of_xyz(names: Sequence[str]) -> int | None:
    """Which column holds paths of xyz files, if any."""
    return next((k for k, name in enumerate(names) if name.lower() in _XYZ), None)


class _Builder:
    """Makes rows of columns, knowing which of them describes the molecule."""

    def __init__(self, path: pathlib.Path, names: Sequence[str], smiles_column: str):
        self._folder = path.parent
        self._smiles = smiles_column or _only(path, [n for n in names if n.lower() == "smiles"])
        self._xyz = _only(path, [n for n in names if n.lower() in _XYZ])
        if smiles_column and smiles_column not in names:
            raise UserError(
                f"{path} has no column {smiles_column!r}.{suggest(smiles_column, names)} "
                f"Columns: {', '.join(names)}."
            )
        if not self._smiles and not self._xyz:
            raise UserError(f"{path} has no column of SMILES. {_remedy(names)}")
        self._places = [names.index(n) for n in (self._smiles, self._xyz) if n]

    def swallowed(self, fields: list[str]) -> bool:
        """Whether the molecule goes over several lines: a quote that was not closed."""
        return any("\n" in fields[place] or "\r" in fields[place] for place in self._places)

    def row(self, number: int, columns: dict[str, Any]) -> Row:
        """The row of one line."""
        smiles = clean(str(columns[self._smiles] or "")).strip() if self._smiles else ""
        path = str(columns[self._xyz] or "").strip() if self._xyz else ""
        if not smiles and not path:
            blank = " and ".join(repr(n) for n in (self._smiles, self._xyz) if n)
            return _bad(number, columns, f"the column {blank} is blank: give a molecule")
        if not path:
            return Row(number, columns, smiles)
        frame = xyz.read_first(self._folder / path)
        if frame.refusal:
            return _bad(number, columns, f"{path}: {frame.refusal.message}")
        charge, multiplicity = charge_and_multiplicity(columns)
        return dataclasses.replace(
            frame,
            number=number,
            # What stands in the comment of an xyz file is not lost, but the table comes first.
            columns=columns,
            smiles=smiles,
            charge=frame.charge if charge is None else charge,
            multiplicity=multiplicity or frame.multiplicity,
            text="",
        )


def _only(path: pathlib.Path, names: list[str]) -> str:
    if len(names) > 1:
        raise UserError(
            f"{path} has columns {' and '.join(map(repr, names))}: say which one holds the "
            f"molecules, --smiles={names[0]}, or rename one."
        )
    return names[0] if names else ""


def _remedy(names: Sequence[str]) -> str:
    if len(names) == 1 and ";" in names[0]:
        return "Its fields stand between ';': write it again with commas."
    near = [name for name in names if "smi" in name.lower()] or ["COLUMN"]
    return f"Name it: --smiles={near[0]}. Columns: {', '.join(names)}."


def _bad(number: int, columns: dict[str, Any], message: str) -> Row:
    return Row(number, columns, refusal=Refusal("bad_row", message))
