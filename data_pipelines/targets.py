"""The one table of targets: units, atom references, extensivity, read-out and metric.

Everything that turns a column of the source into the number a model learns, and back
into the number a paper prints, is a row here. Conversions are done in float64: float32
resolves a total energy of -411 hartree only to 0.8 meV, and the best models err by 4.
"""

import dataclasses

import numpy as np

from data_pipelines.errors import UserError, suggest

HARTREE_IN_MEV = 27211.386245988  # CODATA 2018

# Energies of single atoms at the level of theory of QM9 (B3LYP/6-31G(2df,p)), hartree; heat
# capacity of a free atom, cal/(mol K). From the file atomref.txt published with QM9.
ATOM_REFERENCES = {
    "U0": {1: -0.500273, 6: -37.846772, 7: -54.583861, 8: -75.064579, 9: -99.718730},
    "U": {1: -0.498857, 6: -37.845355, 7: -54.582445, 8: -75.063163, 9: -99.717314},
    "H": {1: -0.497912, 6: -37.844411, 7: -54.581501, 8: -75.062219, 9: -99.716370},
    "G": {1: -0.510927, 6: -37.861317, 7: -54.598897, 8: -75.079532, 9: -99.733544},
    "Cv": {1: 2.981, 6: 2.981, 7: 2.981, 8: 2.981, 9: 2.981},
}
ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}


@dataclasses.dataclass(frozen=True)
class Target:
    """One property of QM9, or the positions of particles.

    Attributes:
      name: what `config.data.targets` calls it, and the key in `result.json`.
      symbol: as papers print it.
      source_unit: unit of the published files.
      unit: unit in which errors are reported.
      factor: `reported = factor * source`.
      atom_references: whether single-atom values are subtracted before learning.
      extensive: whether it grows with the molecule (then it is normalised per atom).
      readout: the read-out that suits it; `config.model.readout` can override it.
      metric: of its reported error, `mae` or `mse`; the unit of an mse is `unit` squared.
    """

    name: str
    symbol: str
    source_unit: str
    unit: str
    factor: float
    atom_references: bool
    extensive: bool
    readout: str
    metric: str = "mae"


def _energy(name: str, symbol: str, references: bool, extensive: bool, readout: str) -> Target:
    return Target(name, symbol, "hartree", "meV", HARTREE_IN_MEV, references, extensive, readout)


# In the column order of the published xyz files; also the order of the prepared arrays.
TARGETS = {
    t.name: t
    for t in (
        Target("A", "A", "GHz", "GHz", 1.0, False, False, "mean"),
        Target("B", "B", "GHz", "GHz", 1.0, False, False, "mean"),
        Target("C", "C", "GHz", "GHz", 1.0, False, False, "mean"),
        Target("mu", "μ", "D", "D", 1.0, False, False, "cls"),
        Target("alpha", "α", "bohr^3", "bohr^3", 1.0, False, True, "sum"),
        _energy("homo", "ε_HOMO", False, False, "cls"),
        _energy("lumo", "ε_LUMO", False, False, "cls"),
        _energy("gap", "Δε", False, False, "cls"),
        Target("r2", "⟨R²⟩", "bohr^2", "bohr^2", 1.0, False, True, "sum"),
        _energy("zpve", "ZPVE", False, True, "sum"),
        _energy("U0", "U₀", True, True, "sum"),
        _energy("U", "U", True, True, "sum"),
        _energy("H", "H", True, True, "sum"),
        _energy("G", "G", True, True, "sum"),
        Target("Cv", "c_v", "cal/(mol K)", "cal/(mol K)", 1.0, True, True, "sum"),
    )
}
TARGET_NAMES = tuple(TARGETS)
# Where the particles of an N-body system are after the horizon, in the simulator's length.
POSITION = Target("position", "x", "length", "length", 1.0, False, False, "position", "mse")


def get_targets(names) -> tuple[Target, ...]:
    """The rows named, in that order; an unknown or repeated name is a `UserError`."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise UserError("config.data.targets is empty: name at least one target, e.g. ('homo',).")
    for name in names:
        if name not in TARGETS:
            raise UserError(
                f"Unknown target {name!r} in config.data.targets.{suggest(name, TARGETS)} "
                f"Known: {', '.join(TARGETS)}."
            )
    if len(set(names)) != len(names):
        raise UserError(f"config.data.targets names a target twice: {', '.join(names)}.")
    return tuple(TARGETS[name] for name in names)


def atom_reference_sum(name: str, composition_Gx5: np.ndarray) -> np.ndarray:
    """Sum of single-atom values per molecule, source unit, float64 [G].

    `composition_Gx5` counts H, C, N, O, F.
    """
    reference = ATOM_REFERENCES[name]
    return composition_Gx5.astype(np.float64) @ np.array([reference[z] for z in ELEMENTS.values()])


def reported_values(
    targets: tuple[Target, ...], properties_GxP: np.ndarray, composition_Gx5: np.ndarray
) -> np.ndarray:
    """What a model learns: references subtracted, reported unit, float64 [G, T]."""
    columns = []
    for target in targets:
        column_G = properties_GxP[:, TARGET_NAMES.index(target.name)].astype(np.float64)
        if target.atom_references:
            column_G = column_G - atom_reference_sum(target.name, composition_Gx5)
        columns.append(column_G * target.factor)
    return np.stack(columns, axis=1)
