"""Optimizers and schedules: each learns, repeats itself, decays what it should, and says no."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.errors import UserError
from demetar.training.optim import OPTIMIZERS, SCHEDULES, Plateau, make_optimizer, plateau_step
from demetar.training.sharding import make_mesh

NUM_STEPS = 60
# At which the small problem below is learned; 1e-2 where not named.
RATES = {"lion": 3e-3, "sgd": 0.1}
COMMON = {
    "learning_rate": 1e-2,
    "warmup_steps": 5,
    "clip_norm": 1.0,
    "ema_decay": 0.999,
}


def group(name="adamw", schedule="cosine", **changes):
    """A completed group `config.optim`."""
    own = OPTIMIZERS[name].defaults | SCHEDULES[schedule].defaults
    return {"name": name, "schedule": schedule, **COMMON, **own, **changes}


def make_params(seed=0):
    """One parameter of each kind that the models have."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
    return {
        "atom": {"table": draw(10, 12)},
        "cls": draw(1, 12),
        "dense": {"kernel": draw(12, 24), "bias": draw(24)},
        "out": {"kernel": draw(24, 1), "bias": draw(1)},
    }


def loss(params):
    """Of a small network that fits a fixed function of ten atoms."""
    hidden = (params["atom"]["table"] + params["cls"]) @ params["dense"]["kernel"]
    hidden = jnp.tanh(hidden + params["dense"]["bias"])
    fitted = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    return jnp.mean((fitted[:, 0] - jnp.sin(jnp.arange(10.0))) ** 2)


@functools.cache
def compiled_training(name, schedule):
    """Parameters -> (loss of each step, final parameters)."""
    _, tx = make_optimizer(
        group(name, schedule, learning_rate=RATES.get(name, 1e-2)), num_steps=NUM_STEPS
    )

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, grad_norm=optax.tree.norm(grad))
        return (optax.apply_updates(params, updates), state), value

    def train(params):
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=NUM_STEPS)
        return losses, params

    return jax.jit(train)


EVERY = [(name, "cosine") for name in OPTIMIZERS]
EVERY += [("adamw", schedule) for schedule in SCHEDULES if schedule != "cosine"]


@pytest.mark.parametrize("name, schedule", EVERY)
def test_it_learns_and_repeats_itself_bit_by_bit(name, schedule):
    train = compiled_training(name, schedule)
    first, again = train(make_params()), train(make_params())
    losses = np.asarray(first[0])
    assert losses[-1] < 0.5 * losses[0]
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_array_equal(one, other)


def test_adamw_is_the_plain_chain_bit_by_bit():
    """Updates and the form of the state: runs are compared by a hash of both."""
    optim = group(weight_decay=5e-3, clip_norm=0.5)
    schedule, tx = make_optimizer(optim, NUM_STEPS)
    warmup = optax.linear_schedule(0.0, 1e-2, 5)
    cosine = optax.cosine_decay_schedule(1e-2, NUM_STEPS - 5, 0.01)
    plain = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            optax.join_schedules([warmup, cosine], [5]),
            b1=0.9,
            b2=0.999,
            weight_decay=5e-3,
            mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params),
        ),
    )
    results = []
    for chain in (tx, plain):
        params = make_params()
        chain = optax.with_extra_args_support(chain)
        state, update = chain.init(params), jax.jit(chain.update)
        for seed in range(8):
            grad = make_params(seed + 1)
            updates, state = update(grad, state, params, grad_norm=optax.tree.norm(grad))
            params = optax.apply_updates(params, updates)
        results.append((params, state))
    paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(x)] for x in results]
    assert paths[0] == paths[1]
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    jax.tree.map(np.testing.assert_array_equal, *results)


# --- what a step does ----------------------------------------------------------------------------


def one_step(name, grad=None, **changes):
    """Updates, parameters and state of a first step without warm-up, each as `{path: array}`."""
    params = make_params()
    grad = jax.tree.map(jnp.zeros_like, params) if grad is None else grad
    _, tx = make_optimizer(group(name, "constant", warmup_steps=0, **changes), num_steps=10)
    updates, state = tx.update(grad, tx.init(params), params, grad_norm=optax.tree.norm(grad))
    return by_path(updates), by_path(params), by_path(state)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


DECAYING = {
    "matrices": {"atom/table", "cls", "dense/kernel", "out/kernel"},
    "kernels": {"dense/kernel", "out/kernel"},
    "all": {"atom/table", "cls", "dense/kernel", "dense/bias", "out/kernel", "out/bias"},
    "none": set(),
}


