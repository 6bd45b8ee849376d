"""What is in a file of molecules, and what is wrong with it, row by row.

Nothing is trained, and no geometry is made. Rows without positions are read as far as their SMILES.
"""

import array
import collections
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.bonds import rdkit
from data_pipelines.errors import UserError, suggest
from data_pipelines.molecules import readers
from data_pipelines.molecules.checking.suspicious_units import rough_total_energy, suspicions
from data_pipelines.molecules.making import chemistry
from data_pipelines.molecules.making.identity import identity_key
from data_pipelines.molecules.making.make import make_molecule
from data_pipelines.molecules.parallel import map_rows
from data_pipelines.molecules.record import BLANK, Molecule, Refusal, Row
from data_pipelines.molecules.units import Column

_SAMPLE = 10_000  # rows that units are judged by
_FEW = 512  # rows for which no other process is started


class Fault(NamedTuple):
    """What makes a row, or one label of it, unusable.

    Attributes:
      row: its number.
      status: of `record.STATUSES`, or `label` or `conflict`.
      message: for a person.
    """

    row: int
    status: str
    message: str


@dataclasses.dataclass
class ColumnFacts:
    """What the cells of one column hold: how many of each kind; numbers of the first rows."""

    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    least: float = math.inf
    most: float = -math.inf
    example: str = ""  # the first text
    sample: array.array = dataclasses.field(default_factory=lambda: array.array("d"))


@dataclasses.dataclass
class Facts:
    """What is in a file.

    Attributes:
      rows, usable: how many; usable are those with a molecule and no fault in a label.
      elements: symbol -> [atoms, molecules].
      sizes, charges, multiplicities, geometry, bonds: value -> molecules.
      columns: of rows, by name; of atoms: name -> molecules that have it.
      notes: what a person should know -> numbers of the first rows, and how many.
      faults: how many; each was handed to `on_fault`.
      repeats: rows that repeat a molecule of before.
      suspicions: sentences about units.
    """

    rows: int = 0
    usable: int = 0
    elements: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    charges: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    multiplicities: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    geometry: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bonds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    columns: dict[str, ColumnFacts] = dataclasses.field(default_factory=dict)
    node_columns: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    notes: dict[str, tuple[list[int], int]] = dataclasses.field(default_factory=dict)
    faults: int = 0
    repeats: int = 0
    suspicions: list[str] = dataclasses.field(default_factory=list)


class _Seen(NamedTuple):
    """What is kept of a row: small, because it comes from another process."""

    row: int
    refusal: Refusal | None
    numbers: np.ndarray
    charge: int
    multiplicity: int
    geometry: str
    bonds: str
    notes: tuple[str, ...]
    identity: int  # of the molecule
    conformer: int  # of molecule and geometry
    columns: dict[str, Any]
    node_columns: tuple[str, ...]


def check_file(
    path,
    targets: Sequence[Column] = (),
    smiles_column: str = "",
    on_fault: Callable[[Fault], None] = lambda fault: None,
) -> Facts:
    """Reads a whole file and says what is in it.

    Args:
      path: of the file.
      targets: columns whose labels are checked.
      smiles_column: "": found by its name.
      on_fault: called with each fault, in the order of the rows.

    Raises:
      UserError: the file cannot be read at all, or has no such column.
    """
    rows = readers.read_rows(path, smiles_column=smiles_column, parse=False)
    first = list(itertools.islice(rows, _FEW))
    look = functools.partial(_look, readers.parser(path))
    seen = map_rows(look, itertools.chain(first, rows), 1 if len(first) < _FEW else 0)
    facts, totals = Facts(), (array.array("d"), array.array("d"))
    repeats = _Repeats(targets)
    for one in seen:
        facts.rows += 1
        faults = [Fault(one.row, *one.refusal)] if one.refusal else []
        labels = {}
        for target in targets:
            value, wrong = _label(one, target.name)
            labels[target.name] = value
            if wrong and not one.refusal:
                faults.append(Fault(one.row, "label", wrong))
        _count_columns(facts, one)
        if one.refusal is None:
            _count_molecule(facts, one)
            if len(totals[0]) < _SAMPLE:
                totals[0].append(len(one.numbers))
                totals[1].append(rough_total_energy(one.numbers))
            faults += repeats.add(facts, one, labels)
        for fault in faults:
            on_fault(fault)
        facts.faults += len(faults)
        facts.usable += not faults
    _check_targets(facts, targets, path)
    units = {target.name: target.unit for target in targets}
    values = {
        name: np.array(column.sample)
        for name, column in facts.columns.items()
        if _is_numeric(column) and len(column.sample) == len(totals[0])
    }
    if len(totals[0]):
        facts.suspicions = suspicions(values, units, *map(np.array, totals))
    return facts


# --- one row, in a worker ------------------------------------------------------------------------


def _look(parse: Callable[[Row], Row], row: Row) -> _Seen:
    row = parse(row)
    made = _molecule(row)
    rest = {"columns": dict(row.columns), "node_columns": tuple(row.node_columns)}
    if isinstance(made, Refusal):
        return _Seen(row.number, made, np.zeros(0, int), 0, 1, "", "", (), 0, 0, **rest)
    has_positions = made.geometry == "file"
    identity = _short(identity_key(made))
    if has_positions:
        # Without its bonds a molecule is known by its distances.
        alone = dataclasses.replace(made, smiles="", bonds_from="distances")
        conformer = _short(f"{identity} {identity_key(alone)}")
    else:
        conformer = identity
    return _Seen(
        row.number,
        None,
        made.atomic_numbers,
        made.charge,
        made.multiplicity,
        "of the file" if has_positions else "none, only SMILES",
        made.bonds_from,
        made.notes,
        identity,
        conformer,
        **rest,
    )


