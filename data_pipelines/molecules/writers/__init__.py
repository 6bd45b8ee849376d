"""Files of predictions: the input's rows in its order, new columns beside its own.

    with open_writer("out.csv", "mine.sdf", {"homo_pred": "number", "status": "text"}) as out:
        out.write(rows, {"homo_pred": [...], "status": [...]}, molecules)

What the input says stays as it was. The file appears under its name when it is whole. The same
rows in the same chunks give the same bytes.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

from data_pipelines.errors import UserError, check_known
from data_pipelines.molecules import readers
from data_pipelines.molecules.writers.arrays import NpzWriter
from data_pipelines.molecules.writers.base import KINDS, Writer
from data_pipelines.molecules.writers.structures import SdfWriter, XyzWriter
from data_pipelines.molecules.writers.tables import CsvWriter, ParquetWriter

# Suffix of the output -> (building file, final path, source, its columns, new ones) -> writer.
WRITERS: dict[str, Callable[..., Writer]] = {
    ".csv": CsvWriter,
    ".csv.gz": CsvWriter,
    ".tsv": CsvWriter,
    ".tsv.gz": CsvWriter,
    ".parquet": ParquetWriter,
    ".extxyz": XyzWriter,
    ".xyz": XyzWriter,
    ".sdf": SdfWriter,
    ".sdf.gz": SdfWriter,
    ".npz": NpzWriter,
}


def check_output(path, source, columns: Mapping[str, str]) -> None:
    """Refuses, before anything is computed, an output that `open_writer` would refuse."""
    _input_columns(pathlib.Path(path), source, columns)


@contextlib.contextmanager
def open_writer(path, source, columns: Mapping[str, str]) -> Iterator[Writer]:
    """What writes rows and new columns to `path`, replacing it when the block ends without error.

    Args:
      path: of the output; its suffix is one of `WRITERS`.
      source: the file that the rows come from.
      columns: new column -> its kind, of `base.KINDS`.

    Raises:
      UserError: another suffix, a column that the input has too, a folder that cannot be written.
    """
    path = pathlib.Path(path)
    names = _input_columns(path, source, columns)
    building = path.with_name(f".{path.name}.{os.getpid()}.building")
    make = WRITERS[readers.suffix_of(path, WRITERS)]
    try:
        writer = make(building, path, pathlib.Path(source), names, columns)
        try:
            yield writer
            writer.close()
        except BaseException:
            with contextlib.suppress(Exception):
                writer.close()
            raise
        building.rename(path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error}. Choose another --out.") from error
    finally:
        building.unlink(missing_ok=True)


def _input_columns(path: pathlib.Path, source, columns: Mapping[str, str]) -> tuple[str, ...]:
    readers.suffix_of(path, WRITERS)
    if path.exists() and path.samefile(source):
        raise UserError(f"{path} is the input: choose another --out.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"There is no folder {path.absolute().parent}: make it, for {path.name}.")
    names = readers.columns(source)
    for name, kind in columns.items():
        check_known(f"kind of column {name!r}:", kind, KINDS)
        if name in names:
            raise UserError(
                f"{source} has a column {name!r} already, and so would the output: rename it or "
                "leave it out of the input."
            )
    return names
