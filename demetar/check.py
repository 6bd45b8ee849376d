"""Says what is in a file of molecules, and what is wrong with it, row by row.

    demetar check FILE [--smiles=COL] [--target=homo:eV --target=gap:eV] [--report=FAULTS.csv]

Reads CSV or Parquet with SMILES (or paths of xyz files), SDF, xyz, extxyz, ase's trajectories and
databases, NPZ and HDF5. Counts elements, sizes, charges and columns; lists rows that cannot be
used, labels that are no numbers, duplicates whose labels differ, and units that look wrong. A
target has its unit: homo:eV; 1 is none.

Exits 0 if any row can be used, else 2.
"""

import contextlib
import csv
import pathlib
import sys
from collections.abc import Mapping

from data_pipelines.errors import UserError
from data_pipelines.molecules import readers
from data_pipelines.molecules.checking.rows import ColumnFacts, Facts, Fault, check_file
from data_pipelines.molecules.readers.fields import clean
from data_pipelines.molecules.units import parse_column
from demetar.config import command_line
from demetar.exits import EXIT_DONE, EXIT_USER_ERROR, exits_cleanly

_SHOWN = 20  # faults that are printed; all of them go to --report
_MOST = 8  # items in a line


def describe(path, facts: Facts, shown: list[Fault], report: str) -> str:
    """What the command prints."""
    lines = [
        f"{path}: {readers.format_of(path).name}, {facts.rows:,} rows, {facts.usable:,} usable"
    ]
    if facts.sizes:
        lines += _about_molecules(facts)
    lines += [f"  column {name}: {_about_column(c)}" for name, c in facts.columns.items()]
    lines += [f"  of atoms {n}: in {c:,} rows" for n, c in facts.node_columns.items()]
    if facts.notes or facts.repeats:
        lines.append("To know:")
    for note, (rows, count) in facts.notes.items():
        more = ", ..." if count > len(rows) else ""
        lines.append(f"  {note}: {count:,} rows ({', '.join(map(str, rows))}{more})")
    if facts.repeats:
        lines.append(
            f"  {facts.repeats:,} rows repeat a molecule of before; a split keeps them in one part"
        )
    if facts.suspicions:
        lines += ["Suspicious units:", *(f"  {text}" for text in facts.suspicions)]
    lines.append(f"Wrong: {facts.faults:,}" if facts.faults else "Nothing is wrong.")
    lines += [f"  row {fault.row}: {fault.status}: {fault.message}" for fault in shown]
    if facts.faults > len(shown):
        where = f"all of them are in {report}" if report else "--report=FAULTS.csv lists all"
        lines.append(f"  and {facts.faults - len(shown):,} more; {where}")
    return "\n".join(lines)


def _about_molecules(facts: Facts) -> list[str]:
    sizes = sorted(facts.sizes.elements())
    elements = [
        f"{symbol} in {molecules:,}"
        for symbol, (_, molecules) in sorted(facts.elements.items(), key=lambda item: -item[1][1])
    ]
    rows = {
        "elements": ", ".join(elements),
        "atoms": f"{sizes[0]} to {sizes[-1]}, median {sizes[len(sizes) // 2]}",
        "charges": _counts({f"{c:+d}" if c else "0": n for c, n in facts.charges.items()}),
        "multiplicities": _counts(facts.multiplicities),
        "geometry": _counts(facts.geometry),
        "bonds from": _counts(facts.bonds),
    }
    return [f"  {name:15}{text}" for name, text in rows.items()]


def _counts(counts: Mapping) -> str:
    items = [f"{name}: {count:,}" for name, count in sorted(counts.items(), key=lambda i: -i[1])]
    return ", ".join(items[:_MOST]) + (", ..." if len(items) > _MOST else "")


def _about_column(column: ColumnFacts) -> str:
    order = ("number", "text", "vector", "infinite", "blank")
    said = [f"{column.kinds[kind]:,} {kind}" for kind in order if column.kinds[kind]]
    if column.kinds["number"]:
        said[0] += f" ({column.least:g} to {column.most:g})"
        if column.example:
            said.append(f"first text in {column.example}")
    return ", ".join(said)


@contextlib.contextmanager
def _report(path: str):
    """A function that writes a fault into the file of `--report`, if there is one."""
    if not path:
        yield lambda fault: None
        return
    try:
        with pathlib.Path(path).open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(["row", "status", "message"])
            yield lambda fault: table.writerow([fault.row, fault.status, clean(fault.message)])
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error}. Choose another --report.") from error


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("check", __doc__)
    parser.add_argument("file", metavar="FILE", help="of molecules")
    parser.add_argument("--smiles", default="", metavar="COL", help="column of the SMILES")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME:UNIT",
        help="a column to learn, and its unit; may be repeated",
    )
    parser.add_argument("--report", default="", metavar="FILE.csv", help="file for all faults")
    options = command_line.parse(parser, arguments)
    targets = [parse_column(text) for text in options.target]
    if options.report and pathlib.Path(options.report).absolute() == (
        pathlib.Path(options.file).absolute()
    ):
        raise UserError(f"--report={options.report} is the file itself: choose another.")
    shown: list[Fault] = []
    with _report(options.report) as write:

        def note(fault: Fault) -> None:
            write(fault)
            if len(shown) < _SHOWN:
                shown.append(fault)

        facts = check_file(options.file, targets, options.smiles, note)
    print(clean(describe(options.file, facts, shown, options.report)))
    return EXIT_DONE if facts.usable else EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
