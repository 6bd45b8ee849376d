"""Many particles: generators against official systems, and the model for them.

The files of official systems are described in tests/golden/README.md; the same tests run on any
folder of files of this form:

    DEMETAR_GOLDEN_MANY=FOLDER pytest tests/test_many.py
"""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

import demetar
from data_pipelines.batch_plan import Bucket
from data_pipelines.batching import gather
from data_pipelines.errors import UserError
from data_pipelines.nbody import arrays_of, draws, protocols, simulation
from data_pipelines.nbody.pairs import edges_of
from demetar.config.command_line import load_config
from demetar.inference import package
from demetar.inference.card import describe
from demetar.inference.particles import ParticleModel
from demetar.models import e3, predict
from demetar.training.experiment import build_experiment
from demetar.training.trainer import Trainer

OURS = REPOSITORY / "tests" / "golden" / "many"
FOLDER = pathlib.Path(os.environ.get("DEMETAR_GOLDEN_MANY", OURS))
# Beginning of a file's name -> of the protocol that its systems are of; the number ends both.
KINDS = {"glad_charged_": "glad_", "segnn_gravity_": "gravity_"}
FILES = {
    protocol + path.stem.removeprefix(name): path
    for path in sorted(FOLDER.glob("*.npz"))
    for name, protocol in KINDS.items()
    if path.stem.startswith(name)
}
PARTS = ("train", "valid", "test")


def state_at(golden, frame, systems=slice(None)):
    """Position, velocity and charge, [9, N, 3] and [9, N], of all parts."""
    x, v = (np.concatenate([golden[f"{p}_{k}_f{frame}"] for p in PARTS]) for k in "xv")
    if "train_charge" in golden:
        charge = np.concatenate([golden[f"{p}_charge"] for p in PARTS]).reshape(x.shape[:2])
    else:
        charge = np.ones(x.shape[:2])
    return draws.Start(x[systems], v[systems], charge[systems])


# All parts of one protocol by default: reaching the others means drawing thousands of systems.
ALL_PARTS = list(FILES) if "DEMETAR_GOLDEN_MANY" in os.environ else ["glad_5"]


@pytest.mark.parametrize("name", FILES)
def test_systems_are_drawn_as_the_official_ones(name):
    golden, protocol = np.load(FILES[name]), protocols.PROTOCOLS[name]
    rng = np.random.RandomState(protocol.seed)
    for part, drawn in zip(PARTS, protocol.draws, strict=True):
        systems = [draws.draw(rng, protocol) for _ in range(drawn if name in ALL_PARTS else 3)]
        start = draws.stack(systems[:3])
        if protocol.interaction == "gravity":  # the file has them before the mean is taken away
            official = golden[f"{part}_v_init"]
            official = official - official.mean(axis=1, keepdims=True)
        else:
            official = golden[f"{part}_v_init"]
            charge = golden[f"{part}_charge"].reshape(start.charge.shape)
            np.testing.assert_array_equal(start.charge, charge)
        np.testing.assert_array_equal(start.position, golden[f"{part}_x_init"])
        np.testing.assert_allclose(start.velocity, official, atol=1e-15)
        first = 0 if protocol.interaction == "gravity" else 1  # step of the official frame 0
        if first:
            one = dataclasses.replace(protocol, input_step=first, horizon_steps=(1,))
            state, _ = simulation.simulate(start, one)
            np.testing.assert_allclose(state.position, golden[f"{part}_x_f0"], atol=1e-12)
            np.testing.assert_allclose(state.velocity, golden[f"{part}_v_f0"], atol=1e-12)
        if name not in ALL_PARTS:
            break


@pytest.mark.parametrize("name", FILES)
def test_from_the_input_they_reach_the_official_target(name):
    """From frame 30 to frame 40. A few charges meet so closely that the last bit decides."""
    golden, protocol = np.load(FILES[name]), protocols.PROTOCOLS[name]
    onward = dataclasses.replace(
        protocol, input_step=1, horizon_steps=(protocol.horizon_steps[0] - 1,)
    )
    _, after = simulation.simulate(state_at(golden, 30), onward)
    official = state_at(golden, 40)
    error = np.abs(after.position - official.position).max(axis=(1, 2))
    assert (error < 1e-8).sum() >= len(error) - 1, error
    assert error.max() < 1.0


