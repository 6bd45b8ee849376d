"""Units of columns, by pint: `homo:eV` is column `homo` in electronvolt.

Own data have no default unit: a column is named with its unit, and `1` is none. A mole is a number
here (6.02214076e23), so kcal/mol and eV are both energies of one particle.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

from data_pipelines.errors import UserError, suggest

# For suggestions; any other unit that pint knows is as good.
_USUAL = (
    "eV meV hartree Ha kcal/mol kJ/mol cal/mol/K J/mol/K debye D e*angstrom bohr angstrom "
    "angstrom^2 bohr^2 bohr^3 angstrom^3 eV/angstrom hartree/bohr kcal/mol/angstrom "
    "GHz 1/cm K nm mol/L 1"
).split()
# What pint reads as something that no molecule has.
_MISREAD = {
    "au": "'au' is an astronomical unit: write hartree, bohr, e*bohr or bohr^3",
    "a.u.": "'a.u.' is any atomic unit: write hartree, bohr, e*bohr or bohr^3",
    "ha": "'ha' is a hectare: write Ha or hartree",
    "A": "'A' is ampere: write angstrom",
    "ev": "'ev' is no unit: write eV",
    "EV": "'EV' is an exavolt: write eV",
    "Ev": "'Ev' is no unit: write eV",
    "MeV": "'MeV' is a million electronvolt: write meV for a thousandth",
}


class Column(NamedTuple):
    """A column of a file, and the unit that its numbers have; "1" is none."""

    name: str
    unit: str


def parse_column(text: str) -> Column:
    """`"homo:eV"` as a column; a text without a unit, or with an unknown one, is a `UserError`."""
    name, colon, unit = str(text).strip().rpartition(":")
    name, unit = name.strip(), unit.strip()
    if not colon or not name or not unit:
        name = (name or unit).strip() or "homo"
        raise UserError(
            f"Target {text!r} has no unit, and own data have no default one: write {name}:eV, or "
            f"another unit, or {name}:1 if it has none."
        )
    try:
        check_unit(unit)
    except UserError as error:
        raise UserError(f"Target {text!r}: {error}") from error
    return Column(name, unit)


def check_unit(unit: str) -> None:
    """Refuses a unit that pint does not know, or would misread."""
    _parse(unit)


def factor(unit: str, into: str) -> float:
    """By what a number in `unit` is multiplied to be in `into`; other dimensions are refused."""
    registry = _registry()
    try:
        one, two = (registry.Quantity(x, _parse(unit)).m_as(_parse(into)) for x in (1.0, 2.0))
    except registry.errors.DimensionalityError as error:
        raise UserError(
            f"{unit} cannot be converted to {into}: one measures {_kind(unit)}, the other "
            f"{_kind(into)}. Declare the unit that the numbers have."
        ) from error
    if not np.isclose(two, 2 * one, rtol=1e-12, atol=0):
        raise UserError(f"{unit} and {into} do not share their zero: use kelvin.")
    return float(one)


def convert(values, unit: str, into: str) -> np.ndarray:
    """Numbers in `unit`, of any shape, as float64 in `into`; NaN stays NaN."""
    return np.asarray(values, np.float64) * factor(unit, into)


@functools.cache
def _registry():
    import pint  # takes half a second, and only some commands need it

    registry = pint.UnitRegistry(on_redefinition="ignore")
    registry.errors = pint.errors
    registry.define("mole = 6.02214076e23 = mol")  # a number: energies per mole are per particle
    registry.define("@alias hartree = Ha")
    return registry


@functools.cache
def _parse(unit: str):
    """pint's unit."""
    words = re.findall(r"a\.u\.|[^\W\d_]\w*", unit)
    for word in words:
        if word in _MISREAD:
            raise UserError(f"unit {unit!r}: {_MISREAD[word]}.")
    registry = _registry()
    if unit == "1":
        return registry.dimensionless
    try:
        return registry.parse_units(unit)
    except Exception as error:  # pint raises what its tokenizer, parser and registry raise
        raise UserError(
            f"unit {unit!r} is unknown.{suggest(unit, _USUAL)} Units are pint's, such as "
            f"{', '.join(_USUAL[:8])}; 1 is none."
        ) from error


def _kind(unit: str) -> str:
    return str(_parse(unit).dimensionality or "a number")
