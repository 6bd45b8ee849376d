"""Solid-harmonic wavelet scattering of molecules (Eickenberg et al. 2018), as Kymatio defines it.

A molecule is a density on a grid of pixels; three densities differ in the weight of each atom:
nuclear (Z), valence (Z, or Z - 2 from lithium on), core (the difference). For each density rho,

    U_1(j, l) = sqrt(sum_m |rho * psi_jlm|^2)          wavelets of scale sigma 2^j, j = 0..J
    U_2(j1, j2, l) = the same of U_1(j1, l) with j2 > j1
    coefficients: sums over the grid of rho^q, U_1^q and U_2^q

in Fourier space, omega = 2 pi pixel / n per axis, s = sigma 2^j:

    psi_jlm = C_l (-i)^l (2 pi)^1.5 Y_lm(omega) |omega s|^l exp(-|omega s|^2 / 2)

Real harmonics give the same sum over m as complex ones, and fields of real numbers, at half the
price. On an axis with an even number of pixels the highest frequency has no partner of the other
sign, so that a field there has an imaginary part too: it is a second set of filters, and an odd
number of pixels has none.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.graph import Array

DENSITIES = ("nuclear", "valence", "core")


@dataclasses.dataclass(frozen=True)
class Scattering:
    """What the coefficients are made with.

    Attributes:
      shape: pixels along each axis.
      J: largest scale is sigma 2^J.
      L: highest degree of the harmonics.
      sigma: width of an atom and of the smallest wavelet, pixels.
      powers: exponents q of the sums.
      pixels_per_angstrom: of positions.
    """

    shape: tuple[int, int, int]
    J: int
    L: int
    sigma: float
    powers: tuple[float, ...]
    pixels_per_angstrom: float

    @property
    def num_paths(self) -> int:
        """Scales j1, then pairs of scales (j1, j2)."""
        return (self.J + 1) * (self.J + 2) // 2

    @property
    def num_coefficients(self) -> int:
        """Of one molecule, all three densities."""
        return len(DENSITIES) * len(self.powers) * (1 + self.num_paths * (self.L + 1))


def coefficients(position_Nx3: Array, atomic_number_N: Array, scattering: Scattering) -> Array:
    """All coefficients of a molecule about its centre, [P]; differentiable by positions.

    Of each of `DENSITIES` first the powers of the density, then [paths, L + 1, powers].

    Args:
      position_Nx3: [N, 3], angstrom.
      atomic_number_N: [N]; 0 marks padding, whose position may be anything.
      scattering: the options.
    """
    order_0, path = scatter(density(position_Nx3, atomic_number_N, scattering), scattering)
    return jnp.concatenate([order_0, path.reshape(len(DENSITIES), -1)], axis=1).ravel()


def density(position_Nx3: Array, atomic_number_N: Array, scattering: Scattering) -> Array:
    """The three densities about the mean of the atoms, `[3, *shape]`; pixel 0 is the centre."""
    dtype = position_Nx3.dtype
    real_N = (atomic_number_N > 0).astype(dtype)
    position_Nx3 = jnp.where(real_N[:, None] > 0, position_Nx3, 0)
    centre_3 = (real_N @ position_Nx3) / jnp.maximum(real_N.sum(), 1)
    pixel_Nx3 = (position_Nx3 - centre_3) * scattering.pixels_per_angstrom
    wide = 2 * scattering.sigma**2
    along = []  # a Gaussian is a product over the axes
    for axis, size in enumerate(scattering.shape):
        pixel_s = np.round(np.fft.fftfreq(size) * size).astype(dtype)
        along.append(jnp.exp(-((pixel_s - pixel_Nx3[:, axis, None]) ** 2) / wide))
    height = (2 * math.pi) ** 1.5 * scattering.sigma**3
    nuclear_N = atomic_number_N.astype(dtype)
    core_N = jnp.where(atomic_number_N > 2, 2, 0).astype(dtype)
    weight_3xN = jnp.stack([nuclear_N, nuclear_N - core_N, core_N]) / height
    plane_Nxab = along[1][:, :, None] * along[2][:, None, :]
    line_3xsxN = weight_3xN[:, None, :] * along[0].T
    flat = line_3xsxN.reshape(-1, len(real_N)) @ plane_Nxab.reshape(len(real_N), -1)
    return flat.reshape(len(DENSITIES), *scattering.shape)


def scatter(density_3xgrid: Array, scattering: Scattering) -> tuple[Array, Array]:
    """Order 0, `[3, powers]`; orders 1 and 2, `[3, paths, L + 1, powers]`."""
    filters, degrees = _filters(scattering), range(scattering.L + 1)
    modulus = lambda hat, j, degree: _modulus(hat, filters[j, degree], scattering.shape)
    sums = lambda u: _sums(u, scattering.powers)

    def of_one(rho):
        rho_hat = jnp.fft.rfftn(rho)
        first = [[modulus(rho_hat, j, d) for d in degrees] for j in range(scattering.J + 1)]
        paths = [[sums(u) for u in row] for row in first]
        for j1, row in enumerate(first[:-1]):
            hats = [jnp.fft.rfftn(u) for u in row]
            for j2 in range(j1 + 1, scattering.J + 1):
                paths.append([sums(modulus(hats[d], j2, d)) for d in degrees])
        return sums(rho), jnp.stack([jnp.stack(row) for row in paths])

    return jax.vmap(of_one)(density_3xgrid)


def _modulus(hat: Array, filters: np.ndarray, shape) -> Array:
    field = jnp.fft.irfftn(hat * filters.astype(hat.dtype), shape, axes=(-3, -2, -1))
    square = (field**2).sum(axis=0)
    # Where a field is exactly 0, as everywhere in the core of H2, the root has no slope.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _sums(field: Array, powers: tuple[float, ...]) -> Array:
    exact = lambda q: int(q) if q == int(q) else q  # a whole power is a product, and fast
    return jnp.stack([(field ** exact(q)).sum() for q in powers])


# --- wavelets ----------------------------------------------------------------------------------


@functools.cache
def _filters(scattering: Scattering) -> dict[tuple[int, int], np.ndarray]:
    """(j, degree l) -> filters [K, *half of the frequencies], complex128; K >= 2 l + 1.

    Each gives a field of real numbers; the sum of their squares is the sum over m of |.|^2.
    """
    omega = np.meshgrid(*(2 * np.pi * np.fft.fftfreq(n) for n in scattering.shape), indexing="ij")
    found = {}
    for j in range(scattering.J + 1):
        scaled = np.stack(omega) * scattering.sigma * 2**j
        envelope = np.exp(-(scaled**2).sum(axis=0) / 2)
        for degree in range(scattering.L + 1):
            whole = _constant(degree) * solid_harmonics(degree, scaled) * envelope
            # `(-i)^l whole` gives a real field where whole(-omega) = (-1)^l whole(omega).
            mirrored = np.roll(whole[:, ::-1, ::-1, ::-1], 1, axis=(1, 2, 3)) * (-1) ** degree
            phase = -1j if degree % 2 else 1
            parts = [phase * (whole + mirrored) / 2]
            rest = (whole - mirrored) / 2
            rest = rest[rest.any(axis=(1, 2, 3))]
            parts.append(phase * -1j * rest)
            found[j, degree] = np.concatenate(parts)[..., : scattering.shape[2] // 2 + 1]
    return found


def _constant(degree: int) -> float:
    """C_l (2 pi)^1.5; the Gaussian alone for l = 0, whose harmonic is 1 / sqrt(4 pi)."""
    if degree == 0:
        return math.sqrt(4 * math.pi)
    if degree % 2 == 0:
        double_factorial = math.prod(range(degree + 1, 0, -2))
        constant = 1 / (2 * math.pi * math.sqrt(degree + 0.5) * double_factorial)
    else:
        half = math.factorial((degree + 1) // 2)
        power = 2 ** ((degree + 3) / 2)
        constant = 1 / (power * math.sqrt(math.pi * (2 * degree + 1)) * half)
    return constant * (2 * math.pi) ** 1.5


def solid_harmonics(degree: int, x_3xgrid: np.ndarray) -> np.ndarray:
    """|x|^l Y_lm(x / |x|) of orthonormal real harmonics, `[2 l + 1, ...]`, l being the degree.

    As polynomials, so that they are exactly even or odd: m = 0, then cos and sin of each m. Axis 0
    is the polar one.
    """
    z, y, x = x_3xgrid
    square = z * z + y * y + x * x
    around = np.ones_like(x) + 0j  # (x + i y)^m
    found = []
    for m in range(degree + 1):
        polar = sum(
            (-1) ** k * math.comb(degree, k) * math.comb(2 * (degree - k), degree)
            * math.perm(degree - 2 * k, m) * square**k * z ** (degree - 2 * k - m)
            for k in range((degree - m) // 2 + 1)
        )  # fmt: skip
        scale = math.sqrt((2 if m else 1) * math.factorial(degree - m) / math.factorial(degree + m))
        scale *= math.sqrt((2 * degree + 1) / (4 * math.pi)) / 2**degree
        found += [scale * polar * around.real] + ([scale * polar * around.imag] if m else [])
        around = around * (x + 1j * y)
    return np.stack(found)