def test_gravity_keeps_momentum_and_energy():
    golden, protocol = np.load(OURS / "segnn_gravity_100.npz"), protocols.PROTOCOLS["gravity_100"]
    start = state_at(golden, 30, slice(2))
    before, after = simulation.simulate(start, dataclasses.replace(protocol, input_step=1))
    i, j = np.triu_indices(100, 1)

    def energy(state):
        r2 = np.square(state.position[:, i] - state.position[:, j]).sum(axis=-1)
        kinetic = np.square(state.velocity).sum(axis=(1, 2)) / 2
        return kinetic - (1 / np.sqrt(r2 + 0.01)).sum(axis=1)

    np.testing.assert_allclose(energy(after), energy(before), rtol=2e-4)
    np.testing.assert_allclose(after.velocity.mean(axis=1), 0, atol=1e-12)


# --- the model -----------------------------------------------------------------------------------


def batch_of(position, velocity, charge, neighbors=0):
    """All systems as one batch, without padded nodes, float64."""
    number, n, _ = position.shape
    edges = edges_of(position, None, neighbors)
    arrays = arrays_of(position, velocity, charge, edges)
    return gather(arrays, np.arange(number), Bucket(n, int(np.diff(edges[0]).max())))


@pytest.mark.parametrize("n", [5, 12])
@pytest.mark.usefixtures("float64")
def test_gathers_and_sums_compute_what_matrices_of_ones_did(n):
    """What shipped weights predicted when edges were matrices [E, N] and attention was masked."""
    golden = np.load(OURS / "e3_dense.npz")
    model = package.read("nbody-egnn-e3-seed0")
    network = model.network().clone(dtype=np.float64)
    params = jax.tree.map(np.float64, model.params)
    batch = batch_of(*(golden[f"{key}_{n}"] for key in ("position", "velocity", "charge")))
    found = predict(network, params, batch)["position"]
    np.testing.assert_allclose(found, golden[f"prediction_{n}"], atol=1e-12)
    single = demetar.load_pretrained("nbody-egnn-e3-seed0")(
        **{key: golden[f"{key}_{n}"] for key in ("position", "velocity", "charge")}
    )
    np.testing.assert_allclose(single, golden[f"prediction_{n}"], atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_field_is_the_sum_of_its_kernels_in_blocks_of_any_size(monkeypatch):
    rng, rate = np.random.default_rng(3), 3.0
    x, charge = rng.normal(size=(7, 3)), rng.choice([-1.0, 1.0], 7)
    params = {"log_softening": rng.normal(size=2), "strength": rng.normal(size=2)}
    expected = np.zeros((7, 3))
    for i in range(7):
        for j in set(range(7)) - {i}:
            r = x[i] - x[j]
            squares = r @ r + np.exp(2 * rate * params["log_softening"])
            pull = rate * params["strength"] @ squares**-1.5
            expected[i] += charge[i] * charge[j] * r * pull
    field = e3._Field(2, rate)
    for block in (128, 4, 7, 1):
        monkeypatch.setattr(e3, "_BLOCK", block)
        found = field.apply({"params": params}, x, charge)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    gradient = jax.grad(lambda x: (field.apply({"params": params}, x, charge) ** 2).sum())(x)
    assert np.isfinite(gradient).all()


def untrained(cache_dir, **changes):
    """A model of the smoke config as it starts, and its experiment."""
    small = {"data.cache_dir": cache_dir, "model.width": 8, "model.rounds": 2}
    experiment = build_experiment(load_config("nbody:smoke", small | changes))
    params = jax.device_get(experiment.create_state().params)
    card = describe(experiment, {})
    return ParticleModel(package.Package("mine", params, card)), experiment


def test_a_model_in_float64_predicts_in_float64(cache_dir):
    with jax.enable_x64(True):
        model, experiment = untrained(cache_dir, **{"model.dtype": "float64"})
    x, v = (
        a.reshape(-1, 4, 3)[:3] for a in (experiment.arrays.position, experiment.arrays.velocity)
    )
    given = {"position": x, "velocity": v, "charge": experiment.arrays.charge.reshape(-1, 4)[:3]}
    found = model(**given)
    moved = model(**given | {"position": x + 1e-10})
    assert found.dtype == np.float64
    np.testing.assert_allclose(moved - found, 1e-10, rtol=1e-3)  # float32 would lose it


HORIZONS = {"data.targets": ("position", "velocity"), "data.general.horizon_steps": (10, 20)}


def test_several_horizons_are_learned_by_one_model(cache_dir):
    """A step changes every weight, also those that read the horizon."""
    _, experiment = untrained(cache_dir, **HORIZONS, **{"optim.warmup_steps": 0})
    trainer = Trainer(experiment)
    state = experiment.create_state()
    before = jax.device_get(state.params)
    bucket, graphs = trainer.gather(0)
    state, sums = trainer.step(state, bucket, trainer.to_devices(graphs))
    assert np.isfinite(sums.loss) and np.isfinite(sums.grad_norm)
    changed = jax.tree.map(np.not_equal, before, jax.device_get(state.params))
    assert all(np.any(x) for x in jax.tree.leaves(changed))
    of_horizon = changed["round"]["edge_from_invariants"]["kernel"][-1]
    assert of_horizon.all()


def test_several_horizons_need_a_model_that_is_told(cache_dir):
    changes = {"data.cache_dir": cache_dir, "data.general.horizon_steps": (10, 20)}
    with pytest.raises(UserError, match=r"several horizons\), which model 'egnn' does not read"):
        build_experiment(load_config("nbody:egnn,smoke", changes))


def test_each_horizon_is_predicted(cache_dir):
    model, experiment = untrained(cache_dir, **HORIZONS)
    arrays, split = experiment.arrays, experiment.dataset.split
    assert len(arrays.index) == 2 * (64 + 32 + 32)
    np.testing.assert_array_equal(arrays.graph_feature[:4, 0], [0.01, 0.02, 0.01, 0.02])
    np.testing.assert_array_equal(split["train"], np.arange(128))  # both of a system in one part
    x, target = (a.reshape(-1, 2, 4, 3) for a in (arrays.position, arrays.node_labels["position"]))
    v = arrays.velocity.reshape(-1, 2, 4, 3)
    np.testing.assert_array_equal(x[:, 0], x[:, 1])
    assert np.abs(target[:, 0] - x[:, 0] - 0.01 * v[:, 0]).max() < 0.02  # of little acceleration
    free = experiment.dataset.baselines(split["test"])["free_flight"]["position"]
    assert np.abs(free).max() < 0.05

    given = {"position": x[:3, 0], "velocity": v[:3, 0]}
    given["charge"] = arrays.charge.reshape(-1, 2, 4)[:3, 0]
    short, long = model(**given, horizon=0.01), model(**given)
    assert np.abs(long - model(**given, horizon=0.02)).max() == 0
    assert np.abs(long - x[:3, 0]).max() > 1.5 * np.abs(short - x[:3, 0]).max()
    positions, velocities = model.rollout(**given, steps=2, horizon=0.01)
    assert positions.shape == velocities.shape == (3, 3, 4, 3)
    np.testing.assert_array_equal(positions[:, 1], short)
    again = given | {"position": positions[:, 1], "velocity": velocities[:, 1]}
    np.testing.assert_array_equal(positions[:, 2], model(**again, horizon=0.01))
    with pytest.raises(ValueError, match=r"horizon is 0.03, but must be above 0 and at most 0.02"):
        model(**given, horizon=0.03)


@pytest.mark.usefixtures("float64")
def test_velocities_turn_with_the_system_and_ride_with_the_observer(cache_dir):
    model, experiment = untrained(cache_dir, **HORIZONS)
    network = model.package.network().clone(dtype=np.float64)
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape) / 3, model.package.params)
    batch = gather(experiment.arrays, np.array([0, 3, 5]), Bucket(6, 8))  # with padding
    batch = jax.tree.map(lambda x: np.float64(x) if x.dtype == np.float32 else x, batch)
    apply = jax.jit(lambda batch: predict(network, params, batch))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    boost = np.array([0.3, -0.2, 1.0])
    moved = batch.replace(
        position=batch.position @ rotation + 2.0, velocity=batch.velocity @ rotation + boost
    )
    found, turned, mask = apply(batch), apply(moved), batch.node_mask[..., None]
    v = np.where(mask, found["velocity"] @ rotation + boost, 0)
    np.testing.assert_allclose(turned["velocity"], v, atol=1e-10)
    time = batch.graph_feature[:, None]
    x = np.where(mask, found["position"] @ rotation + 2.0 + time * boost, 0)
    np.testing.assert_allclose(turned["position"], x, atol=1e-10)
    junk = batch.replace(graph_mask=np.array([True, True, False]))
    junk = junk.replace(graph_feature=np.where(junk.graph_mask[:, None], time[:, 0], np.nan))
    filled = apply(junk)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(filled))
    np.testing.assert_allclose(filled["position"][:2], found["position"][:2], atol=1e-12)


def test_what_a_model_has_not_learned_is_refused(cache_dir):
    model, experiment = untrained(cache_dir)
    x = experiment.arrays.position.reshape(-1, 4, 3)[:2]
    given = {"position": x, "velocity": 0 * x, "charge": np.ones((2, 4))}
    assert np.isfinite(model(**given, horizon=0.02)).all()
    with pytest.raises(ValueError, match="mine has learned 0.02 alone"):
        model(**given, horizon=0.01)
    with pytest.raises(UserError, match=r"predicts no velocities.*config.data.targets"):
        model.rollout(**given, steps=2)
