"""The training step: padding, accumulation, device counts, collectives."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from conftest import load_config
from jax.sharding import PartitionSpec as P

from data_pipelines import batching
from data_pipelines.batch_plan import FILL, BatchPlan, Bucket, buckets_with_limits
from data_pipelines.errors import UserError
from demetar.models import create_model
from demetar.train import compiled_train_step, jitted_train_step
from demetar.training import sharding
from demetar.training.experiment import Experiment, build_experiment
from demetar.training.objective import Normalization, TargetErrors, standardize
from demetar.training.step import CompiledPerBucket


def make_experiment(dataset, mesh=1, dtype="float32", accumulation=1, steps_per_call=1, **model):
    """Args: `mesh` is the sizes (data, fsdp, model), or data alone."""
    config = load_config("qm9", "smoke")
    # One bucket: every further one is another program to compile.
    buckets = buckets_with_limits(dataset.arrays.sizes, (29,))
    dataset = dataclasses.replace(dataset, buckets=buckets)
    config.data.batch_size = 16
    config.train.accumulation = accumulation
    config.train.steps_per_call = steps_per_call
    config.model.update({"width": 16, "num_heads": 4, "dtype": dtype} | model)
    arrays, normalization = standardize(dataset, np.dtype(dtype))
    options = config.model.to_dict()
    return Experiment(
        config=config,
        mesh=sharding.make_mesh(*(mesh if isinstance(mesh, tuple) else (mesh,))),
        dataset=dataset,
        arrays=arrays,
        normalization=normalization,
        model=create_model(target_readouts=("cls", "sum"), **options),
        schedule=optax.constant_schedule(1e-3),
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    )


def run(experiment, steps, fill=()):
    """Losses of the first steps; rows in `fill` of each batch are left empty."""
    config, dataset = experiment.config, experiment.dataset
    size = config.data.batch_size
    plan = BatchPlan(
        experiment.arrays.sizes, dataset.split["train"], dataset.buckets, size, config.seed
    )
    step = compiled_train_step(experiment)
    state, losses = experiment.create_state(), []
    together = config.train.steps_per_call

    def gather(k):
        bucket, graphs = plan[k]
        graphs = graphs.copy()
        graphs[list(fill)] = FILL
        return bucket, batching.gather(experiment.arrays, graphs, plan.buckets[bucket])

    for k in range(0, steps, together):
        bucket, batch = batching.stacked([gather(k + n) for n in range(together)])
        batch = sharding.to_devices(batch, experiment.mesh, size, together > 1)
        flags = sharding.flags(experiment.mesh, False)
        state, sums = step(bucket, state, batch, flags, np.float32(1))
        losses += np.ravel(sums.loss).tolist()
    return np.array(losses), jax.device_get(state)


def tree_close(a, b, rtol, atol=0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_float32_on_1_and_8_devices(dataset):
    one, _ = run(make_experiment(dataset, 1), 20)
    eight, _ = run(make_experiment(dataset, 8), 20)
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.fixture(scope="module")
def on_one_device(dataset):
    with jax.enable_x64(True):
        return run(make_experiment(dataset, 1, "float64"), 40)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 2)])
def test_float64_on_any_mesh(dataset, float64, on_one_device, mesh):
    one, state_1 = on_one_device
    many, state_n = run(make_experiment(dataset, mesh, "float64"), 40)
    np.testing.assert_allclose(many, one, rtol=1e-10)
    norms = [float(optax.global_norm(s.params)) for s in (state_1, state_n)]
    np.testing.assert_allclose(*norms, rtol=1e-10)


def test_accumulation_on_a_mesh_of_three_axes(dataset, float64, on_one_device):
    many, _ = run(make_experiment(dataset, (2, 2, 2), "float64", accumulation=4), 4)
    np.testing.assert_allclose(many, on_one_device[0][:4], rtol=1e-10)


def test_rules_divide_matrices_and_their_moments(dataset):
    experiment = make_experiment(dataset, (2, 2, 2))
    state = experiment.create_state()
    adam = state.opt_state[1][0]
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        block = tree["joint_0"]
        assert block["Attention_0"]["query"]["kernel"].sharding.spec == P("fsdp", "model")
        assert block["Attention_0"]["out"]["kernel"].sharding.spec == P("model", "fsdp")
        assert block["Mlp_0"]["Dense_1"]["bias"].sharding.spec == P()
        kernel = block["Mlp_0"]["Dense_0"]["kernel"]
        assert kernel.addressable_data(0).size == kernel.size // 4


def collectives(dataset, mesh, **options):
    """(name, elements) of each collective in the compiled train step."""
    experiment = make_experiment(dataset, mesh, **options)
    text = lower(experiment).compile().as_text()
    found = []
    for shapes, name in re.findall(
        r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
        r"(?:-start)?\(",
        text,
    ):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for dims in re.findall(r"f\d+\[([\d,]*)\]", shapes)
        ]
        found.append((name, sum(sizes)))
    return found


def lower(experiment):
    step = jitted_train_step(experiment)
    bucket = experiment.dataset.buckets[0]
    batch = batching.gather(experiment.arrays, np.full(16, FILL), bucket)
    batch = sharding.to_devices(batch, experiment.mesh, 16)
    flags = sharding.flags(experiment.mesh, False)
    return step.lower(experiment.abstract_state(), batch, flags, np.float32(1))


def test_one_all_reduce_and_no_other_collective(dataset):
    assert [name for name, _ in collectives(dataset, 8)] == ["all-reduce"]


def test_fsdp_gathers_parameters_and_scatters_gradients(dataset):
    found = collectives(dataset, (1, 8, 1))
    assert {name for name, _ in found} == {"all-gather", "reduce-scatter", "all-reduce"}
    # What is all-reduced: gradients of the leaves that are repeated, and sums.
    experiment = make_experiment(dataset, (1, 8, 1))
    leaves = zip(
        jax.tree.leaves(experiment.abstract_state().params),
        jax.tree.leaves(experiment.state_specs.params),
        strict=True,
    )
    repeated = sum(x.size for x, spec in leaves if "fsdp" not in spec)
    reduced = sum(size for name, size in found if name == "all-reduce")
    assert reduced < repeated + 64


def test_accumulation_equals_the_plain_step(dataset, float64):
    plain, state_1 = run(make_experiment(dataset, 2, "float64"), 4)
    four, state_4 = run(make_experiment(dataset, 2, "float64", accumulation=4), 4)
    np.testing.assert_allclose(four, plain, rtol=1e-10)
    tree_close(state_4.params, state_1.params, rtol=1e-7, atol=1e-10)


def test_padding_graphs_weigh_nothing_and_the_divisor_is_nominal(dataset, float64):
    """A batch with empty rows: the gradient is the sum over its graphs over 16."""
    experiment = make_experiment(dataset, 1, "float64")
    graphs = dataset.split["train"][:16].copy()
    bucket = Bucket(29, 40)

    def gradient_norm(rows):
        batch = batching.gather(experiment.arrays, rows, bucket)
        step = compiled_train_step(experiment)
        _, sums = step(
            0,
            experiment.create_state(),
            sharding.to_devices(batch, experiment.mesh, len(rows)),
            sharding.flags(experiment.mesh, False),
            np.float32(1),
        )
        return float(sums.grad_norm) * len(rows), float(sums.loss), float(sums.errors.count)

    experiment.config.data.batch_size = 16
    partial = graphs.copy()
    partial[5:] = FILL
    alone = gradient_norm(graphs[:5])
    np.testing.assert_allclose(gradient_norm(partial), alone, rtol=1e-9)
    assert alone[2] == 5


def test_the_egnn_config_of_qm9_takes_steps(cache_dir):
    config = load_config("qm9", "smoke,egnn")
    config.data.cache_dir = cache_dir
    experiment = build_experiment(config)
    losses, _ = run(experiment, 3)
    assert np.isfinite(losses).all() and losses[2] != losses[0]


def test_the_large_config_takes_steps_on_its_mesh(cache_dir):
    """Its smoke variant on eight devices; and its parameters are what its name says."""
    config = load_config("qm9_large", "smoke")
    config.data.cache_dir = cache_dir
    experiment = build_experiment(config)
    assert dict(experiment.mesh.shape) == {"data": 1, "fsdp": 4, "model": 2}
    losses, _ = run(experiment, 3)
    assert np.isfinite(losses).all() and losses[2] != losses[0]
    config.model = load_config("qm9_large", "").model
    params = build_experiment(config).abstract_state().params
    assert sum(x.size for x in jax.tree.leaves(params)) >= 100_000_000


def test_another_shape_is_an_error_not_a_recompilation():
    step = CompiledPerBucket(jax.jit(lambda x: x + 1), 1)
    step(0, np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="compiled"):
        step(0, np.zeros(4, np.float32))


def test_dropout_is_a_function_of_seed_and_step(dataset):
    a, _ = run(make_experiment(dataset, 1, dropout=0.3), 3)
    b, _ = run(make_experiment(dataset, 8, dropout=0.3), 3)
    none, _ = run(make_experiment(dataset, 1), 3)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.abs(a - none).max() > 1e-3


# --- normalisation and metrics -----------------------------------------------------------------


def test_normalization_is_of_the_training_split_and_invertible(dataset):
    arrays, normalization = standardize(dataset, np.float64)
    train = dataset.split["train"]
    z = arrays.target[train]
    np.testing.assert_allclose((z**2).mean(axis=0), 1.0)
    np.testing.assert_allclose(z[:, 0].mean(), 0.0, atol=1e-12)  # HOMO, intensive
    back = normalization.restore(arrays.target, arrays.sizes.num_nodes)
    np.testing.assert_allclose(back, dataset.arrays.target, rtol=1e-12)
    changed = dataset.arrays.target.copy()
    changed[dataset.split["test"]] += 1e6
    other = dataclasses.replace(dataset, arrays=dataclasses.replace(dataset.arrays, target=changed))
    assert np.array_equal(standardize(other, np.float64)[1].scale, normalization.scale)


def test_extensive_targets_are_normalised_per_atom(dataset):
    _, normalization = standardize(dataset, np.float64)
    assert normalization.slope[0] == 0 and normalization.offset[0] != 0  # HOMO
    assert normalization.slope[1] != 0 and normalization.offset[1] == 0  # U0
    assert Normalization.fit(np.ones((3, 1)), np.ones(3), [False]).scale == 1.0  # constant target


def test_metric_is_exact_over_padding_and_batching():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 11, 2))
    exact = np.abs(prediction - target).mean(axis=0)
    for size in (1, 3, 11):
        merged = TargetErrors.empty()
        for start in range(0, 12, size):
            rows = np.arange(start, start + size)
            mask = rows < 11
            rows = np.minimum(rows, 10)
            junk = np.where(mask[:, None], prediction[rows], np.nan)
            part = TargetErrors.from_model_output(np.abs(junk - target[rows]), mask)
            merged = merged.merge(jax.tree.map(lambda x: np.asarray(x, np.float64), part))
        assert merged.count == 11
        np.testing.assert_allclose(merged.compute(), exact, rtol=1e-6)


# --- mesh and batch sizes ----------------------------------------------------------------------


def test_batch_size_that_does_not_divide_names_the_nearest():
    mesh = sharding.make_mesh(8)
    with pytest.raises(UserError, match=r"\(20\) must be .* multiple of 16.*nearest are 16 and 32"):
        sharding.check_batch_size("config.data.batch_size", 20, mesh, accumulation=2)
    assert (sharding.process_rows(mesh, 32) == np.arange(32)).all()


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((9, 1, 1), "takes 9 devices. 8 devices are present; nearest meshes that fit: 8x1x1"),
        ((-1, 3, 1), "3 x 1 = 3. does not divide the 8 devices.*4x2x1"),
        ((4, 2, 2), "takes 16 devices.*nearest meshes that fit: (4x2x1|4x1x2|2x2x2)"),
        ((1, 0, 1), "below 1"),
    ],
)
def test_impossible_mesh_names_the_nearest(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(*sizes)


def test_axis_model_must_divide_heads_and_have_something_to_divide(cache_dir):
    config = load_config("qm9", "smoke")
    config.data.cache_dir = cache_dir
    config.mesh.model = 8
    with pytest.raises(UserError, match=r"model \(8\) must divide the attention heads \(4\)"):
        build_experiment(config)
    config = load_config("qm9", "smoke,egnn")
    config.data.cache_dir = cache_dir
    config.mesh.model = 2
    with pytest.raises(UserError, match="nothing to divide"):
        build_experiment(config)
