"""The training step: padding, accumulation, device counts, collectives."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from data_pipelines import batching
from data_pipelines.batch_plan import FILL
from data_pipelines.errors import UserError
from demetar.config.command_line import load_config
from demetar.training import gradients, sharding
from demetar.training.experiment import build_experiment
from demetar.training.step import CompiledPerBucket
from demetar.training.trainer import Trainer


@functools.cache
def make_trainer(cache_dir, mesh=(1, 1, 1), dtype="float32", config="qm9:smoke", **changes):
    """A small model on a mesh (data, fsdp, model); its program is compiled once for all tests."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    if config == "qm9:smoke":
        changes = {
            "data.targets": ("homo", "U0"),
            "data.batch_size": 16,
            "model.width": 16,
            "model.num_heads": 4,
            "model.node_layers": 0,  # a joint layer is the same; each takes a second to compile
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.learning_rate": 1e-3,
            "optim.weight_decay": 1e-4,
        } | changes
    changes |= {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, mesh, strict=True)}
    changes |= {"data.cache_dir": cache_dir, "model.dtype": dtype}
    return Trainer(build_experiment(load_config(config, changes)))


def run(trainer, steps):
    """Losses of the first steps, and the state after them."""
    state, losses = trainer.experiment.create_state(), []
    for k in range(steps):
        bucket, graphs = trainer.gather(k)
        state, sums = trainer.step(state, bucket, trainer.to_devices(graphs))
        losses.append(float(sums.loss))
    return np.array(losses), jax.device_get(state)


def tree_close(a, b, rtol, atol=0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.slow
def test_float32_on_1_and_8_devices(cache_dir):
    one, _ = run(make_trainer(cache_dir), 20)
    eight, _ = run(make_trainer(cache_dir, (8, 1, 1)), 20)
    np.testing.assert_allclose(eight, one, rtol=1e-5)


# What `qm9:quick` has and `qm9:smoke` leaves out.
QUICK = {"optim__name": "muon", "model__directions": 4, "model__edge_angles": True}


@pytest.mark.parametrize(
    "mesh, steps, changes",
    [
        ((2, 2, 2), 8, QUICK),
        *(
            pytest.param(m, 40, {}, marks=pytest.mark.slow)
            for m in ((2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 2))
        ),
    ],
)
def test_float64_on_any_mesh(cache_dir, float64, mesh, steps, changes):
    one, state_1 = run(make_trainer(cache_dir, dtype="float64", **changes), steps)
    changes = changes | {"mesh__gradient_groups": 3}
    many, state_n = run(make_trainer(cache_dir, mesh, "float64", **changes), steps)
    np.testing.assert_allclose(many, one, rtol=1e-10)
    norms = [float(optax.tree.norm(s.params)) for s in (state_1, state_n)]
    np.testing.assert_allclose(*norms, rtol=1e-10)


def test_accumulation_equals_the_plain_step(cache_dir, float64):
    """In four micro-batches, on a mesh of three axes: the same losses and parameters."""
    trainer = make_trainer(cache_dir, (2, 2, 2), "float64", train__accumulation=4)
    four, state_4 = run(trainer, 4)
    one, state_1 = run(make_trainer(cache_dir, dtype="float64"), 4)
    np.testing.assert_allclose(four, one, rtol=1e-10)
    tree_close(state_4.params, state_1.params, rtol=1e-7, atol=1e-10)


def test_rules_divide_matrices_and_their_moments(cache_dir):
    state = make_trainer(cache_dir, (2, 2, 2)).experiment.create_state()
    adam = state.opt_state[1][0]
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        block = tree["joint_0"]
        assert block["attention"]["query"]["kernel"].sharding.spec == P("fsdp", "model")
        assert block["attention"]["out"]["kernel"].sharding.spec == P("model", "fsdp")
        assert block["mlp"]["hidden"]["bias"].sharding.spec == P("model")
        assert block["mlp"]["out"]["bias"].sharding.spec == P()
        kernel = block["mlp"]["hidden"]["kernel"]
        assert kernel.addressable_data(0).size == kernel.size // 4


def collectives(trainer):
    """(name, elements) of each collective in the compiled train step."""
    found = []
    for shapes, name in re.findall(
        r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
        r"(?:-start)?\(",
        trainer.program(0).as_text(),
    ):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for dims in re.findall(r"f\d+\[([\d,]*)\]", shapes)
        ]
        found.append((name, sum(sizes)))
    return found


