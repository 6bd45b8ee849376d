"""QM9's properties: units, single-atom values, and which target each one is.

Everything that turns a column of the source into the number a model learns, and back into the
number a paper prints, is a row here. Conversions are done in float64: float32 resolves a total
energy of -411 hartree only to 0.8 meV, and the best models err by 4.
"""

import dataclasses

import numpy as np

from data_pipelines.errors import UserError, check_known
from data_pipelines.targets import Target

HARTREE_IN_MEV = 27211.386245988  # CODATA 2018
ELEMENTS = (1, 6, 7, 8, 9)  # H, C, N, O, F
# The columns of the published xyz files, in their order; also the order of the prepared arrays.
COLUMNS = tuple("A B C mu alpha homo lumo gap r2 zpve U0 U H G Cv".split())

# Energies of single atoms at the level of theory of QM9 (B3LYP/6-31G(2df,p)), hartree; heat
# capacity of a free atom, cal/(mol K). From the file atomref.txt published with QM9.
ATOM_REFERENCES = {
    "U0": {1: -0.500273, 6: -37.846772, 7: -54.583861, 8: -75.064579, 9: -99.718730},
    "U": {1: -0.498857, 6: -37.845355, 7: -54.582445, 8: -75.063163, 9: -99.717314},
    "H": {1: -0.497912, 6: -37.844411, 7: -54.581501, 8: -75.062219, 9: -99.716370},
    "G": {1: -0.510927, 6: -37.861317, 7: -54.598897, 8: -75.079532, 9: -99.733544},
    "Cv": {1: 2.981, 6: 2.981, 7: 2.981, 8: 2.981, 9: 2.981},
}


@dataclasses.dataclass(frozen=True)
class Property:
    """One property of QM9.

    Attributes:
      target: what a model is asked for; its unit is that of reported errors.
      column: of `COLUMNS`.
      source_unit: unit of that column.
      factor: `label = factor * (column - single-atom values)`.
      atom_references: whether the values of single atoms are subtracted before learning.
    """

    target: Target
    column: str
    source_unit: str
    factor: float = 1.0
    atom_references: bool = False


def _plain(name: str, symbol: str, unit: str, readout: str, extensive=False, references=False):
    return Property(Target(name, unit, symbol, readout, extensive), name, unit, 1.0, references)


def _energy(name: str, symbol: str, readout: str, extensive=False, references=False) -> Property:
    target = Target(name, "meV", symbol, readout, extensive)
    return Property(target, name, "hartree", HARTREE_IN_MEV, references)


# What `config.data.targets` may name. A row may read any column, and several the same.
PROPERTIES = {
    row.target.name: row
    for row in (
        _plain("A", "A", "GHz", "mean"),
        _plain("B", "B", "GHz", "mean"),
        _plain("C", "C", "GHz", "mean"),
        _plain("mu", "μ", "D", "cls"),
        _plain("alpha", "α", "bohr^3", "sum", extensive=True),
        _energy("homo", "ε_HOMO", "cls"),
        _energy("lumo", "ε_LUMO", "cls"),
        _energy("gap", "Δε", "cls"),
        _plain("r2", "⟨R²⟩", "bohr^2", "sum", extensive=True),
        _energy("zpve", "ZPVE", "sum", extensive=True),
        _energy("U0", "U₀", "sum", extensive=True, references=True),
        _energy("U", "U", "sum", extensive=True, references=True),
        _energy("H", "H", "sum", extensive=True, references=True),
        _energy("G", "G", "sum", extensive=True, references=True),
        _plain("Cv", "c_v", "cal/(mol K)", "sum", extensive=True, references=True),
    )
}


def get_properties(names) -> tuple[Property, ...]:
    """The rows named, in that order; an unknown or repeated name is a `UserError`."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise UserError("config.data.targets is empty: name at least one target, e.g. ('homo',).")
    for name in names:
        check_known("target in config.data.targets", name, PROPERTIES)
    if len(set(names)) != len(names):
        raise UserError(f"config.data.targets names a target twice: {', '.join(names)}.")
    return tuple(PROPERTIES[name] for name in names)


def atom_reference_sum(column: str, composition_GxZ: np.ndarray) -> np.ndarray:
    """Sum of single-atom values per molecule, source unit, float64 [G].

    `composition_GxZ` counts the atoms of each of `ELEMENTS`.
    """
    reference = ATOM_REFERENCES[column]
    return composition_GxZ.astype(np.float64) @ np.array([reference[z] for z in ELEMENTS])


def references(properties: tuple[Property, ...]) -> dict[str, dict[int, float]]:
    """As `Dataset.references`: name of a target -> atomic number -> value in the target's unit."""
    return {
        row.target.name: {z: row.factor * x for z, x in ATOM_REFERENCES[row.column].items()}
        for row in properties
        if row.atom_references
    }


def labels(
    properties: tuple[Property, ...], columns_GxC: np.ndarray, composition_GxZ: np.ndarray
) -> dict[str, np.ndarray]:
    """What a model learns: references subtracted, reported unit, float64 [G] of each target."""
    found = {}
    for row in properties:
        label_G = columns_GxC[:, COLUMNS.index(row.column)].astype(np.float64)
        if row.atom_references:
            label_G = label_G - atom_reference_sum(row.column, composition_GxZ)
        found[row.target.name] = label_G * row.factor
    return found
