"""Predictions as SDF and extended xyz: the record of the input with more values, or one made."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.elements import symbols
from data_pipelines.molecules.readers.fields import clean
from data_pipelines.molecules.readers.sdf import TITLE
from data_pipelines.molecules.readers.xyz import is_plain
from data_pipelines.molecules.record import Molecule, Row
from data_pipelines.molecules.writers.base import Writer, as_text, atoms_of, one_line
from data_pipelines.molecules.writers.tables import TextFile


class SdfWriter(Writer):
    """SDF; a row without a molecule is a record without atoms."""

    def open(self) -> None:
        self._file = TextFile(self.building, self.path)

    def write(
        self,
        rows: Sequence[Row],
        outputs: Mapping[str, Sequence[Any]],
        molecules: Sequence[Molecule | None] | None = None,
    ) -> None:
        for k, row in enumerate(rows):
            new = {name: outputs[name][k] for name in self.columns}
            if row.text and self.source_is(".sdf", ".sdf.gz"):
                block, values = row.text.rstrip("\n"), new
                block += "\n\n" if "\n>" in block else "\n"
            else:
                block = _mol_block(row, molecules[k] if molecules else None)
                old = {n: row.columns.get(n) for n in self.names if n != TITLE}
                values = old | new
            named = "".join(f"> <{n}>\n{one_line(v)}\n\n" for n, v in values.items())
            self._file.text.write(f"{block}{named}$$$$\n")

    def source_is(self, *suffixes: str) -> bool:
        """Whether the rows come from a file of one of these kinds."""
        return self.source.name.lower().endswith(suffixes)

    def close(self) -> None:
        self._file.close()


def _mol_block(row: Row, molecule: Molecule | None) -> str:
    from rdkit import Chem

    graph = _graph(row, molecule)
    graph.SetProp("_Name", clean(one_line(row.columns.get(TITLE))))
    return Chem.MolToMolBlock(graph, kekulize=True)


def _graph(row: Row, molecule: Molecule | None):
    """RDKit's molecule; without bonds where the row has none, or none that RDKit takes."""
    from rdkit import Chem

    from data_pipelines.molecules.making import chemistry

    if molecule is not None and (graph := chemistry.graph_of(molecule)) is not None:
        return graph
    numbers, positions = atoms_of(row, molecule)
    if molecule is None and row.bonds is not None and len(numbers):
        graph = chemistry.from_bonds(numbers, row.bonds, row.charge or 0, positions)
        if graph is not None:
            return graph
    graph = Chem.RWMol()
    for number in numbers.tolist():
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        graph.AddAtom(atom)
    conformer = Chem.Conformer(len(numbers))
    for k, position in enumerate(positions.tolist()):
        conformer.SetAtomPosition(k, position)
    graph.AddConformer(conformer)
    return graph


class XyzWriter(Writer):
    """Extended xyz; a row without a molecule is a frame of 0 atoms."""

    def open(self) -> None:
        self._file = TextFile(self.building, self.path)
        kinds = {suffix.lower() for suffix in self.source.suffixes}
        self._from_xyz = bool(kinds & {".xyz", ".extxyz"})

    def write(
        self,
        rows: Sequence[Row],
        outputs: Mapping[str, Sequence[Any]],
        molecules: Sequence[Molecule | None] | None = None,
    ) -> None:
        for k, row in enumerate(rows):
            new = {name: outputs[name][k] for name in self.columns}
            per_atom = {n: new.pop(n) for n, kind in self.columns.items() if kind == "atoms"}
            if self._from_xyz and row.text:
                count, comment, *lines = f"{row.text}\n".split("\n")
                lines = lines[: int(count)]
                comment, values = _extended(comment.strip()), new
            else:
                numbers, positions = atoms_of(row, molecules[k] if molecules else None)
                comment, lines = _frame(numbers, positions, row)
                values = {n: row.columns.get(n) for n in self.names} | new
            comment, lines = _add_to_atoms(comment, lines, per_atom)
            comment = f"{comment} {_pairs(values)}".strip()
            self._file.text.write("\n".join([str(len(lines)), comment, *lines]) + "\n")

    def close(self) -> None:
        self._file.close()


_PROPERTIES = "Properties=species:S:1:pos:R:3"


def _extended(comment: str) -> str:
    """A comment to which `name=value` can be added."""
    return _pairs({"comment": comment}) if comment and is_plain(comment) else comment


def _frame(numbers: np.ndarray, positions: np.ndarray, row: Row) -> tuple[str, list[str]]:
    lines = [
        f"{symbols()[z]:2} {x:15.8f} {y:15.8f} {w:15.8f}"
        for z, (x, y, w) in zip(numbers.tolist(), positions.tolist(), strict=True)
    ]
    comment = f'{_PROPERTIES} pbc="F F F"'
    kept = {n: v for n, v in row.node_columns.items() if len(v) == len(lines)}
    return _add_to_atoms(comment, lines, kept)


def _add_to_atoms(
    comment: str, lines: list[str], values: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """The comment and the lines of atoms with more columns; those of other lengths are left out."""
    for name, numbers in values.items():
        if numbers is None or len(numbers) != len(lines) or not lines:
            continue
        table = np.asarray(numbers).reshape(len(lines), -1)
        kind = {"i": "I", "u": "I", "f": "R", "b": "L"}.get(table.dtype.kind, "S")
        if "Properties=" not in comment:
            comment = f"{_PROPERTIES} {comment}".strip()
            lines = [" ".join(line.split()[:4]) for line in lines]  # ase ignores the others
        head, _, tail = comment.partition("Properties=")
        old, *more = tail.split(" ", 1)
        comment = f"{head}Properties={old}:{name}:{kind}:{table.shape[1]} {' '.join(more)}"
        cells = [" ".join(map(str, row)) for row in table.tolist()]
        lines = [f"{line} {cell}" for line, cell in zip(lines, cells, strict=True)]
    return comment.strip(), lines


def _pairs(values: Mapping[str, Any]) -> str:
    """`name=value ...`; what has no value is left out."""
    from ase.io.extxyz import key_val_dict_to_str

    kept = {
        name: one_line(value) if isinstance(value, str) else value
        for name, value in values.items()
        if as_text(value)
    }
    return key_val_dict_to_str(kept)
