"""Files of predictions: the input's rows in its order, new columns beside its own.

    output = Output("out.csv", "mine.sdf", {"homo_pred": "number", "status": "text"})
    with output.open(folder) as out:
        out.write(rows, {"homo_pred": [...], "status": [...]}, molecules)

What the input says stays as it was. The file appears under its name when it is whole. The same
rows in the same chunks give the same bytes.
"""

import contextlib
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


class Output:
    """A file of predictions to write; what would be refused is refused here, not when it is open.

    Args:
      path: of the output; its suffix is one of `WRITERS`.
      source: the file that the rows come from; its columns are read now.
      columns: new column -> its kind, of `base.KINDS`.

    Raises:
      UserError: another suffix, a column that the input has too, a folder that is not there.
    """

    def __init__(self, path, source, columns: Mapping[str, str]):
        self.path, self.source = pathlib.Path(path), pathlib.Path(source)
        self.columns = columns
        self._make = WRITERS[readers.suffix_of(self.path, WRITERS)]
        if self.path.exists() and self.path.samefile(source):
            raise UserError(f"{path} is the input: choose another --out.")
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}: make it, for {self.path.name}.")
        self._names = readers.columns(source)
        for name, kind in columns.items():
            check_known(f"kind of column {name!r}:", kind, KINDS)
            if name in self._names:
                raise UserError(
                    f"{source} has a column {name!r} already, and so would the output: rename it "
                    "or leave it out of the input."
                )

    @contextlib.contextmanager
    def open(self, folder: pathlib.Path) -> Iterator[Writer]:
        """What writes to it; it replaces the file of before when the block ends without error.

        Args:
          folder: on the same file system; the file is there until it is whole.

        Raises:
          UserError: the folder cannot be written, or is full.
        """
        building = folder / f"building.{self.path.name}"
        try:
            writer = self._make(building, self.path, self.source, self._names, self.columns)
            try:
                yield writer
                writer.close()
            except BaseException:
                with contextlib.suppress(Exception):
                    writer.close()
                raise
            building.rename(self.path)
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error}. Choose another --out.") from error
        finally:
            building.unlink(missing_ok=True)
