"""NPZ: arrays in a zip file, each read as a stream beside the others. No pickle."""

import io
import math
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.molecules.readers import members
from data_pipelines.molecules.readers.fields import Damaged
from data_pipelines.molecules.record import Row

_HEADER = 1 << 16  # bytes that the header of an array can have


def read(path: pathlib.Path, smiles_column: str) -> Iterator[Row]:
    """Rows of all molecules; the layouts are those of `members`."""
    del smiles_column
    with _open(path) as archive:
        yield from members.rows(_members(archive, path), 1, str(path))


def columns(path: pathlib.Path) -> tuple[str, ...]:
    """Names of the arrays with one value for each molecule."""
    with _open(path) as archive:
        return members.columns(_members(archive, path), str(path))


def count(path: pathlib.Path) -> int | None:
    """Molecules, by the shapes of the arrays."""
    with _open(path) as archive:
        found = _members(archive, path)
        return members.count(found) if members.find(found, members.POSITIONS) else None


def _open(path: pathlib.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # of damaged bytes zipfile raises almost anything
        raise Damaged(f"{error}; it may be cut off") from error


def _members(archive: zipfile.ZipFile, path: pathlib.Path) -> dict[str, members.Member]:
    return {
        name.removesuffix(".npy"): _Stored(archive, name, path)
        for name in archive.namelist()
        if name.endswith(".npy")
    }


class _Stored(members.Member):
    """An array in a zip file."""

    def __init__(self, archive: zipfile.ZipFile, name: str, path: pathlib.Path):
        try:
            self._stream = archive.open(name)
            # NumPy would read a header of any length before it refuses it.
            start = io.BytesIO(self._stream.read(_HEADER))
            version = np.lib.format.read_magic(start)
            headers = np.lib.format
            read_header = (
                headers.read_array_header_1_0
                if version == (1, 0)
                else headers.read_array_header_2_0
            )
            self.shape, self._fortran, self.dtype = read_header(start)
            self._stream.seek(start.tell())
            self._left = archive.getinfo(name).file_size - start.tell()
        except Exception as error:  # of damaged bytes zipfile and NumPy raise almost anything
            raise Damaged(f"{name}: {error}") from error
        if min(self.shape, default=0) < 0 or self.dtype.itemsize == 0:
            raise Damaged(f"{name}: its shape is {self.shape} of {self.dtype}")
        if self.dtype.hasobject:
            raise UserError(
                f"{path}: {name} holds Python objects, which only unpickling could read, and that "
                "would execute what is in the file. Save it as an array of numbers or of text."
            )
        self._name, self._whole, self._taken = name, None, 0

    def take(self, count: int) -> np.ndarray:
        if not self._fortran or len(self.shape) < 2:
            return self._read((count, *self.shape[1:]))
        if self._whole is None:  # its rows do not lie together
            self._whole = self._read(self.shape[::-1]).T
        self._taken += count
        return self._whole[self._taken - count : self._taken]

    def _read(self, shape: tuple[int, ...]) -> np.ndarray:
        members.check_size(self._name, shape, self.dtype)
        size = math.prod(shape) * self.dtype.itemsize
        if size > self._left:  # nothing is asked for that is not there, whatever the header says
            raise Damaged(f"{self._name} ends too early")
        try:
            data = self._stream.read(size)
        except Exception as error:  # as above
            raise Damaged(f"{self._name}: {error}") from error
        if len(data) < size:
            raise Damaged(f"{self._name} ends too early")
        self._left -= size
        return np.frombuffer(data, self.dtype).reshape(shape)
