"""What all readers share: damage, text that may be compressed, names and values of columns."""

import contextlib
import gzip
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

_CHARGE = ("charge", "total_charge")
# As fairchem, MACE and AIMNet2 write it: "spin" there is 2 S + 1.
_MULTIPLICITY = ("multiplicity", "spin_multiplicity", "mult", "spin", "total_spin")
# Vectors of the whole molecule, which may be as long as a molecule of three atoms.
VECTORS = ("dipole", "stress", "quadrupole", "polarizability")


class Damaged(Exception):
    """The file cannot be read from here on; the message says why."""


@contextlib.contextmanager
def open_text(path: pathlib.Path, newline: str | None = None) -> Iterator:
    """A file of text, through gzip if its name says so; a byte order mark is dropped.

    Bytes that are no UTF-8 pass as surrogates: written out again, they are what they were.
    """
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(
            path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline
        ) as f:
            yield f
    except EOFError as error:
        raise Damaged("the compressed file is cut off") from error
    except (OSError, zlib.error) as error:
        raise Damaged(str(error)) from error


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
