"""One property suite over every registered model, and over ones broken on purpose.

Float64 throughout: a broken symmetry shows at 1e-3, rounding at 1e-14.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_graph

from data_pipelines.plan import Bucket
from demetar.models import MODELS, apply_one, create_model
from demetar.models import demetar as demetar_module

pytestmark = pytest.mark.usefixtures("float64")

SMALL = dict(
    width=16, num_heads=4, edge_layers=1, node_layers=1, joint_layers=1, mlp_ratio=2, num_radial=8
)
VARIANTS = {
    "default": {},
    "blog": {"scaling": "blog"},
    "seed": {"edge_atoms": False, "pair_bias": False, "scaling": "blog"},
    "shared_node": {"edge_attention": "shared_node"},
    "mean": {"readout": "mean"},
}


def build(variant="default", **more):
    """A small model and random weights: a zero in the initial ones could hide a broken path."""
    options = SMALL | {"readout": "auto", "dtype": "float64"} | VARIANTS.get(variant, {}) | more
    model = create_model("demetar", target_readouts=("cls", "sum"), **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), random_graph(np.random.default_rng(0)))
    rng = np.random.default_rng(1)
    draw = lambda s: (rng.normal(size=s.shape) / np.sqrt(s.shape[0])).astype(s.dtype)
    return model, jax.tree.map(draw, shapes["params"])


predict = jax.jit(apply_one, static_argnums=0)


def output(model, params, graph):
    return np.asarray(predict(model, params, graph))


def rotated(graph, rng, reflect):
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    if (np.linalg.det(q) < 0) != reflect:
        q[:, 0] *= -1
    return graph.replace(position=graph.position @ q.T)


def permuted(graph, rng):
    """The same graph with its real atoms and edges in another order, and edges turned round."""
    n, e = int(graph.node_mask.sum()), int(graph.edge_mask.sum())
    atoms, edges = rng.permutation(n), rng.permutation(e)
    place = np.argsort(atoms)
    new = graph.replace(
        position=graph.position.copy(),
        atomic_number=graph.atomic_number.copy(),
        senders=graph.senders.copy(),
        receivers=graph.receivers.copy(),
        edge_type=graph.edge_type.copy(),
    )
    new.position[:n] = graph.position[atoms]
    new.atomic_number[:n] = graph.atomic_number[atoms]
    s, r = place[graph.senders[edges]], place[graph.receivers[edges]]
    turn = rng.random(e) < 0.5
    new.senders[:e], new.receivers[:e] = np.where(turn, r, s), np.where(turn, s, r)
    new.edge_type[:e] = graph.edge_type[edges]
    return new


@pytest.fixture(params=VARIANTS)
def model_and_params(request):
    return build(request.param)


def test_registry_holds_what_is_tested():
    assert set(MODELS) == {"demetar"}


def check_invariances(model, params):
    """The symmetries a model for scalars declares: E(3) and permutations."""
    rng = np.random.default_rng(3)
    graph = random_graph(rng)
    expected = output(model, params, graph)
    moved = graph.replace(position=graph.position + rng.normal(size=3) * 10)
    changes = {
        "rotation": rotated(graph, rng, reflect=False),
        "reflection": rotated(graph, rng, reflect=True),
        "translation": moved,
        "permutation": permuted(graph, rng),
    }
    for name, changed in changes.items():
        np.testing.assert_allclose(
            output(model, params, changed), expected, rtol=1e-10, atol=1e-10, err_msg=name
        )


def test_invariant_to_rotation_reflection_translation_permutation(model_and_params):
    check_invariances(*model_and_params)


def test_depends_on_geometry_types_and_bonds(model_and_params):
    """What is no symmetry must change the output, or the suite above would prove nothing."""
    model, params = model_and_params
    rng = np.random.default_rng(4)
    graph = random_graph(rng)
    expected = output(model, params, graph)
    changes = {
        "scale": graph.replace(position=graph.position * 1.1),
        "atoms": graph.replace(
            atomic_number=np.roll(graph.atomic_number[:7], 1).repeat([1] * 6 + [4])
        ),
        "bonds": graph.replace(edge_type=(graph.edge_type + 1) % 5),
    }
    for name, changed in changes.items():
        assert np.abs(output(model, params, changed) - expected).max() > 1e-6, name


@pytest.mark.parametrize("broken", ["direction", "inverted_mask", "position"])
def test_a_broken_model_fails_the_suite(broken, monkeypatch):
    # Each has a cutoff of its own, so that none meets the compiled program of a whole model.
    if broken == "direction":  # an edge's feature depends on which end is the sender
        monkeypatch.setattr(demetar_module, "_share_a_node", lambda s, r: s[:, None] < r[None])
        model, params = build("shared_node", radial_cutoff=4.1)
    elif broken == "inverted_mask":  # the seed's own defect: attends to padding only
        monkeypatch.setattr(demetar_module, "mask_bias", lambda m: jnp.where(m, -1e30, 0.0))
        model, params = build(radial_cutoff=4.2)
        with pytest.raises(AssertionError):
            check_padding(model, params)
        return
    else:  # a feature that is not invariant
        monkeypatch.setattr(demetar_module, "safe_norm", lambda x: x[..., 0])
        model, params = build(radial_cutoff=4.3)
    with pytest.raises(AssertionError):
        check_invariances(model, params)


def test_batch_equals_singles(model_and_params):
    model, params = model_and_params
    rng = np.random.default_rng(5)
    graphs = [random_graph(rng, n, e) for n, e in ((7, 9), (10, 14), (1, 0), (2, 1))]
    batch = jax.tree.map(lambda *x: np.stack(x), *graphs)
    batched = jax.jit(jax.vmap(lambda g: model.apply({"params": params}, g)))(batch)
    singles = np.stack([output(model, params, g) for g in graphs])
    np.testing.assert_allclose(batched, singles, rtol=1e-10, atol=1e-12)


def check_padding(model, params):
    small = random_graph(np.random.default_rng(6), bucket=Bucket(7, 9))
    large = random_graph(np.random.default_rng(6), bucket=Bucket(29, 40))
    np.testing.assert_allclose(
        output(model, params, small), output(model, params, large), rtol=1e-10, atol=1e-12
    )


def test_amount_of_padding_does_not_matter(model_and_params):
    check_padding(*model_and_params)


@pytest.mark.parametrize("junk", [7.0, np.nan, np.inf])
def test_junk_in_padding_changes_no_bit(model_and_params, junk):
    model, params = model_and_params
    graph = random_graph(np.random.default_rng(7))
    position = np.where(graph.node_mask[:, None], graph.position, junk)
    fill = lambda x, mask: np.where(mask, x, 3).astype(x.dtype)
    junky = graph.replace(
        position=position,
        atomic_number=fill(graph.atomic_number, graph.node_mask),
        senders=fill(graph.senders, graph.edge_mask),
        receivers=fill(graph.receivers, graph.edge_mask),
        edge_type=fill(graph.edge_type, graph.edge_mask),
    )
    run = jax.jit(jax.value_and_grad(lambda p, g: apply_one(model, p, g).sum()))
    for clean, dirty in zip(
        jax.tree.leaves(run(params, graph)), jax.tree.leaves(run(params, junky)), strict=True
    ):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("case", ["one atom", "coincident atoms", "no edges", "all padding"])
def test_finite_output_and_gradients(model_and_params, case):
    model, params = model_and_params
    rng = np.random.default_rng(8)
    graph = random_graph(rng)
    if case == "one atom":
        graph = random_graph(rng, 1, 0)
    elif case == "coincident atoms":
        graph = graph.replace(position=np.ones_like(graph.position))
    elif case == "no edges":
        graph = random_graph(rng, 5, 0)
    else:
        graph = jax.tree.map(np.zeros_like, graph)
    loss = lambda p, x: (apply_one(model, p, graph.replace(position=x)) ** 2).sum()
    values = jax.value_and_grad(loss, argnums=(0, 1))(params, graph.position)
    for leaf in jax.tree.leaves(values):
        assert np.isfinite(leaf).all()


def test_jit_equals_no_jit():
    model, params = build()
    graph = random_graph(np.random.default_rng(9))
    np.testing.assert_allclose(
        apply_one(model, params, graph), output(model, params, graph), rtol=1e-12
    )


def test_every_parameter_matters():
    """A dead branch (the seed threw its edge encoder away) would have zero gradient."""
    for variant in VARIANTS:
        model, params = build(variant)
        graph = random_graph(np.random.default_rng(10))
        grad = jax.grad(lambda p, m=model, g=graph: (apply_one(m, p, g) ** 2).sum())(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grad):
            assert np.abs(leaf).max() > 1e-12, f"{variant}: {jax.tree_util.keystr(path)}"


def test_mirrored_edges_change_nothing():
    """Why each pair is stored once: attention over doubled keys is the same attention."""
    model, params = build()
    graph = random_graph(np.random.default_rng(11), bucket=Bucket(7, 18))
    mirror = graph.replace(
        senders=np.concatenate([graph.senders[:9], graph.receivers[:9]]),
        receivers=np.concatenate([graph.receivers[:9], graph.senders[:9]]),
        edge_type=np.tile(graph.edge_type[:9], 2),
        edge_mask=np.ones(18, bool),
    )
    np.testing.assert_allclose(
        output(model, params, graph), output(model, params, mirror), rtol=1e-10
    )


def test_bfloat16_is_near_float32():
    model, params = build(dtype="float32")
    low, _ = build(dtype="bfloat16")
    graph = random_graph(np.random.default_rng(12))
    np.testing.assert_allclose(
        output(low, params, graph).astype(float), output(model, params, graph), rtol=0.1, atol=0.2
    )
