"""Harmonics and couplings: known values, and what defines them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demetar.models.spherical import clebsch_gordan, spherical_harmonics

pytestmark = pytest.mark.usefixtures("float64")
ORDERS = range(7)


def directions(number=400):
    vector = np.random.default_rng(0).normal(size=(number, 3))
    return vector / np.linalg.norm(vector, axis=1, keepdims=True)


def rotation():
    q, r = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q * np.linalg.det(q)


def turned(order):
    """D with Y(R x) = D Y(x), found from harmonics of many directions."""
    points = directions()
    before = np.asarray(spherical_harmonics(order, points))
    after = np.asarray(spherical_harmonics(order, points @ rotation().T))
    solution, *_ = np.linalg.lstsq(before, after, rcond=None)
    np.testing.assert_allclose(before @ solution, after, atol=1e-12)
    return solution.T


def test_first_orders_are_those_of_e3nn():
    x, y, z = directions().T
    known = {
        0: [np.ones_like(x)],
        1: [x, y, z],
        2: [
            np.sqrt(3) * x * z,
            np.sqrt(3) * x * y,
            y**2 - (x**2 + z**2) / 2,
            np.sqrt(3) * y * z,
            np.sqrt(3) / 2 * (z**2 - x**2),
        ],
    }
    for order, columns in known.items():
        ours = spherical_harmonics(order, directions(), "norm")
        np.testing.assert_allclose(ours, np.stack(columns, axis=-1), atol=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_normalizations_and_any_length(order):
    points, size = directions(), 2 * order + 1
    squares = lambda name: jnp.square(spherical_harmonics(order, points, name)).sum(axis=-1)
    np.testing.assert_allclose(squares("norm"), 1, rtol=1e-12)
    np.testing.assert_allclose(squares("component"), size, rtol=1e-12)
    np.testing.assert_allclose(squares("integral"), size / (4 * np.pi), rtol=1e-12)
    np.testing.assert_allclose(
        spherical_harmonics(order, 3.7 * points), spherical_harmonics(order, points), atol=1e-12
    )


def test_orthonormal_over_the_sphere():
    """By exact quadrature: Gauss in the axis' component, equal steps of the azimuth."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    azimuth = np.arange(16) * 2 * np.pi / 16
    y, phi = np.meshgrid(nodes, azimuth, indexing="ij")
    across = np.sqrt(1 - y**2)
    points = np.stack([across * np.sin(phi), y, across * np.cos(phi)], axis=-1)
    harmonics = np.concatenate(
        [spherical_harmonics(order, points, "integral") for order in ORDERS], axis=-1
    )
    area = weights * 2 * np.pi / 16
    products = np.einsum("i,ija,ijb->ab", area, harmonics, harmonics)
    np.testing.assert_allclose(products, np.eye(len(products)), atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_rotation_turns_them_by_an_orthogonal_matrix(order):
    matrix = turned(order)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(2 * order + 1), atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_finite_and_smooth_on_the_axes_and_all_is_0_at_the_origin(order):
    function = lambda x: spherical_harmonics(order, x)
    forward = jax.jit(jax.vmap(jax.jacfwd(function)))
    backward = jax.jit(jax.vmap(jax.jacrev(function)))
    points = np.concatenate([np.eye(3), -np.eye(3), np.zeros((1, 3))])
    values = forward(points)
    assert np.isfinite(values).all() and np.isfinite(function(points)).all()
    np.testing.assert_allclose(values, backward(points), atol=1e-12)
    np.testing.assert_allclose(values[:6], forward(points + 1e-7)[:6], atol=1e-4)
    assert not np.any(values[6])
    assert order == 0 or not np.any(function(np.zeros(3)))  # it has no direction


def test_known_couplings():
    np.testing.assert_allclose(clebsch_gordan(0, 0, 0), [[[1]]])
    np.testing.assert_allclose(clebsch_gordan(1, 1, 0)[..., 0], np.eye(3) / np.sqrt(3), atol=1e-15)
    np.testing.assert_allclose(clebsch_gordan(2, 0, 2)[:, 0], np.eye(5) / np.sqrt(5), atol=1e-15)
    cross = np.zeros((3, 3, 3))
    for i, j, k in itertools.permutations(range(3)):
        cross[i, j, k] = np.linalg.det(np.eye(3)[[i, j, k]])
    np.testing.assert_allclose(clebsch_gordan(1, 1, 1), cross / np.sqrt(6), atol=1e-15)
    np.testing.assert_allclose(
        clebsch_gordan(2, 1, 2)[0, 0], [0, 1 / np.sqrt(30), 0, 0, 0], atol=1e-15
    )
    # x, y, z to order 2: the product of two equal vectors is their harmonic.
    x = directions()
    product = np.einsum("ijk,ni,nj->nk", clebsch_gordan(1, 1, 2), x, x)
    np.testing.assert_allclose(
        product, np.sqrt(2 / 15) * spherical_harmonics(2, x, "norm"), atol=1e-14
    )


def test_couplings_follow_the_selection_rule_and_are_orthogonal():
    """(2 l3 + 1) sum_{m1 m2} C^{l3} C^{l3'} is 1 where l3 and m3 are equal, else 0."""
    for a, b in itertools.product(range(4), repeat=2):
        allowed = range(abs(a - b), a + b + 1)
        for c in range(8):
            total = np.square(clebsch_gordan(a, b, c)).sum()
            np.testing.assert_allclose(total, 1 if c in allowed else 0, atol=1e-14)
        joined = np.concatenate(
            [np.sqrt(2 * c + 1) * clebsch_gordan(a, b, c) for c in allowed], axis=-1
        ).reshape(-1, (2 * a + 1) * (2 * b + 1))
        np.testing.assert_allclose(joined @ joined.T, np.eye(len(joined)), atol=1e-13)


def test_couplings_stay_as_they_are_when_all_turn():
    matrices = [turned(order) for order in range(5)]
    for a, b in itertools.product(range(4), repeat=2):
        for c in range(abs(a - b), min(a + b, 4) + 1):
            coupling = clebsch_gordan(a, b, c)
            after = np.einsum("ijk,ai,bj,ck->abc", coupling, matrices[a], matrices[b], matrices[c])
            np.testing.assert_allclose(after, coupling, atol=1e-11)


def test_couplings_cannot_be_changed():
    with pytest.raises(ValueError):
        clebsch_gordan(1, 1, 1)[0, 0, 0] = 2