def test_one_all_reduce_and_no_other_collective(cache_dir):
    found = collectives(make_trainer(cache_dir, (8, 1, 1)))
    assert [name for name, _ in found] == ["all-reduce"]


def test_muon_divides_its_work_and_gathers_it_once(cache_dir):
    trainer = make_trainer(cache_dir, (8, 1, 1), optim__name="muon")
    names = [name for name, _ in collectives(trainer)]
    assert sorted(names) == ["all-gather", "all-reduce"]


def test_fsdp_gathers_parameters_and_scatters_gradients(cache_dir):
    trainer = make_trainer(cache_dir, (1, 8, 1))
    found = collectives(trainer)
    assert {name for name, _ in found} == {"all-gather", "reduce-scatter", "all-reduce"}
    # What is all-reduced: gradients of the leaves that are repeated, and sums.
    leaves = zip(
        jax.tree.leaves(trainer.experiment.abstract_state().params),
        jax.tree.leaves(trainer.experiment.state_specs.params),
        strict=True,
    )
    repeated = sum(x.size for x, spec in leaves if "fsdp" not in spec)
    reduced = sum(size for name, size in found if name == "all-reduce")
    assert reduced < repeated + 64


def test_gradients_are_grouped_in_the_order_in_which_the_backward_pass_ends(cache_dir):
    trainer = make_trainer(cache_dir)
    experiment, arguments = trainer.experiment, trainer.abstract_arguments(0)
    gradient = gradients.make_gradient(experiment.model, experiment.objective, accumulation=1)
    keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))
    params = arguments[0].params
    ready = gradients.order_of_backward(gradient, params, arguments[1], keys_B)
    ready = jax.tree.unflatten(jax.tree.structure(params), ready)
    of = lambda name: jax.tree.leaves(ready[name])
    assert max(of("head_cls")) < min(of("joint_0")) < min(of("atom"))
    sizes, ready = [9, 1, 5, 5], [40, 30, 20, 10]
    assert gradients._groups_of(sizes, ready, 1) == [[3, 2, 1, 0]]
    assert gradients._groups_of(sizes, ready, 2) == [[3, 2, 1], [0]]
    assert gradients._groups_of(sizes, ready, 99) == [[3], [2], [1], [0]]


def test_the_norm_is_that_of_all_leaves(cache_dir):
    """Of repeated and of divided ones, against the gradient on one device."""
    trainer = make_trainer(cache_dir, (1, 8, 1))
    experiment = trainer.experiment
    gradient = gradients.make_gradient(experiment.model, experiment.objective, accumulation=1)
    bucket, graphs = trainer.gather(0)
    params = jax.device_get(experiment.create_state().params)
    keys_B = jax.random.split(jax.random.key(0), 16)
    grad, _, _ = jax.jit(gradient)(params, graphs, keys_B)
    _, sums = trainer.step(experiment.create_state(), bucket, trainer.to_devices(graphs))
    np.testing.assert_allclose(sums.grad_norm, optax.tree.norm(grad) / 16, rtol=1e-4)


def test_padding_graphs_weigh_nothing_and_the_divisor_is_nominal(cache_dir, float64):
    """A batch with empty rows: the gradient is the sum over its graphs over 16."""
    trainer = make_trainer(cache_dir, dtype="float64")
    experiment = trainer.experiment

    def sums_of(graphs):
        batch = batching.gather(experiment.arrays, graphs, experiment.dataset.buckets[0])
        _, sums = trainer.step(experiment.create_state(), 0, trainer.to_devices(batch))
        return jax.device_get(sums)

    graphs = experiment.dataset.split["train"][:16].copy()
    graphs[5:] = FILL
    partial = sums_of(graphs)
    assert partial.graphs == 5 and partial.errors.count.tolist() == [5, 5]
    alone = [sums_of(np.where(np.arange(16) == k, graphs, FILL)) for k in range(5)]
    np.testing.assert_allclose(partial.loss, sum(s.loss for s in alone), rtol=1e-9)
    np.testing.assert_allclose(partial.errors.total, sum(s.errors.total for s in alone), rtol=1e-9)
    # In another place of the batch the same graph weighs the same.
    moved = np.full(16, FILL)
    moved[11] = graphs[0]
    np.testing.assert_allclose(sums_of(moved).grad_norm, alone[0].grad_norm, rtol=1e-12)


