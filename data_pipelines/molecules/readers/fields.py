"""What all readers share: damage, text that may be compressed, names and values of columns."""

import contextlib
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.molecules.record import MAX_NODES

_CHARGE = ("charge", "total_charge")
# As fairchem, MACE and AIMNet2 write it: "spin" there is 2 S + 1.
_MULTIPLICITY = ("multiplicity", "spin_multiplicity", "mult", "spin", "total_spin")
# Vectors of the whole molecule, which may be as long as a molecule of three atoms.
VECTORS = ("dipole", "stress", "quadrupole", "polarizability")


# Characters of one record of a text. A compressed file of megabytes can hold a line of gigabytes.
LARGEST_RECORD = 256 * MAX_NODES


class Damaged(Exception):
    """The file cannot be read from here on; the message says why."""


class Text:
    """Text of a file, of which the end may be missing.

    Bytes that are no UTF-8 pass as surrogates: written out again, they are what they were. A byte
    order mark is dropped.
    """

    def __init__(self, stream: BinaryIO, newline: str | None):
        self._raw = _Salvaged(stream)
        self._text = io.TextIOWrapper(
            io.BufferedReader(self._raw, 1 << 16),
            encoding="utf-8-sig",
            errors="surrogateescape",
            newline=newline,
        )
        self.begin_record()

    def begin_record(self) -> None:
        """Of the lines from here on, at most `LARGEST_RECORD` characters come until the next."""
        self._left = LARGEST_RECORD

    def lines(self) -> Iterator[str]:
        """Whole lines, then `Damaged` if the end is missing or a record is too large."""
        while line := self._text.readline(self._left + 1):
            self._left -= len(line)
            if self._left < 0:
                raise too_large()
            if not line.endswith(("\n", "\r")):
                self._check()  # the file may go on, and a number that is cut off is another one
            yield line
        self._check()

    def read(self, size: int) -> str:
        """At most `size` characters; "" at the end, or `Damaged` if it is missing."""
        found = self._text.read(size)
        if not found:
            self._check()
        return found

    def _check(self) -> None:
        error = self._raw.error
        if isinstance(error, EOFError):
            raise Damaged("the compressed file is cut off") from error
        if error is not None:
            raise Damaged(str(error)) from error


class _Salvaged(io.RawIOBase):
    """A stream that ends where it is damaged, and keeps the error."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self._stream.read1(len(buffer)) if self.error is None else b""
        except (EOFError, OSError, zlib.error) as error:
            self.error, data = error, b""
        buffer[: len(data)] = data
        return len(data)


def too_large() -> Damaged:
    """What is wrong where a record does not come to its end."""
    return Damaged(
        f"a record goes on for more than {LARGEST_RECORD:,} characters: no molecule does"
    )


@contextlib.contextmanager
def open_text(path: pathlib.Path, newline: str | None = None) -> Iterator[Text]:
    """A file of text, through gzip if its name says so."""
    try:
        stream = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise Damaged(str(error)) from error
    with stream:
        yield Text(stream, newline)


def clean(text: str) -> str:
    """Text that any library takes: bytes that are no UTF-8 become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def plain(value) -> Any:
    """A value without NumPy's scalars and bytes: text, a number, an array, or None if blank."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    blank = value == "" if isinstance(value, str) else np.size(value) == 0
    return None if blank else value


def charge_and_multiplicity(columns: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """What columns of the usual names say; None where there is none, or no whole number."""
    return _whole_number(columns, _CHARGE), _whole_number(columns, _MULTIPLICITY) or None


def _whole_number(columns: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        if name not in columns:
            continue
        try:
            value = float(columns[name])
        except (TypeError, ValueError):
            continue
        if value.is_integer():
            return int(value)
    return None


def union(names: Iterable) -> tuple[str, ...]:
    """The different names among lists of names, in the order in which they are first met."""
    return tuple(dict.fromkeys(name for row in names for name in row))
