"""The periodic table, from RDKit: symbols, standard atomic weights, covalent radii."""

import functools

import numpy as np

from data_pipelines.errors import UserError, suggest

NUM_ELEMENTS = 118


@functools.cache
def _table():
    from rdkit import Chem  # takes 0.1 s to import, and only some commands need it

    return Chem.GetPeriodicTable()


@functools.cache
def symbols() -> tuple[str, ...]:
    """Symbol by atomic number; "" at 0, which is padding."""
    return ("", *(_table().GetElementSymbol(z) for z in range(1, NUM_ELEMENTS + 1)))


@functools.cache
def atomic_weights() -> np.ndarray:
    """[119] standard atomic weights by atomic number, float64; 0 at 0."""
    return np.array([0.0, *(_table().GetAtomicWeight(z) for z in range(1, NUM_ELEMENTS + 1))])


@functools.cache
def covalent_radii() -> np.ndarray:
    """[119] single-bond covalent radii, angstrom (Cordero et al. 2008); 0 at 0."""
    return np.array([0.0, *(_table().GetRcovalent(z) for z in range(1, NUM_ELEMENTS + 1))])


@functools.cache
def atomic_number(symbol: str) -> int:
    """Of an element's symbol; an unknown one is a `UserError`."""
    if symbol not in symbols()[1:]:
        raise UserError(f"Unknown element {symbol!r}.{suggest(symbol, symbols()[1:])}")
    return symbols().index(symbol)


def check_elements(atomic_numbers, elements: tuple[int, ...], molecule, data_set: str) -> None:
    """Refuses a molecule with an element that its data set does not name.

    Args:
      atomic_numbers: [n] of the molecule.
      elements: of the data set.
      molecule: its number or name, for the message.
      data_set: name, for the message.
    """
    others = sorted(set(np.asarray(atomic_numbers).tolist()) - set(elements))
    if others:
        name = lambda z: symbols()[z] if 0 < z <= NUM_ELEMENTS else f"number {z}"
        raise UserError(
            f"Molecule {molecule} has the element {', '.join(map(name, others))}, but data set "
            f"{data_set} has only {', '.join(map(name, elements))}: leave the molecule out, or use "
            "a data set that names this element."
        )


def composition(atomic_number_N: np.ndarray, node_offset_G: np.ndarray, elements) -> np.ndarray:
    """How many atoms of each of `elements` each molecule has: [G, Z] int64."""
    starts = node_offset_G[:-1]
    return np.stack(
        [np.add.reduceat(atomic_number_N == z, starts) for z in elements], axis=1
    ).astype(np.int64)
