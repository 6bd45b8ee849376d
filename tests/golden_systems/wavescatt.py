"""Scattering coefficients: no weights, so that the "model" is the function that prepares them."""

import re

import numpy as np

from data_pipelines.scattering import transform
from data_pipelines.scattering.transform import DENSITIES, Scattering
from golden_systems.common import System


class Coefficients:
    """In the place of a flax module: nothing to learn, nothing captured."""

    def __init__(self, scattering: Scattering):
        self.scattering = scattering

    def init(self, key, graph):
        return {"params": {}}

    def apply(self, variables, graph, **options):
        molecule = graph.position, graph.atomic_number, self.scattering
        grid = transform.density(*molecule)
        found = {"output": transform.coefficients(*molecule), "density_nuclear": grid[0]}
        order_0, path = transform.scatter(grid, self.scattering)
        for number, name in enumerate(DENSITIES):
            found |= {f"order_0_{name}": order_0[number], f"scattering_{name}": path[number]}
        return found, {"intermediates": {}}


def _scattering(golden, meta) -> Scattering:
    options = meta["options"]
    return Scattering(
        shape=tuple(options["shape"]),
        J=options["J"],
        L=options["L"],
        sigma=options["sigma_0"],
        powers=tuple(options["integral_powers"]),
        pixels_per_angstrom=options["pixels_per_angstrom"],
    )


def _layers(captured, predictions, batch, golden, meta):
    found = {name: x for name, x in predictions.items() if name in golden}
    # Every fourth pixel along each axis, of the first molecule.
    found["density_nuclear_of_first"] = predictions["density_nuclear"][0, ::4, ::4, ::4]
    scattering = _scattering(golden, meta)
    for name in golden:
        if match := re.fullmatch(r"buffer/filter_l(\d+)_j(\d+)_m0_part", name):
            found[name] = _first_filter(scattering, *map(int, match.groups()))
    return found


def _first_filter(scattering: Scattering, degree: int, j: int) -> np.ndarray:
    """[5, 5, 5, 2]: psi of m = -l at the lowest frequencies, real and imaginary part."""
    real = transform._filters(scattering)[j, degree][: 2 * degree + 1, :5, :5, :5]
    phase = (-1j) ** degree / (-1j if degree % 2 else 1)
    psi = real[0] if degree == 0 else phase * (real[-2] - 1j * real[-1]) / np.sqrt(2)
    return np.stack([psi.real, psi.imag], axis=-1)


SYSTEMS = {
    "wavescatt": System(
        model=lambda golden, meta: Coefficients(_scattering(golden, meta)),
        official=lambda params, golden, meta: {},
        output=lambda predictions, batch: predictions["output"],
        layers=_layers,
    )
}
