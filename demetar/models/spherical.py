"""Real spherical harmonics and the Clebsch-Gordan matrices between them.

Order, axes and signs are those of e3nn (Geiger and Smidt 2022), so that numbers of models written
with it can be compared: the components of order l are m = -l .. l about the axis y, and order 1
is (x, y, z). Computed from the formulas here: the package e3nn-jax would add sympy, for two
functions.
"""

import functools
import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np

from data_pipelines.graph import Array
from demetar.models.layers import safe_norm

NORMALIZATIONS = ("norm", "component", "integral")


def spherical_harmonics(order: int, vector: Array, normalization: str = "component") -> Array:
    """Y_l of the direction of a vector, `[..., 3] -> [..., 2 l + 1]`.

    Polynomials of the direction's components: smooth everywhere but at the zero vector, where all
    orders above 0 and their gradients are 0.

    Args:
      order: l.
      vector: of any length.
      normalization: the squares over m add up to 1 (`norm`), to 2 l + 1 (`component`), or
        to (2 l + 1) / 4 pi, so that their integral over the sphere is 1 each (`integral`).
    """
    length = safe_norm(vector)[..., None]
    is_zero = length == 0
    direction = jnp.where(is_zero, 0, vector) / jnp.where(is_zero, 1, length)
    x, y, z = direction[..., 0], direction[..., 1], direction[..., 2]
    scale = {"norm": 1, "component": 2 * order + 1, "integral": (2 * order + 1) / (4 * math.pi)}
    cosine, sine = jnp.ones_like(y), jnp.zeros_like(y)  # of m times the azimuth, times sin^m
    parts = {}
    for m in range(order + 1):
        factor = (1 if m == 0 else 2) * math.factorial(order - m) / math.factorial(order + m)
        legendre = _legendre(order, m, y) * math.sqrt(factor * scale[normalization])
        parts[m] = legendre * cosine
        if m:
            parts[-m] = legendre * sine
        cosine, sine = z * cosine - x * sine, z * sine + x * cosine
    values = jnp.stack([parts[m] for m in range(-order, order + 1)], axis=-1)
    return jnp.where(is_zero, 0, values) if order else values


def _legendre(order: int, m: int, y: Array) -> Array:
    """The derivative of order m of Legendre's polynomial P_l at y, by the recursion in l."""
    before, here = jnp.zeros_like(y), jnp.full_like(y, math.prod(range(1, 2 * m, 2)))
    for k in range(m + 1, order + 1):
        before, here = here, ((2 * k - 1) * y * here - (k + m - 1) * before) / (k - m)
    return here


@functools.cache
def clebsch_gordan(order_1: int, order_2: int, order_3: int) -> np.ndarray:
    """What couples Y_l1 and Y_l2 to order l3, `[2 l1 + 1, 2 l2 + 1, 2 l3 + 1]` in float64.

    The one tensor, up to a factor, that stays as it is when all three orders turn together. Its
    squares add up to 1: e3nn's `wigner_3j`, sign included. Zeros where
    |l1 - l2| <= l3 <= l1 + l2 does not hold.
    """
    orders = (order_1, order_2, order_3)
    coupling = np.zeros([2 * order + 1 for order in orders], complex)
    if abs(order_1 - order_2) <= order_3 <= order_1 + order_2:
        for m_1 in range(-order_1, order_1 + 1):
            for m_2 in range(-order_2, order_2 + 1):
                if abs(m_1 + m_2) <= order_3:
                    place = (order_1 + m_1, order_2 + m_2, order_3 + m_1 + m_2)
                    coupling[place] = _complex_coefficient(orders, (m_1, m_2))
        coupling /= math.sqrt(2 * order_3 + 1)
    to_complex_1, to_complex_2, to_complex_3 = map(_real_to_complex, orders)
    real = np.einsum(
        "abc,ai,bj,ck->ijk", coupling, to_complex_1, to_complex_2, to_complex_3.conj()
    ).real.copy()
    real.flags.writeable = False  # one array for all callers
    return real


def _complex_coefficient(orders: tuple[int, int, int], m: tuple[int, int]) -> float:
    """<l1 m1 l2 m2 | l3 m1 + m2> with the phase of Condon and Shortley: Racah's formula."""
    (l_1, l_2, l_3), (m_1, m_2) = orders, m
    f = math.factorial
    m_3 = m_1 + m_2
    square = Fraction((2 * l_3 + 1) * f(l_1 + l_2 - l_3) * f(l_1 - l_2 + l_3), 1)
    square *= Fraction(f(l_2 - l_1 + l_3), f(l_1 + l_2 + l_3 + 1))
    for order, number in ((l_1, m_1), (l_2, m_2), (l_3, m_3)):
        square *= f(order + number) * f(order - number)
    total = Fraction(0)
    for k in range(l_1 + l_2 - l_3 + 1):
        terms = (
            k, l_1 + l_2 - l_3 - k, l_1 - m_1 - k, l_2 + m_2 - k,
            l_3 - l_2 + m_1 + k, l_3 - l_1 - m_2 + k,
        )  # fmt: skip
        if min(terms) >= 0:
            total += Fraction((-1) ** k, math.prod(map(f, terms)))
    return math.copysign(math.sqrt(square * total**2), total)


def _real_to_complex(order: int) -> np.ndarray:
    """[2 l + 1, 2 l + 1], unitary; its factor (-i)^l makes the couplings real."""
    matrix = np.zeros((2 * order + 1, 2 * order + 1), complex)
    matrix[order, order] = 1
    for m in range(1, order + 1):
        cosine, sine = order + m, order - m
        matrix[order - m, [cosine, sine]] = np.array([1, -1j]) / math.sqrt(2)
        matrix[order + m, [cosine, sine]] = (-1) ** m * np.array([1, 1j]) / math.sqrt(2)
    return (-1j) ** order * matrix
