"""What lies around a point: sums over the atoms of each element, by distance and by direction.

Products of such sums with spherical harmonics do not turn with the molecule, and tell at which
angles its atoms lie: the power spectrum of SOAP (Bartok et al. 2013).
"""

import itertools
from collections.abc import Callable

import jax.numpy as jnp

from data_pipelines.graph import Array, Graph
from demetar.models.layers import safe_norm
from demetar.models.spherical import spherical_harmonics


def sums_by_element(
    graph: Graph, elements: tuple[int, ...], radial_PxNxK: Array, weight_PxNxM: Array
) -> Array:
    """Of each of P points: sums over the atoms of each element of weight times radial basis.

    Args:
      graph: with N atoms.
      elements: atomic numbers, Z of them.
      radial_PxNxK: of the distances from the points to the atoms, in the type of the result.
      weight_PxNxM: M weights of each pair.

    Returns:
      `[P, M, Z K]`.
    """
    is_element_NxZ = graph.atomic_number[:, None] == jnp.asarray(elements)
    weight_PxNxMxZ = weight_PxNxM[..., None] * is_element_NxZ[:, None]
    sum_PxMxZxK = jnp.einsum(
        "pnk,pnmz->pmzk", radial_PxNxK, weight_PxNxMxZ.astype(radial_PxNxK.dtype)
    )
    return sum_PxMxZxK.reshape(*weight_PxNxM.shape[::2], -1)


def harmonic_sums(
    graph: Graph,
    elements: tuple[int, ...],
    radial: Callable[[Array], Array],
    orders: list[int],
) -> list[Array]:
    """Of each atom and order l: sums over all atoms of harmonics, `[N, 2 l + 1, Z K]`.

    Of itself an atom has order 0 alone.

    Args:
      graph: with N atoms.
      elements: atomic numbers, Z of them.
      radial: distances, angstrom -> K functions of each.
      orders: at least one.
    """
    apart_NxNx3 = graph.position[None] - graph.position[:, None]
    harmonics = [spherical_harmonics(order, apart_NxNx3, "norm") for order in orders]
    weight_NxNxM = jnp.concatenate(harmonics, axis=-1)
    sum_NxMxF = sums_by_element(graph, elements, radial(safe_norm(apart_NxNx3)), weight_NxNxM)
    ends = list(itertools.accumulate(2 * order + 1 for order in orders))
    return jnp.split(sum_NxMxF, ends[:-1], axis=1)


def direction(x: Array) -> Array:
    """`x` over its length; 0, with gradient 0, where that is 0."""
    return spherical_harmonics(1, x, "norm")