@pytest.mark.parametrize(
    "variant", ["smoke,egnn", pytest.param("large,smoke", marks=pytest.mark.slow)]
)
def test_a_variant_of_qm9_takes_steps_that_change_its_weights(cache_dir, variant):
    config = f"qm9:{variant}"
    mesh = (1, 4, 2) if "large" in variant else (1, 1, 1)
    trainer = make_trainer(cache_dir, mesh, config=config, optim__warmup_steps=0)
    before = jax.device_get(trainer.experiment.create_state().params)
    losses, state = run(trainer, 3)
    assert np.isfinite(losses).all()
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)
    assert all(jax.tree.leaves(changed))


def test_the_large_config_is_large(cache_dir):
    """Its mesh is that of its file, and its parameters are what its name says."""
    large = load_config("qm9:large")
    assert (large.mesh.fsdp, large.mesh.model) == (4, 2)
    config = load_config("qm9:large,smoke", {"data.cache_dir": cache_dir})
    with config.unlocked():
        config.model = large.model
    params = build_experiment(config).abstract_state().params
    assert sum(x.size for x in jax.tree.leaves(params)) >= 100_000_000


def test_another_shape_is_an_error_not_a_recompilation():
    shape = jax.ShapeDtypeStruct((3,), np.float32)
    step = CompiledPerBucket(jax.jit(lambda x: x + 1), 1, lambda bucket: (shape,))
    step(0, np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="compiled"):
        step(0, np.zeros(4, np.float32))


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step(cache_dir):
    small = {"model__edge_layers": 0}
    a, _ = run(make_trainer(cache_dir, model__dropout=0.3, **small), 3)
    b, _ = run(make_trainer(cache_dir, (2, 1, 1), model__dropout=0.3, **small), 3)
    none, _ = run(make_trainer(cache_dir), 3)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.abs(a - none).max() > 1e-3


def test_sixteen_molecules_are_learned_by_heart(cache_dir):
    """That anything learns at all: the error falls below 5 % of the trivial one, which is 1."""
    trainer = make_trainer(
        cache_dir,
        data__targets=("homo",),
        optim__schedule="cosine",
        optim__learning_rate=5e-3,
        optim__weight_decay=0.0,
        train__num_steps=400,
    )
    experiment = trainer.experiment
    graphs = experiment.dataset.split["train"][:16]
    batch = batching.gather(experiment.arrays, graphs, experiment.dataset.buckets[0])
    batch, state = trainer.to_devices(batch), experiment.create_state()
    for _ in range(400):
        state, sums = trainer.step(state, 0, batch)
    assert float(sums.loss) / 16 < 0.05


# --- mesh and batch sizes ----------------------------------------------------------------------


def test_batch_size_that_does_not_divide_names_the_nearest():
    mesh = sharding.make_mesh(8)
    with pytest.raises(UserError, match=r"\(20\) must be .* multiple of 16.*nearest are 16 and 32"):
        sharding.check_batch_size("config.data.batch_size", 20, mesh, accumulation=2)
    assert (sharding.process_rows(mesh, 32) == np.arange(32)).all()


def test_more_devices_than_graphs():
    mesh = sharding.make_mesh(8)
    sharding.check_graphs(8, "molecules", mesh)
    with pytest.raises(UserError, match=r"over 8 devices .* has only 7 molecules: use at most so"):
        sharding.check_graphs(7, "molecules", mesh)


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
    with pytest.raises(UserError, match=r"model \(8\) must divide the attention heads \(4\)"):
        make_trainer(cache_dir, (1, 1, 8))
    with pytest.raises(UserError, match="nothing to divide"):
        make_trainer(cache_dir, (1, 1, 2), config="qm9:smoke,egnn")
