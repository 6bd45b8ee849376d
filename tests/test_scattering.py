"""Scattering coefficients, the features that are kept of them, the model and the regression."""

import dataclasses
import json
import types

import jax
import numpy as np
import optax
import pytest
from conftest import REPOSITORY, load_module
from scipy.special import sph_harm_y

from data_pipelines import batching
from data_pipelines.errors import UserError
from data_pipelines.registry import load_dataset
from data_pipelines.scattering import features
from data_pipelines.scattering.transform import (
    Scattering,
    coefficients,
    density,
    scatter,
    solid_harmonics,
)
from demetar.models import create_model, predict

SMALL = Scattering((15, 12, 9), J=1, L=3, sigma=1.0, powers=(1.0, 2.5), pixels_per_angstrom=1.5)
# Coarse enough for 500 molecules in a second.
COARSE = {"shape": (21, 17, 15), "J": 1, "L": 1, "powers": (1.0, 2.0)}
COARSE = features.DEFAULTS | COARSE | {"pixels_per_angstrom": 1.0}


def molecule(seed=0, n=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), rng.choice([1, 6, 7, 8, 9], n).astype(np.int32)


# --- the transform -----------------------------------------------------------------------------


def test_solid_harmonics_are_those_of_scipy():
    x = np.random.default_rng(0).normal(size=(3, 20))
    radius = np.linalg.norm(x, axis=0)
    theta, phi = np.arccos(x[0] / radius), np.arctan2(x[1], x[2])
    for degree in range(5):
        ours = solid_harmonics(degree, x)
        for m in range(degree + 1):
            theirs = radius**degree * (-1) ** m * sph_harm_y(degree, m, theta, phi)
            parts = (theirs.real, theirs.imag) if m else (theirs.real,)
            for k, part in enumerate(parts):
                row = 2 * m - 1 + k if m else 0
                scale = np.sqrt(2) if m else 1
                np.testing.assert_allclose(ours[row], scale * part, atol=1e-12)


def complex_modulus(field, degree, j, scattering):
    """|field * psi_jlm| over m, from complex harmonics and complex fields."""
    omega = np.meshgrid(*(2 * np.pi * np.fft.fftfreq(n) for n in scattering.shape), indexing="ij")
    scaled = np.stack(omega) * scattering.sigma * 2**j
    radius = np.linalg.norm(scaled, axis=0)
    theta = np.arccos(scaled[0] / np.where(radius > 0, radius, 1))
    phi = np.arctan2(scaled[1], scaled[2])
    # C_l (2 pi)^1.5 for l = 0 .. 3, and 1 / Y_00.
    c = [np.sqrt(4 * np.pi)] + [
        (2 * np.pi) ** 1.5 * x
        for x in (
            1 / (4 * np.sqrt(3 * np.pi)),
            1 / (2 * np.pi * np.sqrt(2.5) * 3),
            1 / (8 * np.sqrt(7 * np.pi) * 2),
        )
    ]
    total = 0
    for m in range(-degree, degree + 1):
        psi = c[degree] * (-1j) ** degree * sph_harm_y(degree, m, theta, phi)
        psi = psi * radius**degree * np.exp(-(radius**2) / 2)
        total = total + np.abs(np.fft.ifftn(np.fft.fftn(field) * psi)) ** 2
    return np.sqrt(total)