DECAY = [name for name, row in OPTIMIZERS.items() if "weight_decay" in row.defaults]


@pytest.mark.parametrize(
    "name, mask",
    [("adamw", mask) for mask in DECAYING]
    + [(name, mask) for name in DECAY if name != "adamw" for mask in ("kernels", "none")],
)
def test_only_what_the_mask_names_decays(name, mask):
    """Without a gradient an update is the decay alone."""
    updates, params, _ = one_step(name, weight_decay=0.1, weight_decay_mask=mask)
    assert {path for path, update in updates.items() if jnp.any(update != 0)} == DECAYING[mask]
    if name != "lamb":  # which divides it by its norm
        for path in DECAYING[mask]:
            np.testing.assert_allclose(updates[path], -1e-2 * 0.1 * params[path], rtol=1e-6)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adamw():
    grad = make_params(1)
    # Singular values far from equal, as of a real gradient.
    grad["dense"]["kernel"] *= jnp.logspace(0, -1, 12)[:, None]
    options = {"grad": grad, "weight_decay": 0.0, "clip_norm": 0.0}
    muon, _, _ = one_step("muon", **options)
    adamw, _, _ = one_step("adamw", **options)
    given = jnp.linalg.svd(grad["dense"]["kernel"], compute_uv=False)
    made = jnp.linalg.svd(muon["dense/kernel"], compute_uv=False) / (1e-2 * 0.2 * math.sqrt(24))
    assert given.max() / given.min() > 5
    assert 0.5 < made.min() and made.max() < 1.5  # what Newton-Schulz promises
    for path in adamw.keys() - {"dense/kernel"}:
        np.testing.assert_array_equal(muon[path], adamw[path], err_msg=path)


def test_no_clipping_at_norm_0():
    grad = jax.tree.map(lambda x: 1e3 * x, make_params(1))
    as_given, _, state = one_step("sgd", grad=grad, clip_norm=0.0)
    clipped, _, clipped_state = one_step("sgd", grad=grad, clip_norm=1.0)
    np.testing.assert_allclose(as_given["cls"], -1e-2 * grad["cls"], rtol=1e-6)
    assert optax.tree.norm(clipped) == pytest.approx(1e-2)
    assert state.keys() == clipped_state.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_keep_the_paths_of_their_parameters(name):
    """The sharding divides a moment as its parameter, whose path its own must end in."""
    _, tx = make_optimizer(group(name), NUM_STEPS)
    params, state = by_path(make_params()), by_path(jax.eval_shape(tx.init, make_params()))
    moments = {path: x for path, x in state.items() if x.ndim and not path.endswith("ns_coeffs")}
    assert moments
    for path, x in moments.items():
        owners = [p for p in params if path.endswith("/" + p)]
        assert owners and params[owners[0]].shape == x.shape, path
    for parameter in params:
        assert any(path.endswith("/" + parameter) for path in moments), parameter


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (2, 2, 2), (1, 1, 3)])
def test_muon_is_the_same_where_its_matrices_and_its_work_are_divided(shape):
    """Newton-Schulz needs whole matrices: the compiler gathers what two devices share."""
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    optim = group("muon", "constant", warmup_steps=0)
    params, grad = make_params(), make_params(1)
    for tree, seed in ((params, 2), (grad, 3)):
        # Two shapes, one of them of three matrices, two of those on their side.
        wide, other = (make_params(s)["dense"]["kernel"] for s in (seed, seed + 9))
        tree["more"] = {"kernel": wide[:, :16], "out": {"kernel": other.T}}
        tree["last"] = {"kernel": (wide - other).T}
    _, tx = make_optimizer(optim, num_steps=10)
    norm = optax.tree.norm(grad)
    whole, _ = jax.jit(tx.update)(grad, tx.init(params), params, grad_norm=norm)
    _, tx = make_optimizer(optim, 10, mesh)

    def divide(path, x):
        kernel = "dense" in jax.tree_util.keystr(path) and x.ndim == 2
        return jax.device_put(x, NamedSharding(mesh, P("fsdp", "model") if kernel else P()))

    inputs = (grad, tx.init(params), params)
    inputs = jax.tree_util.tree_map_with_path(divide, inputs)
    divided, _ = jax.jit(tx.update)(*inputs, grad_norm=norm)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(divided), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)


# --- schedules -----------------------------------------------------------------------------------

