"""Predictions as NPZ: flat arrays, written a chunk at a time."""

import itertools
import json
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from data_pipelines.molecules.record import Molecule, Row
from data_pipelines.molecules.writers.base import Writer, as_text, atoms_of
from data_pipelines.molecules.writers.tables import is_numeric

_LINES = 4096  # of text in memory


class NpzWriter(Writer):
    """NPZ: `numbers` [atoms], `positions` [atoms, 3], `offsets` [G + 1], and the columns.

    Numbers are [G] float64 (NaN: none), text is [G], vectors are [G, D] and values of atoms are
    [atoms] or [atoms, 3], both NaN where there are none. A row without a molecule has 0 atoms.
    """

    def open(self) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix=f".{self.path.name}.", dir=self.path.absolute().parent
        )
        self._spools: dict[str, _Spool] = {}
        self._kinds: dict[str, str] = {}
        self._atoms = 0
        self._spool("offsets", "<i8").add(np.zeros(1, np.int64))

    def write(
        self,
        rows: Sequence[Row],
        outputs: Mapping[str, Sequence[Any]],
        molecules: Sequence[Molecule | None] | None = None,
    ) -> None:
        atoms = [atoms_of(row, molecules[k] if molecules else None) for k, row in enumerate(rows)]
        sizes = [len(numbers) for numbers, _ in atoms]
        self._spool("numbers", "<i8").add(np.concatenate([n for n, _ in atoms]))
        self._spool("positions", "<f8").add(np.concatenate([p for _, p in atoms]))
        self._spool("offsets", "<i8").add(self._atoms + np.cumsum(sizes))
        self._atoms += sum(sizes)
        old = {name: [row.columns.get(name) for row in rows] for name in self.names}
        for name, values in (old | dict(outputs)).items():
            if name in self.columns or name in self.names:
                self._add(name, values, sizes, rows)

    def close(self) -> None:
        try:
            with zipfile.ZipFile(self.building, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, spool in self._spools.items():
                    spool.write_to(archive, name)
        finally:
            self._folder.cleanup()

    def _add(self, name: str, values: Sequence[Any], sizes: list[int], rows) -> None:
        if name not in self._kinds:
            numbers = "number" if is_numeric(iter(values)) else "text"
            self._kinds[name] = self.columns.get(name, numbers)
        kind = self._kinds[name]
        # The names of the atoms' own arrays are taken.
        key = name if name not in ("numbers", "positions", "offsets") else f"{name}_column"
        if kind == "text":
            self._spool(key, "text").add_text([as_text(v) for v in values])
            return
        if kind == "number":
            sizes = None
        elif kind == "vector":
            values = [None if v is None else np.reshape(v, (1, -1)) for v in values]
            sizes = [1] * len(values)
        try:
            self._spool(key, "<f8").add_numbers(values, sizes)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"Column {name!r} has numbers first, and rows {rows[0].number} to "
                f"{rows[-1].number} hold something else ({error}): write CSV instead."
            ) from error

    def _spool(self, name: str, kind: str) -> "_Spool":
        if name not in self._spools:
            file = pathlib.Path(self._folder.name) / str(len(self._spools))
            self._spools[name] = _Spool(file, kind)
        return self._spools[name]


class _Spool:
    """One array on its way into the zip file; its length is known only at the end."""

    def __init__(self, file: pathlib.Path, kind: str):
        self._file, self._kind = file, kind
        self._length, self._longest = 0, 1
        self._width: tuple[int, ...] | None = None  # known with the first value
        self._blank = 0  # rows before it
        self._stream = file.open("wb")

    def add(self, table: np.ndarray) -> None:
        """Appends rows of an array."""
        self._width = table.shape[1:]
        self._length += len(table)
        self._stream.write(np.ascontiguousarray(table, self._kind).tobytes())

    def add_text(self, values: list[str]) -> None:
        """Appends text; a line each, as JSON, because text may have lines of its own."""
        self._length += len(values)
        self._longest = max([self._longest, *map(len, values)])
        self._stream.writelines(json_text(value).encode() + b"\n" for value in values)

    def add_numbers(self, values: Sequence[Any], sizes: Sequence[int] | None) -> None:
        """Appends values; None is NaN. `sizes`: rows of each value; None: each is one number."""
        if sizes is None:
            self.add(np.array([np.nan if v is None else v for v in values], np.float64))
            return
        width = self._width
        if width is None:
            width = next((np.shape(v)[1:] for v in values if v is not None), None)
        if width is None:
            self._blank += sum(sizes)
            return
        empty = lambda rows: np.full((rows, *width), np.nan)
        parts = [
            empty(size) if v is None else np.reshape(np.asarray(v, np.float64), (size, *width))
            for v, size in zip(values, sizes, strict=True)
        ]
        self.add(np.concatenate([empty(self._blank), *parts]))
        self._blank = 0

    def write_to(self, archive: zipfile.ZipFile, name: str) -> None:
        """Becomes a member of the archive."""
        if self._blank:
            self.add(np.full(self._blank, np.nan))
        self._stream.close()
        dtype = np.dtype(f"<U{self._longest}" if self._kind == "text" else self._kind)
        header = {
            "descr": dtype.str,
            "fortran_order": False,
            "shape": (self._length, *(self._width or ())),
        }
        # Of no time, so that the same content has the same bytes.
        entry = zipfile.ZipInfo(f"{name}.npy")
        entry.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(entry, "w", force_zip64=True) as out, self._file.open("rb") as spooled:
            np.lib.format.write_array_header_2_0(out, header)
            if self._kind != "text":
                shutil.copyfileobj(spooled, out)
                return
            while lines := list(itertools.islice(spooled, _LINES)):
                out.write(np.array([json.loads(line) for line in lines], dtype).tobytes())
