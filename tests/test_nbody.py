"""N-body: simulations against the official generator's, protocols, and runs on them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from data_pipelines import batching
from data_pipelines.errors import UserError
from data_pipelines.nbody import draws, pairs, preparation, protocols, simulation
from data_pipelines.registry import load_dataset
from demetar.config.command_line import load_config
from demetar.training.experiment import build_experiment
from demetar.training.trainer import Trainer

GENERAL = dict(
    num_particles=4,
    interaction="charged",
    horizon_steps=(50,),
    num_train=12,
    num_validation=4,
    num_test=4,
    seed=0,
)


def load(cache_dir, targets=("position",), neighbors=0, **changes):
    return load_dataset(
        name="nbody",
        protocol="general",
        neighbors=neighbors,
        targets=targets,
        general=GENERAL | changes,
        cache_dir=cache_dir,
        buckets=(),
    )


# --- data --------------------------------------------------------------------------------------


def test_first_systems_equal_the_official_files():
    """Charges, positions, velocities and targets of the first six training systems."""
    golden = np.load(REPOSITORY / "tests" / "golden" / "egnn_nbody.npz")
    protocol = protocols.PROTOCOLS["egnn"]
    rng = np.random.RandomState(protocol.seed)
    start = draws.stack([draws.draw(rng, protocol) for _ in range(6)])
    at_input, at_target = simulation.simulate(start, protocol)
    np.testing.assert_array_equal(start.charge.ravel(), golden["charge"])
    for ours, name in (
        (at_input.position, "position"),
        (at_input.velocity, "velocity"),
        (at_target.position, "target"),
    ):
        np.testing.assert_allclose(ours.reshape(30, 3), golden[name], atol=1e-5)


def official_step_by_step(x, v, charge, steps):
    """The published algorithm for one system, in its own operations: [3, N] arrays."""
    x, v, n = x.copy(), v.copy(), x.shape[1]
    edges = np.outer(charge, charge)

    def force():
        a = x.transpose()
        norm = (a**2).sum(axis=1)
        square = norm.reshape(n, 1) + norm.reshape(1, n) - 2 * a.dot(a.transpose())
        np.fill_diagonal(square, 1.0)
        size = edges / np.power(square, 3.0 / 2.0)
        np.fill_diagonal(size, 0)
        difference = np.stack([np.subtract.outer(x[c], x[c]) for c in range(3)])
        return np.clip((size * difference).sum(axis=-1), -100, 100)

    v += 0.001 * force()
    for _ in range(steps):
        x += 0.001 * v
        last = v.copy()
        v += 0.001 * force()
    return x, last


def test_simulation_is_the_official_one_bit_for_bit():
    """Close encounters amplify the last bit, so nothing less than equality will do."""
    protocol = dataclasses.replace(
        protocols.PROTOCOLS["egnn"], input_step=400, horizon_steps=(300,)
    )
    rng = np.random.RandomState(7)
    start = draws.stack([draws.draw(rng, protocol) for _ in range(5)])
    start = dataclasses.replace(start, position=start.position * 0.3)  # closer: they meet often
    states = simulation.simulate(start, protocol)
    for g in range(5):
        one = start.position[g].T, start.velocity[g].T, start.charge[g]
        for state, steps in zip(states, (400, 700), strict=True):
            x, v = official_step_by_step(*one, steps)
            np.testing.assert_array_equal(state.position[g].T, x)
            np.testing.assert_array_equal(state.velocity[g].T, v)


def test_protocols_and_splits():
    egnn, blog, fuchs = (protocols.PROTOCOLS[name] for name in ("egnn", "blog", "fuchs"))
    assert [p.horizons for p in (egnn, blog, fuchs)] == [(1.0,), (0.2,), (0.5,)]
    assert {part: len(s) for part, s in preparation.split_of(egnn).items()} == {
        "train": 3_000,
        "validation": 2_000,
        "test": 2_000,
    }
    together = np.concatenate(list(preparation.split_of(fuchs).values()))
    np.testing.assert_array_equal(together, np.arange(7_000))


def test_walls_reflect():
    x = np.full((1, 2, 3), 0.4)
    x[0, 1] = -0.4
    start = draws.Start(x, np.ones((1, 2, 3)), np.ones((1, 2)), spring=np.zeros((1, 1), bool))
    protocol = dataclasses.replace(
        protocols.general_protocol(**GENERAL | {"num_particles": 2, "interaction": "springs"}),
        input_step=10,
        horizon_steps=(990,),
    )
    _, free = simulation.simulate(start, protocol)
    _, walled = simulation.simulate(start, dataclasses.replace(protocol, box=0.5))
    np.testing.assert_allclose(free.position[0, 0], 1.4)
    np.testing.assert_allclose(walled.position[0, 0], -0.4, atol=0.01)
    assert np.abs(walled.position).max() <= 0.5


def test_springs_conserve_momentum_and_are_the_edges(cache_dir):
    dataset = load(cache_dir, interaction="springs")
    arrays, target = dataset.arrays, dataset.labels(dataset.targets[0])
    assert 0 < arrays.sizes.num_edges.mean() < 6
    shape = (-1, 4, 3)
    start = arrays.position.reshape(shape).mean(1) + 0.05 * arrays.velocity.reshape(shape).mean(1)
    np.testing.assert_allclose(target.reshape(shape).mean(1), start, atol=1e-12)


def test_edges_go_to_the_nearest():
    x = np.random.default_rng(0).normal(size=(3, 9, 3))
    distance = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)
    offset, rows = pairs.edges_of(x, None, neighbors=2)
    for g in range(3):
        order = np.argsort(distance[g], axis=1)[:, 1:3]  # itself is the nearest
        expected = {tuple(sorted((i, int(j)))) for i in range(9) for j in order[i]}
        found = rows[offset[g] : offset[g + 1]]
        assert [tuple(row) for row in found] == [(i, j, 0) for i, j in sorted(expected)]
    for many in (0, 8, 100):
        assert np.diff(pairs.edges_of(x, None, many)[0]).tolist() == [36] * 3
    far = pairs.edges_of((x + 1e4).astype(np.float32), None, 2)
    near = pairs.edges_of((x + 1e4).astype(np.float32) - np.float32(1e4), None, 2)
    np.testing.assert_array_equal(far[1], near[1])  # wherever the system is


def test_a_killed_simulation_goes_on(cache_dir, tmp_path, monkeypatch):
    """Parts that are done are not simulated again, and the systems are the same."""
    monkeypatch.setattr(preparation, "_PART", 3)
    protocol = protocols.general_protocol(**GENERAL)
    whole, passport = preparation.load(protocol, cache_dir)
    simulate, asked = preparation.simulate_in_parts, []

    def dies(start, protocol):
        asked.append(len(start.charge))
        for number, states in enumerate(simulate(start, protocol)):
            if number == 8 and len(asked) == 1:
                raise MemoryError
            yield states

    monkeypatch.setattr(preparation, "simulate_in_parts", dies)
    monkeypatch.setattr(simulation, "_CHUNK", 6)  # one system of four at a time
    with pytest.raises(UserError, match="Cannot prepare"):
        preparation.load(protocol, str(tmp_path))
    again, passport_again = preparation.load(protocol, str(tmp_path))
    assert asked == [20, 14] and passport_again == passport
    np.testing.assert_array_equal(again.target, whole.target)
    assert not list(tmp_path.rglob("*.parts*"))


def test_batches_carry_velocities_charges_and_node_targets(cache_dir):
    dataset = load(cache_dir)
    batch = batching.gather(dataset.arrays, np.array([2, -1]), batching.Bucket(6, 8))
    assert batch.velocity.shape == batch.labels["position"].shape == (2, 6, 3)
    np.testing.assert_array_equal(batch.velocity[0, :4], dataset.arrays.velocity[8:12])
    np.testing.assert_array_equal(batch.charge[0], [*dataset.arrays.charge[8:12], 0, 0])
    assert not batch.velocity[1].any() and not batch.labels["position"][1].any()
    assert batch.edge_mask.sum() == 6


def test_velocities_at_the_target_are_prepared_apart(cache_dir):
    """And leave the prepared positions as they were."""
    alone, both, velocity = (
        load(cache_dir, targets)
        for targets in (("position",), ("position", "velocity"), ("velocity",))
    )
    target_of = {target.name: target for target in both.targets}
    assert list(target_of) == ["position", "velocity"]
    assert [t.name for t in velocity.targets] == ["velocity"]
    for name in ("position", "velocity", "charge"):
        np.testing.assert_array_equal(getattr(alone.arrays, name), getattr(both.arrays, name))
    np.testing.assert_array_equal(alone.arrays.edges.rows, both.arrays.edges.rows)
    np.testing.assert_array_equal(
        alone.labels(target_of["position"]), both.labels(target_of["position"])
    )
    np.testing.assert_array_equal(
        velocity.labels(target_of["velocity"]), both.labels(target_of["velocity"])
    )
    assert alone.passport["content_sha256"] != both.passport["content_sha256"]
    assert velocity.passport["content_sha256"] == both.passport["content_sha256"]
    speed = lambda v: np.linalg.norm(v, axis=-1).mean()
    change = both.labels(target_of["velocity"]) - both.arrays.velocity
    assert 0 < speed(change) < speed(both.arrays.velocity)


@pytest.mark.parametrize("targets", [(), ("position", "position"), ("speed",)])
def test_targets_are_of_the_two(cache_dir, targets):
    with pytest.raises(UserError, match="config.data.targets"):
        load(cache_dir, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "egn"}, "Did you mean 'egnn'"),
        ({"num_particles": 1}, r"num_particles \(1\) must be from 2 to 65535"),
        ({"interaction": "spring"}, "Did you mean 'springs'"),
        ({"num_test": 0}, "must be at least 1"),
        ({"horizon_steps": (0,)}, "horizon_steps is 0, but must be a whole number from 1"),
        ({"horizon_steps": (2.5,)}, "horizon_steps is 2.5, but must be a whole number"),
        ({"horizon_steps": (50, 20)}, r"horizon_steps \(50, 20\) must name .* in ascending order"),
        ({"horizon_steps": ()}, "must name at least one"),
        ({"neighbors": 2, "interaction": "springs"}, "neighbors is 2, but springs pull from afar"),
        ({"neighbors": -1}, r"config.data.neighbors is -1, but must be at least 0"),
    ],
)
def test_bad_options_are_named(cache_dir, options, message):
    protocol = options.pop("protocol", "general")
    with pytest.raises(UserError, match=message):
        load_dataset(
            name="nbody",
            protocol=protocol,
            neighbors=options.pop("neighbors", 0),
            general=GENERAL | options,
            cache_dir=cache_dir,
            buckets=(),
        )


# --- baselines ---------------------------------------------------------------------------------


def test_trivial_predictors(cache_dir):
    dataset = load(cache_dir)
    test = dataset.split["test"]
    arrays, target = dataset.arrays, dataset.labels(dataset.targets[0])
    shape = (-1, 4, 3)
    x, v, y = (a.reshape(shape)[test] for a in (arrays.position, arrays.velocity, target))
    mse = lambda graphs, name: np.square(dataset.baselines(graphs)[name]["position"]).mean()
    np.testing.assert_allclose(mse(test, "no_motion"), np.square(x - y).mean())
    np.testing.assert_allclose(mse(test, "free_flight"), np.square(x + 0.05 * v - y).mean())
    train = dataset.split["train"]
    linear = mse(train, "linear")
    assert linear <= min(mse(train, "no_motion"), mse(train, "free_flight"))


def test_trivial_predictors_of_velocities(cache_dir):
    dataset = load(cache_dir, ("position", "velocity"))
    arrays, target = dataset.arrays, dataset.labels(dataset.targets[1])
    shape = (-1, 4, 3)
    train = dataset.split["train"]
    v, w = (a.reshape(shape)[train] for a in (arrays.velocity, target))
    mse = lambda name: np.square(dataset.baselines(train)[name]["velocity"]).mean()
    np.testing.assert_allclose(mse("no_motion"), np.square(w).mean())
    np.testing.assert_allclose(mse("free_flight"), np.square(v - w).mean())
    assert mse("linear") <= min(mse("no_motion"), mse("free_flight"))


# --- runs --------------------------------------------------------------------------------------

MODELS = "e3 linear".split()
# tests/test_models.py has the gradients of each.
OPTIONS = (
    "egnn velocity deep_set set_transformer edge_cross not_equivariant translation com".split()
)
OPTIONS += ["node_only"]


@pytest.mark.parametrize(
    "model", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS)]
)
def test_every_model_of_the_config_takes_a_step(model, cache_dir):
    changes = {"data.cache_dir": cache_dir, "optim.warmup_steps": 0}
    if model != "linear":
        changes["model.width"] = 8
    trainer = Trainer(build_experiment(load_config(f"nbody:{model},smoke", changes)))
    state = trainer.experiment.create_state()
    before = jax.device_get(state.params)
    bucket, graphs = trainer.gather(0)
    state, sums = trainer.step(state, bucket, trainer.to_devices(graphs))
    assert np.isfinite(sums.loss) and np.isfinite(sums.grad_norm)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    assert all(jax.tree.leaves(changed))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tfn", "se3_transformer"])
def test_positions_and_velocities_are_learned_together(model, cache_dir):
    changes = {
        "data.cache_dir": cache_dir,
        "data.targets": ("position", "velocity"),
        "optim.warmup_steps": 0,
        "model": {"name": model, "width": 4, "num_layers": 2, "num_degrees": 2},
    }
    if model == "se3_transformer":
        changes["model"]["num_heads"] = 2
    trainer = Trainer(build_experiment(load_config("nbody:smoke", changes)))
    state = trainer.experiment.create_state()
    bucket, graphs = trainer.gather(0)
    state, sums = trainer.step(state, bucket, trainer.to_devices(graphs))
    assert np.isfinite(sums.loss) and np.isfinite(sums.grad_norm) and sums.grad_norm > 0


def test_words_of_the_config_in_any_order_and_no_two_models():
    assert load_config("nbody:blog,smoke") == load_config("nbody:smoke,blog")
    assert load_config("nbody:blog,velocity").data.protocol == "blog"
    for words, message in (("egnn,linear", "at most one model"), ("egn", "no variant 'egn'")):
        with pytest.raises(UserError, match=message):
            load_config(f"nbody:{words}")


def test_models_and_targets_must_match(cache_dir):
    changes = {"data.cache_dir": cache_dir, "model.readout": "sum"}
    with pytest.raises(UserError, match="cannot give read-out 'sum' for target 'position'"):
        build_experiment(load_config("nbody:smoke", changes))
    changes = {"data.cache_dir": cache_dir, "data.targets": ("position", "velocity")}
    with pytest.raises(UserError, match="cannot give read-out 'velocity' for target 'velocity'"):
        build_experiment(load_config("nbody:egnn,smoke", changes))


def test_result_of_a_run_on_particles(runner, tmp_path):
    """That a killed one goes on bit for bit is shown in test_processes.py."""
    runner.run(tmp_path, config="nbody.py:smoke,linear")
    result = json.loads((tmp_path / "result.json").read_text())
    row = result["targets"]["position"]
    assert set(row) >= {"mse", "unit", "median", "interval_95", "mse_of_linear"}
    low, high = row["interval_95"]
    assert result["count"] == 32 and low <= row["mse"] <= high
    assert (tmp_path / "trajectories.png").stat().st_size > 10_000
