"""Predictions as CSV and Parquet."""

import csv
import gzip
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.molecules.readers.fields import clean
from data_pipelines.molecules.record import Molecule, Row
from data_pipelines.molecules.writers.base import Writer, as_text


class TextFile:
    """A file of text that may be compressed, of bytes that the text alone decides."""

    def __init__(self, building: pathlib.Path, path: pathlib.Path):
        self._binary = building.open("wb")
        stream = self._binary
        if path.suffix.lower() == ".gz":
            # Neither a time nor a name of a file in the header.
            stream = gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0)
        self.text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")

    def close(self) -> None:
        """Ends the text, the compression and the file."""
        self.text.close()
        self._binary.close()


class CsvWriter(Writer):
    """CSV; tabs between the fields in `.tsv`."""

    def open(self) -> None:
        self._file = TextFile(self.building, self.path)
        delimiter = "\t" if ".tsv" in self.path.name.lower() else ","
        self._csv = csv.writer(self._file.text, delimiter=delimiter, lineterminator="\n")
        self._csv.writerow([*self.names, *self.columns])

    def write(
        self,
        rows: Sequence[Row],
        outputs: Mapping[str, Sequence[Any]],
        molecules: Sequence[Molecule | None] | None = None,
    ) -> None:
        del molecules
        new = [_as_list(outputs[name]) for name in self.columns]
        for row, *values in zip(rows, *new, strict=True):
            old = [row.columns.get(name) for name in self.names]
            self._csv.writerow([as_text(value) for value in (*old, *values)])

    def close(self) -> None:
        self._file.close()


class ParquetWriter(Writer):
    """Parquet; the columns of a Parquet source keep their types.

    Of other sources, columns whose first values are numbers are float64, all others text.
    """

    def open(self) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow, self._writer, self._schema = pyarrow, None, None

    def write(
        self,
        rows: Sequence[Row],
        outputs: Mapping[str, Sequence[Any]],
        molecules: Sequence[Molecule | None] | None = None,
    ) -> None:
        del molecules
        if self._writer is None:
            self._begin(rows, outputs)
        columns = {name: [row.columns.get(name) for row in rows] for name in self.names}
        columns |= {name: [_plain(v) for v in outputs[name]] for name in self.columns}
        arrays = []
        for field in self._schema:
            values = columns[field.name]
            if field.type == self._arrow.string():
                values = [None if v is None else clean(as_text(v)) for v in values]
            arrays.append(self._array(values, field, rows))
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        if self._writer is None:
            self._begin([], {name: [] for name in self.columns})
        self._writer.close()

    def _begin(self, rows: Sequence[Row], outputs: Mapping[str, Sequence[Any]]) -> None:
        arrow = self._arrow
        if self.source.suffix.lower() == ".parquet":
            fields = list(arrow.parquet.read_schema(self.source).remove_metadata())
        else:
            fields = []
            for name in self.names:
                numbers = is_numeric(row.columns.get(name) for row in rows)
                fields.append(arrow.field(name, arrow.float64() if numbers else arrow.string()))
        for name, kind in self.columns.items():
            fields.append(arrow.field(name, self._type(kind, outputs[name])))
        self._schema = arrow.schema(fields)
        self._writer = arrow.parquet.ParquetWriter(self.building, self._schema)

    def _type(self, kind: str, values: Sequence[Any]):
        arrow = self._arrow
        if kind in ("number", "text"):
            return arrow.float64() if kind == "number" else arrow.string()
        per_coordinate = any(np.ndim(value) == 2 for value in values if value is not None)
        inner = arrow.list_(arrow.float64()) if per_coordinate else arrow.float64()
        return arrow.list_(inner)

    def _array(self, values: list, field, rows: Sequence[Row]):
        try:
            return self._arrow.array(values, type=field.type)
        except (self._arrow.ArrowException, TypeError) as error:
            raise UserError(
                f"Column {field.name!r} is {field.type} by its first values, and rows "
                f"{rows[0].number} to {rows[-1].number} hold others ({error}): write CSV instead."
            ) from error


def is_numeric(values: Iterator[Any]) -> bool:
    """Whether there are values, and all of them are numbers."""
    kinds = [isinstance(value, int | float) for value in values if value is not None]
    return bool(kinds) and all(kinds)


def _as_list(values: Sequence[Any]) -> Sequence[Any]:
    """Numbers and texts of an array as Python's, of which text is made faster."""
    return values.tolist() if isinstance(values, np.ndarray) else values


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and value != value else value