@pytest.mark.usefixtures("float64")
def test_real_filters_give_what_complex_ones_give():
    """On odd and on even axes, where the highest frequency is its own partner."""
    grid = np.asarray(density(*molecule(), SMALL))
    found = jax.jit(lambda grid: scatter(grid, SMALL))(grid)
    for rho, order_0, path in zip(grid, *found, strict=True):
        sums = lambda u: np.array([(u**q).sum() for q in SMALL.powers])
        np.testing.assert_allclose(order_0, sums(rho), rtol=1e-12)
        for degree in range(SMALL.L + 1):
            first = [complex_modulus(rho, degree, j, SMALL) for j in range(2)]
            fields = [*first, complex_modulus(first[0], degree, 1, SMALL)]
            expected = np.stack([sums(u) for u in fields])
            np.testing.assert_allclose(path[:, degree], expected, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_what_leaves_the_coefficients_as_they_are():
    """Shifts, other numbering and padding do; a turn does not: the grid stays."""
    x, z = molecule()
    transform = jax.jit(lambda x, z: coefficients(x, z, SMALL))
    before = transform(x, z)
    assert before.shape == (SMALL.num_coefficients,)
    order = np.random.default_rng(1).permutation(len(z))
    junk = np.full((3, 3), np.nan)
    for same in (
        transform(x + [3.0, -70.0, 0.1], z),
        transform(x[order], z[order]),
        transform(np.concatenate([x, junk]), np.pad(z, (0, 3))),
    ):
        np.testing.assert_allclose(same, before, rtol=1e-10)
    c, s = np.cos(0.4), np.sin(0.4)
    turned = transform(x @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]), z)
    assert 1e-6 < np.abs(turned / before - 1).max() < 0.5


@pytest.mark.usefixtures("float64")
def test_gradients_are_finite_where_a_density_is_empty():
    """Hydrogen alone has no core, and padding alone has nothing."""
    few = dataclasses.replace(SMALL, L=1)
    gradient = jax.jit(jax.grad(lambda x, z: coefficients(x, z, few).sum()))
    x = np.array([[0.0, 0, 0], [0.7, 0, 0]])
    for z in (np.array([1, 1]), np.array([0, 0])):
        assert np.isfinite(gradient(x, z)).all()


# --- features ----------------------------------------------------------------------------------


def some_molecules(dataset, count):
    a = dataset.arrays
    atoms = slice(a.node_offset[count])
    return types.SimpleNamespace(
        index=a.index[:count],
        node_offset=a.node_offset[: count + 1],
        atomic_number=a.atomic_number[atoms],
        position=a.position[atoms],
    )


def test_a_killed_preparation_goes_on_where_it_was(dataset, tmp_path, monkeypatch):
    molecules = some_molecules(dataset, 50)
    monkeypatch.setattr(features, "_PART", 16)
    compute, calls = features._compute, []

    def killed(*arguments):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(features, "_compute", killed)
    with pytest.raises(KeyboardInterrupt):
        features.compute(COARSE, molecules, str(tmp_path))
    assert calls == [16, 16, 16]
    resumed = features.compute(COARSE, molecules, str(tmp_path))
    assert calls[3:] == [16, 2]
    again = features.compute(COARSE, molecules, str(tmp_path))
    assert len(calls) == 5  # kept
    np.testing.assert_array_equal(again, resumed)
    whole = features.compute(COARSE, molecules, str(tmp_path / "other"))
    np.testing.assert_array_equal(whole, resumed)
    assert [p.is_dir() for p in (tmp_path / "scattering").iterdir()].count(True) == 1


def test_other_options_or_molecules_are_prepared_anew(dataset):
    molecules, scattering = some_molecules(dataset, 5), features.make_scattering(COARSE)
    key = features._key(scattering, molecules)
    moved = types.SimpleNamespace(**vars(molecules) | {"position": molecules.position + 1})
    assert features._key(scattering, moved) != key
    assert features._key(dataclasses.replace(scattering, L=2), molecules) != key


def test_the_orientation_in_the_file_does_not_matter(dataset, tmp_path):
    molecules = some_molecules(dataset, 40)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = types.SimpleNamespace(**vars(molecules) | {"position": molecules.position @ turn})
    here, there = (features.compute(COARSE, m, str(tmp_path)) for m in (molecules, turned))
    different = np.abs(there / here - 1).max(axis=1) > 1e-3
    # Those whose axes are equally long, such as methane and ammonia.
    assert different.sum() < 10


def test_all_of_qm9_fits_the_default_grid():
    """The largest reaches along the principal axes, of molecules 116821, 108680 and 58062."""
    scattering = features.make_scattering(features.DEFAULTS)
    reach = np.array([7.391, 4.439, 3.484]) * scattering.pixels_per_angstrom
    assert (2 * (reach + features._MARGIN * scattering.sigma) <= scattering.shape).all()