PEAK, WARMUP, STEPS = 1.0, 10, 110
VALUES = {  # step -> rate, by hand
    "constant": {50: 1.0, 109: 1.0},
    "plateau": {50: 1.0, 109: 1.0},
    "cosine": {60: 0.1 + 0.9 / 2, 35: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 110: 0.1},
    "linear": {60: 0.55, 109: 1 - 0.9 * 0.99, 110: 0.1},
    "wsd": {11: 1.0, 88: 1.0, 99: 1 - 0.9 * 11 / 22, 110: 0.1},  # the last 22 steps
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_at_steps_computed_by_hand(name):
    changes = {"final_fraction": 0.1} if "final_fraction" in SCHEDULES[name].defaults else {}
    optim = group("adamw", name, learning_rate=PEAK, warmup_steps=WARMUP, **changes)
    schedule, _ = make_optimizer(optim, STEPS)
    for step, rate in {0: 0.0, 3: 0.3, 9: 0.9, 10: 1.0, **VALUES[name]}.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak(name):
    schedule, _ = make_optimizer(group("adamw", name, warmup_steps=0), STEPS)
    assert float(schedule(0)) == pytest.approx(COMMON["learning_rate"])


def test_a_plateau_lowers_the_rate_after_its_patience_and_survives_a_stop():
    scores = [3.0, 2.0, 2.5, math.nan, 2.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]
    scales = []
    plateau = Plateau()
    for score in scores:
        plateau = plateau_step(plateau, score, factor=0.5, patience=2, min_scale=0.2)
        # Each evaluation could be the last before a stop: through the JSON of a checkpoint.
        plateau = Plateau(**json.loads(json.dumps(dataclasses.asdict(plateau))))
        scales.append(plateau.scale)
    assert scales == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2]
    assert plateau == Plateau(best=1.0, bad=0, scale=0.2)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "adamW2"}, ["config.optim.name 'adamW2'", "Did you mean 'adamw'", "lion"]),
        ({"schedule": "cosin"}, ["config.optim.schedule 'cosin'", "Did you mean 'cosine'", "wsd"]),
        ({"weight_decay_mask": "kernel"}, ["weight_decay_mask 'kernel'", "'kernels'"]),
        ({"warmup_steps": 60}, ["config.optim.warmup_steps (60)", "config.train.num_steps (60)"]),
        ({"warmup_steps": -1}, ["config.optim.warmup_steps (-1)", "at least 0"]),
        ({"learning_rate": math.nan}, ["config.optim.learning_rate is nan", "above 0"]),
        ({"learning_rate": -1e-3}, ["config.optim.learning_rate is -0.001", "above 0"]),
        ({"learning_rate": 0.0}, ["config.optim.learning_rate is 0.0", "above 0"]),
        ({"clip_norm": -1.0}, ["config.optim.clip_norm is -1.0", "0 switches it off"]),
        (
            {"ema_decay": 1.0},
            ["config.optim.ema_decay is 1.0", "less than 1", "0 keeps no average"],
        ),
        ({"b1": 1.0}, ["config.optim.b1 is 1.0", "less than 1"]),
        ({"b2": -0.1}, ["config.optim.b2 is -0.1", "at least 0"]),
        ({"eps": 0.0}, ["config.optim.eps is 0.0", "above 0"]),
        ({"weight_decay": math.inf}, ["config.optim.weight_decay is inf", "finite"]),
        ({"final_fraction": 1.1}, ["config.optim.final_fraction is 1.1", "at most 1"]),
        ({"decay_fraction": 0.0}, ["config.optim.decay_fraction is 0.0", "above 0"]),
        ({"decay_fraction": 0.95}, ["warmup_steps (5)", "57 steps", "(0.95)", "num_steps (60)"]),
        ({"factor": 1.0}, ["config.optim.factor is 1.0", "below 1"]),
        ({"patience": -1}, ["config.optim.patience is -1", "at least 0"]),
        ({"min_scale": 2.0}, ["config.optim.min_scale is 2.0", "at most 1"]),
        ({"momentum": 1.0}, ["config.optim.momentum is 1.0", "less than 1"]),
        ({"consistent_rms": 0.0}, ["config.optim.consistent_rms is 0.0", "above 0"]),
    ],
)
def test_errors_name_the_key_the_value_and_the_remedy(changes, words):
    (key,) = changes
    name = next((n for n in OPTIMIZERS if key in OPTIMIZERS[n].defaults), "adamw")
    schedule = next((s for s in SCHEDULES if key in SCHEDULES[s].defaults), "cosine")
    optim = group(name, schedule) | changes
    with pytest.raises(UserError) as error:
        make_optimizer(optim, NUM_STEPS)
    for word in words:
        assert word in str(error.value)
