"""xyz and extended xyz: cut into frames by their first lines; each is then parsed by ase, anywhere.

A frame keeps its text, so that it can be written out as it was.
"""

import functools
import io
import itertools
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from data_pipelines.molecules.readers.ase_files import row_of_atoms
from data_pipelines.molecules.readers.fields import Damaged, clean, open_text, union
from data_pipelines.molecules.record import Refusal, Row

_SHOWN = 30  # characters of a line in a message
_PROPERTIES = re.compile(r'Properties="?([^\s"]+)')  # of extended xyz: name:type:columns:...
_COLUMNS = re.compile(r":[RILS]:(\d+)")


def read(path: pathlib.Path, smiles_column: str) -> Iterator[Row]:
    """Rows with a number and the text of the frame."""
    del smiles_column
    for number, text in enumerate(_frames(path), 1):
        yield Row(number, text=text)


def columns(path: pathlib.Path) -> tuple[str, ...]:
    """Names of all values of whole frames; reads the file."""
    from ase.io.extxyz import key_val_str_to_dict

    own = {"Properties", "Lattice", "pbc"}
    found = []
    for text in _frames(path):
        comment = clean(text.split("\n", 2)[1])
        if is_plain(comment):
            names = {"comment"} if comment.strip() else {}
        else:
            try:
                values = key_val_str_to_dict(comment)
            except Exception:  # as in `parse`, where the row is refused
                values = {}
            names = [n for n in given(values, comment) if n not in own]
        found = union([found, names])
    return tuple(found)


def given(values: dict[str, Any], comment: str) -> dict[str, Any]:
    """The values that a comment gives: ase reads a word without one as true."""
    has_value = lambda name: re.search(rf"(?<![\w.-]){re.escape(name)}[\"']?\s*=", comment)
    return {k: v for k, v in values.items() if v is not True or has_value(k)}


def is_plain(comment: str) -> bool:
    """Whether the second line of a frame is only a remark, without `name=value`."""
    return "=" not in comment


def parse(row: Row, need: str) -> Row:
    """The whole row of one that has only a number and a text, whatever is needed of it."""
    del need  # ase reads a frame at once
    if row.refusal:
        return row
    try:
        atoms = _read_atoms(clean(row.text))
    except Exception as error:  # ase raises what its parsers meet, of any class
        lines = row.text.split("\n")
        message = (
            f"ase cannot read the frame that begins {lines[0].strip()!r}, "
            f"{lines[1][:_SHOWN]!r}: {type(error).__name__}: {error}"
        )
        return Row(row.number, text=row.text, refusal=Refusal("bad_row", message))
    return row_of_atoms(row.number, atoms, row.text)


@functools.lru_cache(maxsize=16)
def read_first(path: pathlib.Path) -> Row:
    """The first frame of a file, as a row with number 1; what is wrong is its refusal."""
    refuse = lambda message: Row(1, refusal=Refusal("bad_row", message))
    try:
        if not path.is_file():
            return refuse("there is no such file beside the table: correct the path")
        for text in _frames(path):
            return parse(Row(1, text=text), "all")
    except Damaged as damage:
        return refuse(str(damage))
    except OSError as error:  # what is no name of a file
        return refuse(f"it cannot be opened ({error.strerror}): give the path of a file")
    return refuse("the file is empty")


def _frames(path: pathlib.Path) -> Iterator[str]:
    with open_text(path) as text:
        stream, place = text.lines(), 0
        for first in stream:
            place += 1
            if not first.strip():
                text.begin_record()
                continue  # blank lines between frames
            try:
                atoms = int(first)
                if not 0 <= atoms < sys.maxsize:
                    raise ValueError(atoms)
            except ValueError as error:
                shown = first.strip()[:_SHOWN]
                raise Damaged(
                    f"line {place} should be the number of atoms of a frame, but is {shown!r}"
                ) from error
            lines = list(itertools.islice(stream, atoms + 1))
            if len(lines) < atoms + 1:
                raise Damaged(
                    f"the file ends within the frame of line {place}: it has "
                    f"{max(len(lines) - 1, 0)} of {atoms} atoms"
                )
            place += atoms + 1
            yield "".join([first, *lines])
            text.begin_record()


def _read_atoms(text: str):
    """ase's atoms of one frame; a comment that is no extended xyz is one value."""
    import ase.io

    first, comment, atoms = text.split("\n", 2)
    if is_plain(comment):
        found = ase.io.read(io.StringIO(f"{first}\n\n{atoms}"), index=0, format="extxyz")
        found.info = {"comment": comment.strip()} if comment.strip() else {}
        return found
    # ase prepares as many columns as are claimed, before it looks at the lines.
    claimed = sum(map(int, _COLUMNS.findall(" ".join(_PROPERTIES.findall(comment)))))
    if claimed > (there := len(atoms.partition("\n")[0].split())):
        raise ValueError(f"Properties names {claimed} columns, and the first atom has {there}")
    found = ase.io.read(io.StringIO(text), index=0, format="extxyz")
    found.info = given(found.info, comment)
    return found
