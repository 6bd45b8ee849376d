"""Numbers that are probably not in the unit declared: found by their size and their ratios.

    27.2114   eV in a hartree            627.51   kcal/mol in a hartree
    23.0605   kcal/mol in an eV          and so on, see `FACTORS`

Nothing here is certain, so all of it is said to a person and none refused.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.molecules.units import factor

_ENERGIES = ("hartree", "eV", "kcal/mol", "kJ/mol")
# What a number is multiplied with, from the first unit into the second.
FACTORS = {
    (a, b): (27.211386, 23.060548, 4.184, 627.50947, 96.485332, 2625.4996)[k]
    for k, (a, b) in enumerate(
        [
            ("hartree", "eV"),
            ("eV", "kcal/mol"),
            ("kcal/mol", "kJ/mol"),
            ("hartree", "kcal/mol"),
            ("eV", "kJ/mol"),
            ("hartree", "kJ/mol"),
        ]
    )
}
_CLOSE = 0.06  # relative; the factors are further apart
_MANY_EV_PER_ATOM = 1000.0
# |median| in eV that a property of closed-shell organic molecules has, by a word in its name.
_RANGES = {"homo": (3.0, 16.0), "gap": (1.5, 20.0), "zpve": (0.2, 15.0), "zpe": (0.2, 15.0)}


def suspicions(
    values: Mapping[str, np.ndarray],
    units: Mapping[str, str],
    atoms_G: np.ndarray,
    total_G: np.ndarray,
) -> list[str]:
    """Sentences, one for each suspicion.

    Args:
      values: column -> [G] float64, NaN where there is none.
      units: column -> its unit, of those that are declared.
      atoms_G: [G] atoms of each molecule.
      total_G: [G] rough total energy of each molecule in eV, see `rough_total_energy`.
    """
    found = []
    in_ev = {}
    for name, unit in units.items():
        if name not in values:
            continue
        try:
            in_ev[name] = values[name] * factor(unit, "eV")
        except UserError:
            continue  # no energy
        found += _size(name, unit, in_ev[name], atoms_G, total_G)
    for name, value_G in values.items():
        found += _two_units(name, value_G)
    found += _pairs({**values, **in_ev}, units)
    return found


def rough_total_energy(atomic_numbers: np.ndarray) -> float:
    """Total electronic energy of some atoms, eV: -13.6 Z^2.41 each, right to 3 % up to bromine."""
    return float(-13.6057 * (atomic_numbers.astype(np.float64) ** 2.41).sum())


def _size(name: str, unit: str, ev_G, atoms_G, total_G) -> list[str]:
    """Whether an energy is too large, or as large as one in another unit would be."""
    known = np.isfinite(ev_G) & (atoms_G > 0)
    if not known.any():
        return []
    size = float(np.median(np.abs(ev_G[known])))
    per_atom = float(np.median(np.abs(ev_G[known]) / atoms_G[known]))
    ratio_g = ev_G[known] / total_G[known]
    ratio = float(np.median(ratio_g))
    if near := _wrong_total(ratio_g, total_G[known]):
        return [
            f"{name}:{unit} is {ratio:.4g} times a total energy of these atoms: it may be in "
            f"{_other(unit, ratio, near)}."
        ]
    if abs(ratio - 1) < _CLOSE:
        return []  # a total energy, in the right unit
    if per_atom > _MANY_EV_PER_ATOM:
        return [
            f"{name}:{unit} has a median of {per_atom:,.0f} eV an atom, more than "
            f"{_MANY_EV_PER_ATOM:,.0f}: is the unit right?"
        ]
    words = re.split(r"[\W_\d]+", name.lower())
    for low, high in (_RANGES[word] for word in words if word in _RANGES):
        if low <= size <= high:
            continue
        number = size / factor(unit, "eV")
        fits = [u for u in _ENERGIES if low <= number * factor(u, "eV") <= high]
        guess = f"; in {' or '.join(fits)} it would not be" if fits else ""
        return [
            f"{name}:{unit} has a median of {size:.4g} eV, which is unusual ({low:g} to "
            f"{high:g}){guess}."
        ]
    return []


def _wrong_total(ratio_g: np.ndarray, total_g: np.ndarray):
    """The factor by which all are total energies in another unit, or None."""
    near = _factor_near(float(np.median(ratio_g)))
    low, high = np.quantile(total_g / np.median(total_g), [0.1, 0.9])
    if high - low < 0.2:
        # Molecules of one size: any property is a constant part of the energy, most a small one.
        return near if abs(np.median(ratio_g)) > 0.02 else None
    low, high = np.quantile(ratio_g / np.median(ratio_g), [0.1, 0.9])
    return near if len(ratio_g) > 4 and high - low < 0.15 else None


def _factor_near(ratio: float) -> tuple[tuple[str, str], bool] | None:
    """(The pair of units, whether numbers are in the second and declared in the first)."""
    for pair, times in FACTORS.items():
        if abs(ratio / times - 1) < _CLOSE:
            return pair, True
        if abs(ratio * times - 1) < _CLOSE:
            return pair, False
    return None


def _other(unit: str, ratio: float, near) -> str:
    """The usual unit that the numbers probably have."""
    for other in _ENERGIES:
        if abs(factor(unit, other) / ratio - 1) < _CLOSE:
            return other
    (first, second), up = near
    return second if up else first


def _two_units(name: str, value_G: np.ndarray) -> list[str]:
    """A column whose sizes fall into two heaps, apart by one of the factors."""
    known = np.flatnonzero(np.isfinite(value_G) & (value_G != 0))
    few = max(3, len(known) // 100)
    if len(known) < 3 * few:
        return []
    order = known[np.argsort(np.abs(value_G[known]), kind="stable")]
    size = np.log(np.abs(value_G[order]))
    gap = np.diff(size)[few - 1 : len(size) - few]
    cut = few + int(gap.argmax())
    # Where one heap ends the other is far, or it is one broad distribution.
    if gap.max() < math.log(2):
        return []
    typical = math.exp(np.median(size[cut:]) - np.median(size[:cut]))
    near = [pair for pair, times in FACTORS.items() if abs(typical / times - 1) < 3 * _CLOSE]
    if not near:
        return []
    odd = order[:cut] if cut < len(order) - cut else order[cut:]
    return [
        f"{name} may be in two units: {len(odd)} of {len(known)} numbers, such as "
        f"{value_G[odd.min()]:.6g}, and the others, such as "
        f"{value_G[np.setdiff1d(known, odd).min()]:.6g}, are about {typical:.3g} times apart, as "
        f"{near[0][0]} and {near[0][1]} are."
    ]


def _pairs(values: Mapping[str, np.ndarray], units: Mapping[str, str]) -> list[str]:
    found = []
    names: Sequence[str] = list(values)[:30]
    for a, b in itertools.combinations(names, 2):
        if (a in units) != (b in units):
            continue
        both = np.isfinite(values[a]) & np.isfinite(values[b]) & (values[a] != 0) & (values[b] != 0)
        if both.sum() < 5:
            continue
        ratio_g = values[a][both] / values[b][both]
        ratio = float(np.median(ratio_g))
        low, high = np.quantile(ratio_g / ratio, [0.1, 0.9])
        near = _factor_near(ratio)
        if near and high - low < 1e-3 and abs(ratio / _exact(ratio, near) - 1) < 2e-3:
            larger, smaller = (a, b) if abs(ratio) > 1 else (b, a)
            declared = ", although their units are declared" if a in units else ""
            found.append(
                f"{larger} is {max(ratio, 1 / ratio):.4f} times {smaller}: the same in "
                f"{near[0][1]} and {near[0][0]}{declared}?"
            )
    return found


def _exact(ratio: float, near) -> float:
    times = FACTORS[near[0]]
    return times if near[1] else 1 / times