def test_features_are_float32_whatever_the_model_computes_in():
    x, z = molecule()
    with jax.enable_x64(True):
        shape = jax.eval_shape(lambda x: coefficients(x, z, SMALL), x.astype(np.float32))
    assert shape.dtype == np.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shape": (9, 9, 9)}, r"Molecule \d+ needs .* pixels.*set it to .*or more"),
        ({"shape": (9, 9)}, "three numbers of pixels"),
        ({"powers": (0.0,)}, "numbers above 0"),
        ({"J": -1}, "at least 0"),
        ({"sigma": 0.0}, "above 0"),
    ],
)
def test_options_that_cannot_be(dataset, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        features.compute(COARSE | changes, some_molecules(dataset, 9), str(tmp_path))


# --- the model and the regression --------------------------------------------------------------


@pytest.fixture(scope="module")
def scattered(cache_dir):
    options = {"source": "sample", "path": "", "split": "random", "targets": ("homo", "U0")}
    options |= {"edges": "bonds", "edge_cutoff": 0.0, "scattering": COARSE}
    return load_dataset(name="qm9", cache_dir=cache_dir, graph_features="scattering", **options)


def test_features_are_decorrelated_over_the_training_part(scattered):
    feature = scattered.arrays.graph_feature[scattered.split["train"]]
    np.testing.assert_allclose(feature.mean(axis=0), 0, atol=1e-6)
    spread = np.linalg.eigvalsh(feature.T @ feature / len(feature))
    assert spread.max() < 1 + 1e-6 and np.median(spread) > 0.9
    with pytest.raises(UserError, match="Did you mean 'scattering'"):
        features.load("scatering", COARSE, scattered.arrays, scattered.split["train"])


def wavescatt(dataset, **options):
    targets = tuple(dataclasses.replace(t, normalization="none") for t in dataset.targets)
    return create_model(name="wavescatt", targets=targets, facts={}, **options)


def test_the_model_needs_features(dataset):
    batch = batching.gather(dataset.arrays, np.arange(2), dataset.buckets[0])
    model = wavescatt(dataset)
    with pytest.raises(UserError, match="config.data.graph_features to 'scattering'"):
        model.init(jax.random.key(0), jax.tree.map(lambda x: x[0], batch))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_sixteen_molecules_are_learned_by_heart(scattered, order):
    graphs = scattered.split["train"][:16]
    arrays = dataclasses.replace(scattered.arrays, dtype=np.dtype(np.float32))
    batch = batching.gather(arrays, graphs, scattered.buckets[-1])
    label = {n: (x - x.mean()) / x.std() for n, x in batch.labels.items()}
    model = wavescatt(scattered, order=order, rank=16)
    params = model.init(jax.random.key(0), jax.tree.map(lambda x: x[0], batch))["params"]
    assert len(params) == 1 + sum(range(3, order + 2))
    tx = optax.adam(optax.cosine_decay_schedule(0.03, 600))

    def loss(params):
        found = predict(model, params, batch)
        return sum(abs(found[n] - label[n]).mean() for n in label) / len(label)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        change, state = tx.update(gradient, state)
        return (optax.apply_updates(params, change), state), value

    first = loss(params)
    assert abs(first - np.mean([abs(x).mean() for x in label.values()])) < 1e-6  # it predicts 0
    _, values = jax.jit(lambda c: jax.lax.scan(step, c, length=600))((params, tx.init(params)))
    assert values[-1] < 0.05 * first


@pytest.mark.parametrize("order", [1, 3])
def test_the_regression_runs_and_beats_the_mean(cache_dir, tmp_path, monkeypatch, order):
    monkeypatch.setenv("SMOKE", "1")
    script = load_module(REPOSITORY / "benchmarks" / "scattering.py")
    file = tmp_path / "result.json"
    script.main(
        [f"--cache_dir={cache_dir}", "--targets=homo,U0", f"--order={order}", f"--json={file}"]
    )
    result = json.loads(file.read_text())
    for row in result["targets"].values():
        assert row["unit"] == "meV" and row["test"] < row["training_mean"]
    assert result["targets"]["U0"]["test"] < 0.2 * result["targets"]["U0"]["training_mean"]