def _molecule(row: Row) -> Molecule | Refusal:
    """The molecule of a row; without positions, at zero."""
    if row.refusal is not None or row.positions is not None:
        return make_molecule(row, "file")
    try:
        graph = chemistry.from_smiles(row.smiles)
    except chemistry.Refused as refused:
        return refused.refusal
    numbers, bonds = chemistry.numbers_of(graph), chemistry.bonds_of(graph)
    charge = rdkit().GetFormalCharge(graph) if row.charge is None else row.charge
    odd = (int(numbers.sum()) - charge) % 2
    pieces = chemistry.num_fragments(len(numbers), bonds)
    notes = ("an odd number of electrons",) if odd else ()
    notes += (f"{pieces} fragments",) if pieces > 1 else ()
    return Molecule(
        number=row.number,
        atomic_numbers=numbers.astype(np.uint8),
        positions=np.zeros((len(numbers), 3), np.float32),
        bonds=bonds,
        charge=charge,
        multiplicity=row.multiplicity or 1 + odd,
        geometry="",
        bonds_from="file" if row.bonds is not None else "smiles",
        smiles=row.smiles,
        notes=notes,
    )


def _short(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


# --- all rows ------------------------------------------------------------------------------------


class _Repeats:
    """Which molecules were seen, and with which labels."""

    def __init__(self, targets: Sequence[Column]):
        self._names = [target.name for target in targets]
        self._molecules: set[int] = set()
        self._first: dict[int, int] = {}  # molecule with geometry -> where its labels are
        self._rows = array.array("q")
        self._labels = array.array("d")

    def add(self, facts: Facts, one: _Seen, labels: dict[str, float]) -> list[Fault]:
        """Counts a row; the faults are labels that differ from those of the same molecule."""
        facts.repeats += one.identity in self._molecules
        self._molecules.add(one.identity)
        place = self._first.get(one.conformer)
        if place is None:
            self._first[one.conformer] = len(self._rows)
            self._rows.append(one.row)
            self._labels.extend(labels[name] for name in self._names)
            return []
        before = self._labels[place * len(self._names) : (place + 1) * len(self._names)]
        differ = [
            f"{name} is {labels[name]:g} here and {old:g} there"
            for name, old in zip(self._names, before, strict=True)
            if not (math.isnan(old) or math.isnan(labels[name]))
            and abs(old - labels[name]) > 1e-6 * max(abs(old), abs(labels[name]))
        ]
        if not differ:
            return []
        message = f"the same molecule as row {self._rows[place]}, but {'; '.join(differ)}"
        return [Fault(one.row, "conflict", message)]


def _count_molecule(facts: Facts, one: _Seen) -> None:
    from data_pipelines.elements import symbols

    for number, atoms in zip(*np.unique(one.numbers, return_counts=True), strict=True):
        counts = facts.elements.setdefault(symbols()[number], [0, 0])
        counts[0] += int(atoms)
        counts[1] += 1
    facts.sizes[len(one.numbers)] += 1
    facts.charges[one.charge] += 1
    facts.multiplicities[one.multiplicity] += 1
    facts.geometry[one.geometry] += 1
    facts.bonds[one.bonds] += 1
    for note in one.notes:
        rows, count = facts.notes.get(note, ([], 0))
        facts.notes[note] = ([*rows, one.row][:5], count + 1)


def _count_columns(facts: Facts, one: _Seen) -> None:
    facts.node_columns.update(one.node_columns)
    for name, value in one.columns.items():
        column = facts.columns.get(name)
        if column is None:
            column = facts.columns[name] = ColumnFacts()
            column.kinds["blank"] = facts.rows - 1  # rows before it have no such value
            usable = min(sum(facts.sizes.values()), _SAMPLE)
            column.sample.extend([math.nan] * usable)
        kind, number = _kind(value)
        column.kinds[kind] += 1
        if kind == "number":
            column.least, column.most = min(column.least, number), max(column.most, number)
        elif kind == "text" and not column.example:
            column.example = f"row {one.row}: {str(value)[:30]!r}"
    if one.refusal is None and sum(facts.sizes.values()) < _SAMPLE:
        for name, column in facts.columns.items():
            kind, number = _kind(one.columns.get(name))
            column.sample.append(number if kind == "number" else math.nan)
    for name, column in facts.columns.items():
        if name not in one.columns:
            column.kinds["blank"] += 1


def _kind(value: Any) -> tuple[str, float]:
    """(`number`, `infinite`, `blank`, `text` or `vector`; the number or NaN)."""
    if value is None or (isinstance(value, str) and value.strip().lower() in BLANK):
        return "blank", math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ("vector" if isinstance(value, np.ndarray | list) else "text"), math.nan
    if math.isnan(number):
        return "blank", math.nan
    return ("infinite" if math.isinf(number) else "number"), number


def _is_numeric(column: ColumnFacts) -> bool:
    return column.kinds["number"] > column.kinds["text"] + column.kinds["vector"]


def _label(one: _Seen, name: str) -> tuple[float, str]:
    """(The label, or NaN; what is wrong with it, or "")."""
    value = one.columns.get(name)
    kind, number = _kind(value)
    if kind in ("number", "blank"):
        return number, ""
    return math.nan, f"{name} is {str(value)[:40]!r}, which is no finite number"


def _check_targets(facts: Facts, targets: Sequence[Column], path) -> None:
    known = [*facts.columns, *facts.node_columns]
    for target in targets:
        if target.name not in known:
            raise UserError(
                f"{path} has no column {target.name!r}.{suggest(target.name, known)} Columns: "
                f"{', '.join(known) or 'none'}."
            )
