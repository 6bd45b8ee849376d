"""One property suite over every registered model, and over ones broken on purpose.

Float64 throughout: a broken symmetry shows at 1e-3, rounding at 1e-14.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_graph

from data_pipelines.batch_plan import Bucket
from data_pipelines.errors import UserError
from data_pipelines.scattering.transform import Scattering, coefficients
from data_pipelines.targets import Target
from demetar.config.command_line import load_config
from demetar.models import MODELS, apply_one, create_model, option_defaults
from demetar.models import demetar as demetar_module
from demetar.models import e3 as e3_module
from demetar.models import egnn as egnn_module
from demetar.models import predict as predict_batch
from demetar.models.base import SYMMETRIES
from demetar.models.equiformer import Equiformer
from demetar.models.et import Et
from demetar.models.heads import Dipole, Extent
from demetar.models.layers import messages_of
from demetar.models.lieconv import LieConv
from demetar.models.nmp import Nmp
from demetar.models.wavescatt import WaveScatt
from demetar.training.evaluator import Evaluator
from demetar.training.experiment import build_experiment
from demetar.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("float64")

POST = dict(
    name="demetar", width=16, num_heads=4, edge_layers=1, node_layers=1, joint_layers=1,
    mlp_ratio=2, num_radial=8,
)  # fmt: skip
SCHNET = dict(name="schnet", width=16, filter_width=12, num_layers=2)
NMP = dict(name="nmp", readout="cls", width=16, rounds=2, set_steps=2, edge_width=12)
ET = dict(name="et", readout="sum", width=16, num_layers=2, num_heads=2, num_radial=8)
SE3 = dict(name="se3_transformer", width=4, num_degrees=2, num_heads=2)
MOLECULES = {
    "default": POST,
    "blog": POST | {"scaling": "blog"},
    "post": POST | {"edge_atoms": False, "pair_bias": False, "scaling": "blog"},
    "shared_node": POST | {"edge_attention": "shared_node"},
    "mean": POST | {"readout": "mean"},
    "dipole": POST | {"readout": "dipole"},
    "extent": POST | {"readout": "extent"},
    "node": POST,
    "environment": POST | {"environment": True},
    "directions": POST | {"directions": 4, "edge_angles": True},
    "edge_angles": POST | {"edge_angles": True, "edge_attention": "shared_node"},
    "along_edges": POST | {"attention": "edges", "edge_attention": "none"},
    "remat": POST | {"remat": True},
    "egnn_qm9": dict(name="egnn", readout="sum", width=16, num_layers=2, attention=True),
    "schnet": SCHNET | {"readout": "sum", "cutoff": 6.0, "gap": 0.5},
    "schnetpack": SCHNET
    | {"readout": "mean", "generation": "schnetpack", "num_radial": 8, "cutoff": 4.0},
    "nmp": NMP | {"edge_layers": 2, "output_width": 10},
    "nmp_pyg": NMP | {"form": "pyg", "edge_layers": 1, "output_width": 16},
    "et": ET,
    "et_vector_cutoff": ET | {"vector_cutoff": True, "readout": "mean"},
    "tfn": dict(name="tfn", readout="max", width=4, num_layers=3, num_degrees=2),
    "se3_transformer": SE3 | {"readout": "mean", "num_layers": 2},
    "equiformer": dict(
        name="equiformer", readout="sum", widths=(8, 4), head_widths=(4, 2), mlp_widths=(12, 6),
        width=16, num_layers=2, num_heads=2, num_radial=8, radial_widths=(8,), average_degree=3.0,
    ),
    "cormorant": dict(
        name="cormorant", readout="sum", width=3, max_order=1, num_levels=2, hidden=16,
        num_trigonometric=1, num_powers=1, hard_cutoff=4.0, soft_cutoff=3.0,
    ),
    "lieconv": dict(name="lieconv", readout="mean", width=16, num_layers=2),
    "wavescatt": dict(name="wavescatt", order=3, rank=4),
}  # fmt: skip
PARTICLES = {
    "none": POST | {"equivariance": "none"},
    "translation": POST | {"equivariance": "translation"},
    "com": POST | {"equivariance": "com"},
    "velocity": POST | {"equivariance": "velocity"},
    "node_only": POST | {"cross_attention": False, "edge_layers": 0},
    "edge_cross": POST | {"edge_layers": 0},
    "e3": dict(name="demetar_e3", width=16, rounds=3, num_invariants=4)
    | dict(field_kernels=2, field_steps=2),
    "egnn": dict(name="egnn", width=16, num_layers=3),
    "linear": dict(name="linear"),
    "deep_set": dict(name="deep_set", width=16, num_layers=2),
    "set_transformer": dict(name="set_transformer", width=16, num_layers=2),
    "tfn_moves": dict(name="tfn", width=4, num_layers=2, num_degrees=2),
    "se3_moves": SE3 | {"num_layers": 1},
}
VARIANTS = MOLECULES | PARTICLES
# Another option or task of a class that is tested anyway, of whose code they share most.
LIKE_OTHERS = ("schnetpack", "nmp_pyg", "et_vector_cutoff", "se3_transformer", "tfn_moves")
LIKE_OTHERS += ("post", "remat", "translation", "com")
# They see all edges alike, as published.
BLIND_TO_BONDS = ("egnn", "schnet", "et", "equiformer", "cormorant", "lieconv", "wavescatt")
# Published parameters that reach no output, as the models' docstrings say.
WEIGHTLESS = {
    Et: r"layer_0/vector/kernel|gated_1/vector_2/kernel",
    Equiformer: r"block_1/(attention/(out|value)|hidden)/order_1/kernel",
    LieConv: r"atom_embedding/bias|block_\d/(convolution/weight_\d|reduce|expand)/bias",
}
# What a mirror changes is a product of many weights: larger ones make it visible.
SMALL_HANDEDNESS = ("equiformer", "se3_transformer")
GRID = Scattering((9, 8, 7), J=0, L=1, sigma=1.0, powers=(1.0, 2.0), pixels_per_angstrom=0.7)


def cases(variants=VARIANTS, like_others=LIKE_OTHERS):
    """Variants to test; those of `like_others` on demand."""
    slow = lambda name: [pytest.mark.slow] if name in like_others else []
    return [pytest.param(name, marks=slow(name)) for name in variants]


ELEMENTS = (1, 6, 7, 8, 9, 16, 17, 35)
GRAPH_TARGETS = (Target("first", "eV", readout="cls"), Target("second", "eV"))
NODE_TARGETS = (Target("own", "e", readout="node"), Target("sum", "eV"))
POSITIONS = (Target("position", "length", readout="position", normalization="none"),)


def model_of(variant, **more):
    """A small model."""
    options = {"dtype": "float64"} | VARIANTS[variant] | more
    particles = variant in PARTICLES
    targets = POSITIONS if particles else NODE_TARGETS if variant == "node" else GRAPH_TARGETS
    return create_model(targets=targets, facts={"elements": ELEMENTS, "horizon": 0.7}, **options)


def build(variant="default", **more):
    """A small model and random weights: a zero in the initial ones could hide a broken path."""
    model = model_of(variant, **more)
    example = graph_for(model, np.random.default_rng(0))
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    rng = np.random.default_rng(1)
    gain = 2 if variant in SMALL_HANDEDNESS else 1
    scale = lambda s: gain / np.sqrt((s.shape or (1,))[0])
    draw = lambda s: (rng.normal(size=s.shape) * scale(s)).astype(s.dtype)
    return model, jax.tree.map(draw, shapes["params"])


def graph_for(model, *arguments, **options):
    graph = random_graph(*arguments, particles=model.position is not None, **options)
    return described(model, graph)


def described(model, graph):
    """The graph with what some models read in place of atoms, made of its atoms and positions."""
    if isinstance(model, Nmp):
        number_Nx1 = graph.atomic_number[:, None]
        features = np.concatenate([number_Nx1 == np.array(ELEMENTS), number_Nx1 / 10], axis=1)
        return graph.replace(node_feature=features)
    if isinstance(model, WaveScatt):
        found = scattering(graph.position, np.where(graph.node_mask, graph.atomic_number, 0))
        return graph.replace(graph_feature=np.asarray(found) / 100)
    return graph


scattering = jax.jit(functools.partial(coefficients, scattering=GRID))


predict = jax.jit(apply_one, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, graph):
    """(A loss, predictions), and the gradients by parameters and positions.

    The one program that is compiled for each model: `output` takes its predictions from here.
    """

    def loss(p, x):
        predictions = apply_one(model, p, graph.replace(position=x))
        return sum((value**2).sum() for value in predictions.values()), predictions

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, graph.position)


def output(model, params, graph):
    """Targets of the graph, [T]; or of its nodes, [N] or [N, 3], if there is one."""
    (_, predictions), _ = loss_and_gradients(model, params, described(model, graph))
    return in_one_array(model, predictions)


def in_one_array(model, predictions):
    of_nodes = [t.name for t in model.targets if t.per_node]
    if of_nodes:
        return np.asarray(predictions[of_nodes[0]])
    return np.stack([predictions[t.name] for t in model.targets])


def turn(rng, reflect):
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    if (np.linalg.det(q) < 0) != reflect:
        q[:, 0] *= -1
    return q


def moved(graph, rotation, shift=0.0):
    """The graph, turned and shifted."""
    turned = graph.replace(position=graph.position @ rotation.T + shift)
    if graph.velocity is None:
        return turned
    return turned.replace(velocity=graph.velocity @ rotation.T)


def permuted(graph, rng):
    """The same graph with its real atoms and edges in another order, and edges turned round."""
    n, e = int(graph.node_mask.sum()), int(graph.edge_mask.sum())
    atoms, edges = rng.permutation(n), rng.permutation(e)
    place = np.argsort(atoms)
    if graph.velocity is not None:
        rows = np.concatenate([atoms, np.arange(n, len(graph.node_mask))])
        graph = graph.replace(velocity=graph.velocity[rows], charge=graph.charge[rows])
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
    swap = rng.random(e) < 0.5
    new.senders[:e], new.receivers[:e] = np.where(swap, r, s), np.where(swap, s, r)
    new.edge_type[:e] = graph.edge_type[edges]
    return new, atoms


@pytest.fixture(params=cases())
def model_and_params(request):
    return build(request.param)


def test_registry_holds_what_is_tested():
    assert set(MODELS) == {options["name"] for options in VARIANTS.values()}


def check_symmetries(model, params):
    """What a model declares holds to 1e-10; what it does not declare fails."""
    rng = np.random.default_rng(3)
    graph = graph_for(model, rng)
    n = int(graph.node_mask.sum())
    before = output(model, params, graph)
    turns, of_nodes = before.ndim == 2, model.targets[0].per_node
    moves = model.targets[0].readout == "position"  # other vectors turn, but do not shift
    rotation, reflection, shift = turn(rng, False), turn(rng, True), rng.normal(size=3) * 10
    permutation, atoms = permuted(graph, rng)
    after = lambda changed: output(model, params, changed)[: n if of_nodes else None]
    before = before[:n] if of_nodes else before
    # Positions turn and shift with the input; numbers of graphs and nodes stay.
    expected = {
        "rotation": before @ rotation.T if turns else before,
        "reflection": before @ reflection.T if turns else before,
        "translation": before + shift if moves else before,
        "permutation": before[atoms] if of_nodes else before,
    }
    found = {
        "rotation": after(moved(graph, rotation)),
        "reflection": after(moved(graph, reflection)),
        "translation": after(moved(graph, np.eye(3), shift)),
        "permutation": after(permutation),
    }
    assert model.symmetries <= SYMMETRIES
    for name in SYMMETRIES:
        difference = np.abs(found[name] - expected[name]).max()
        if name in model.symmetries:
            assert difference < 1e-10 * max(1, np.abs(expected[name]).max()), (name, difference)
        else:
            assert difference > 1e-6, (name, difference)


def test_declared_symmetries_hold_and_others_fail(model_and_params):
    check_symmetries(*model_and_params)


def test_all_of_e3_is_declared_where_it_matters():
    for variant in ("default", "com", "velocity", "e3", "egnn", "egnn_qm9"):
        assert build(variant)[0].symmetries == SYMMETRIES


@pytest.mark.parametrize("variant", cases(MOLECULES))
def test_depends_on_geometry_types_and_bonds(variant):
    """What is no symmetry must change the output, or the suite above would prove nothing."""
    model, params = build(variant)
    rng = np.random.default_rng(4)
    graph = graph_for(model, rng)
    expected = output(model, params, graph)
    changes = {
        "shape": graph.replace(position=graph.position * [1.1, 1.0, 0.9]),
        "atoms": graph.replace(
            atomic_number=np.roll(graph.atomic_number[:7], 1).repeat([1] * 6 + [4])
        ),
    }
    if variant != "lieconv":  # its normalisation within a graph takes the size away
        changes["size"] = graph.replace(position=graph.position * 1.1)
    if VARIANTS[variant]["name"] not in BLIND_TO_BONDS:
        changes["bonds"] = graph.replace(edge_type=(graph.edge_type + 1) % 5)
    for name, changed in changes.items():
        assert np.abs(output(model, params, changed) - expected).max() > 1e-6, name


@pytest.mark.parametrize("variant", cases(MOLECULES))
def test_every_element_of_the_data_is_told_apart(variant):
    """No two share a row: sulphur is not chlorine, and bromine not a missing one."""
    model, params = build(variant)
    graph = graph_for(model, np.random.default_rng(4))
    first = np.arange(len(graph.atomic_number)) == 0
    outputs = [
        output(model, params, graph.replace(atomic_number=np.where(first, z, graph.atomic_number)))
        for z in ELEMENTS
    ]
    for k, one in enumerate(outputs):
        for other in outputs[:k]:
            assert np.abs(one - other).max() > 1e-6


@pytest.mark.parametrize("variant", cases(sorted(set(PARTICLES) - {"linear"})))
def test_depends_on_positions_velocities_and_charges(variant):
    model, params = build(variant)
    rng = np.random.default_rng(4)
    graph = random_graph(rng, particles=True)
    n = int(graph.node_mask.sum())
    step = lambda g: (output(model, params, g) - g.position)[:n]  # a mere copy of x is no use
    expected = step(graph)
    one = np.arange(len(graph.charge)) == 0
    changes = {
        "scale": graph.replace(position=graph.position * 1.1),
        "velocity": graph.replace(velocity=graph.velocity * 1.1),
        "charge": graph.replace(charge=np.where(one, -graph.charge, graph.charge)),
    }
    if "egnn" in variant or variant == "e3":  # a force on a particle at rest, out of the plane
        changes["at rest"] = graph.replace(velocity=np.zeros_like(graph.velocity))
    for name, changed in changes.items():
        assert np.abs(step(changed) - expected).max() > 1e-6, name


def test_e3_moves_the_centre_of_mass_freely_and_sees_products_of_charges():
    """Equal and opposite moves; the same for a moving observer; charges enter as products."""
    model, params = build("e3")
    graph = random_graph(np.random.default_rng(13), particles=True)
    n = int(graph.node_mask.sum())
    after = output(model, params, graph)[:n]
    free = (graph.position + 0.7 * graph.velocity)[:n]
    np.testing.assert_allclose(after.mean(axis=0), free.mean(axis=0), atol=1e-12)
    boost = np.array([0.3, -1.0, 2.0])
    boosted = graph.replace(velocity=graph.velocity + boost)
    np.testing.assert_allclose(output(model, params, boosted)[:n], after + 0.7 * boost, atol=1e-12)
    flipped = output(model, params, graph.replace(charge=-graph.charge))
    np.testing.assert_array_equal(flipped[:n], after)


@pytest.mark.parametrize(
    "broken",
    [
        "inverted_mask",
        "elementwise_gate",
        *(
            pytest.param(b, marks=pytest.mark.slow)
            for b in ("direction", "position", "one_sided_move")
        ),
    ],
)
def test_a_broken_model_fails_the_suite(broken, monkeypatch):
    # Each has a size of its own, so that none meets the compiled program of a whole model.
    if broken == "direction":  # an edge's feature depends on which end is the sender
        monkeypatch.setattr(demetar_module, "_share_a_node", lambda s, r: s[:, None] < r[None])
        check, broken_model = check_symmetries, build("shared_node", radial_cutoff=4.1)
    elif broken == "inverted_mask":  # the post's own defect: attends to padding only
        monkeypatch.setattr(demetar_module, "mask_bias", lambda m: jnp.where(m, -1e30, 0.0))
        check, broken_model = check_padding, build(radial_cutoff=4.2)
    elif broken == "position":  # a feature that is not invariant
        monkeypatch.setattr(demetar_module, "safe_norm", lambda x: x[..., 0])
        check, broken_model = check_symmetries, build(radial_cutoff=4.3)
    elif broken == "elementwise_gate":  # the post's own defect: three gates times a 3-vector
        mlp = demetar_module.Mlp
        monkeypatch.setattr(
            demetar_module, "Mlp", lambda hidden, features, *a, **k: mlp(hidden, 3, *a, **k)
        )
        check, broken_model = check_symmetries, build("velocity", radial_cutoff=4.4)
    else:  # an edge moves one of its ends alone: which, depends on their order
        segment_sum = jax.ops.segment_sum
        half = lambda a: a[: len(a) // 2]
        one_end = lambda x, ends, n: (
            segment_sum(half(x), half(ends), n) if x.shape[-1] == 6 else segment_sum(x, ends, n)
        )
        monkeypatch.setattr(e3_module.jax.ops, "segment_sum", one_end)
        check, broken_model = check_symmetries, build("e3", rounds=4)
    with pytest.raises(AssertionError):
        check(*broken_model)


# These share every mask with another variant of their class.
SAME_MASKS = (*LIKE_OTHERS, "blog", "post", "remat", "none", "translation", "com")


@pytest.mark.parametrize("variant", cases(like_others=SAME_MASKS))
def test_batch_equals_singles(variant):
    model, params = build(variant)
    rng = np.random.default_rng(5)
    graphs = [graph_for(model, rng, n, e) for n, e in ((7, 9), (10, 14), (1, 0), (2, 1))]
    batch = jax.tree.map(lambda *x: np.stack(x), *graphs)
    batched = jax.jit(jax.vmap(lambda g: model.apply({"params": params}, g)))(batch)
    alone = [loss_and_gradients(model, params, g)[0][1] for g in graphs]
    for target in model.targets:
        singles = np.stack([found[target.name] for found in alone])
        np.testing.assert_allclose(batched[target.name], singles, rtol=1e-10, atol=1e-12)


def check_padding(model, params):
    small = graph_for(model, np.random.default_rng(6))  # of the shape that all tests share
    large = graph_for(model, np.random.default_rng(6), bucket=Bucket(29, 40))
    few, many = output(model, params, small), in_one_array(model, predict(model, params, large))
    np.testing.assert_allclose(few, many[: len(few)], rtol=1e-10, atol=1e-11)
    assert not many[len(few) :].any()  # of nodes that are not there


@pytest.mark.parametrize("variant", cases(like_others=SAME_MASKS))
def test_amount_of_padding_does_not_matter(variant):
    check_padding(*build(variant))


def test_junk_in_padding_changes_no_bit(model_and_params):
    model, params = model_and_params
    graph = graph_for(model, np.random.default_rng(7))
    clean = jax.tree.leaves(loss_and_gradients(model, params, graph))
    fill = lambda x, mask: np.where(mask, x, 3).astype(x.dtype)
    for junk in (7.0, np.nan, np.inf):
        junky = graph.replace(
            position=np.where(graph.node_mask[:, None], graph.position, junk),
            atomic_number=fill(graph.atomic_number, graph.node_mask),
            senders=fill(graph.senders, graph.edge_mask),
            receivers=fill(graph.receivers, graph.edge_mask),
            edge_type=fill(graph.edge_type, graph.edge_mask),
        )
        if graph.velocity is not None:
            velocity = np.where(graph.node_mask[:, None], graph.velocity, junk)
            charge = np.where(graph.node_mask, graph.charge, junk)
            junky = junky.replace(velocity=velocity, charge=charge)
        if graph.node_feature is not None:
            mask_Nx1 = graph.node_mask[:, None]
            junky = junky.replace(node_feature=np.where(mask_Nx1, graph.node_feature, junk))
        dirty = jax.tree.leaves(loss_and_gradients(model, params, junky))
        for a, b in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{junk}")


def test_finite_output_and_gradients(model_and_params):
    model, params = model_and_params
    rng = np.random.default_rng(8)
    graph = graph_for(model, rng)
    cases = {
        "one atom": graph_for(model, rng, 1, 0),
        "coincident atoms": graph.replace(position=np.ones_like(graph.position)),
        "no edges": graph_for(model, rng, 5, 0),
        "all padding": jax.tree.map(np.zeros_like, graph),
    }
    for name, case in cases.items():
        for leaf in jax.tree.leaves(loss_and_gradients(model, params, case)):
            assert np.isfinite(leaf).all(), name


@pytest.mark.parametrize("variant", ["default", "egnn"])
def test_jit_equals_no_jit(variant):
    model, params = build(
        variant, **({"node_layers": 0, "edge_layers": 0} if variant == "default" else {})
    )
    graph = graph_for(model, np.random.default_rng(9))
    for name, value in apply_one(model, params, graph).items():
        np.testing.assert_allclose(
            value, predict(model, params, graph)[name], rtol=1e-12, atol=1e-12
        )


def test_every_parameter_matters(model_and_params):
    """A dead branch (the post's code threw its edge encoder away) would have zero gradient."""
    model, params = model_and_params
    graph = graph_for(model, np.random.default_rng(10))
    _, (grad, _) = loss_and_gradients(model, params, graph)
    weightless = WEIGHTLESS.get(type(model), "(?!)")
    for path, leaf in jax.tree_util.tree_leaves_with_path(grad):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matters = np.abs(leaf).max() > 1e-12
        assert matters != bool(re.fullmatch(weightless, name)), name


def complete_graph(rng, num_nodes=7):
    """All pairs are edges; padded to ten nodes."""
    bucket = Bucket(10, num_nodes * (num_nodes - 1) // 2 + 3)
    return random_graph(rng, num_nodes, num_nodes * (num_nodes - 1) // 2, bucket)


@pytest.mark.parametrize("pair_bias", [False, True])
def test_attention_along_all_edges_is_attention_over_all_pairs(pair_bias):
    """The layout for large graphs computes the same: on a complete graph, number for number."""
    options = {"edge_attention": "none", "pair_bias": pair_bias}
    (everywhere, params), (along, _) = (
        build("default", attention=attention, **options) for attention in ("all", "edges")
    )
    graph = complete_graph(np.random.default_rng(14))
    expected = loss_and_gradients(everywhere, params, graph)
    found = loss_and_gradients(along, params, graph)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["default", "egnn_qm9", "e3"])
def test_remat_changes_nothing(variant):
    model, params = build(variant, remat=False)
    again, _ = build(variant, remat=True)
    graph = graph_for(model, np.random.default_rng(16))
    plain = loss_and_gradients(model, params, graph)
    for a, b in zip(
        jax.tree.leaves(plain),
        jax.tree.leaves(loss_and_gradients(again, params, graph)),
        strict=True,
    ):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_number_of_a_model_has_a_range(variant):
    options = option_defaults(VARIANTS[variant]["name"])
    bad = {int: (-1,), float: (math.nan, -1.0, math.inf), tuple: ((0,), ("a",))}
    for option, default in options.items():
        for value in bad.get(type(default), ()):
            with pytest.raises(UserError, match=f"config.model.{option}|Unknown"):
                model_of(variant, **{option: value})
    for option in {"width", "num_heads", "num_radial"} & options.keys():
        with pytest.raises(UserError, match=f"config.model.{option} is 0, but must be a whole"):
            model_of(variant, **{option: 0})


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_least_of_each_option_builds(variant):
    """What a message says is allowed is: no traceback."""
    model = model_of(variant)
    for option, least in type(model).LEAST.items():
        build(variant, **{option: least})
        with pytest.raises(UserError, match=f"config.model.{option} is {least - 1}, but"):
            model_of(variant, **{option: least - 1})
    if "node_layers" in model.LEAST:
        model, params = build(variant, node_layers=0, joint_layers=0)
        graph = graph_for(model, np.random.default_rng(0))
        assert all(np.isfinite(x).all() for x in model.apply({"params": params}, graph).values())


@pytest.mark.parametrize(
    "options", [{"environment": True, "edge_attention": "none"}, {"edge_attention": "full"}, {}]
)
def test_attention_along_edges_refuses_what_looks_at_all_pairs(options):
    with pytest.raises(UserError, match="looks at pairs: set it to"):
        build("default", attention="edges", **options)


def test_split_edge_layer_is_the_joined_one():
    """W [h_i, h_j, s] = W_1 h_i + W_2 h_j + w_3 s: EGNN's first layer, never concatenated."""
    rng = np.random.default_rng(17)
    graph = random_graph(rng)
    messages = messages_of(graph)
    h_NxD = rng.normal(size=(len(graph.node_mask), 4))
    s_Mx1 = rng.normal(size=messages.mask_Mx1.shape)
    w_1, w_2, w_3 = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.normal(size=(1, 6))
    ends = np.concatenate([h_NxD[messages.receiver_M], h_NxD[messages.sender_M], s_Mx1], axis=1)
    joined = ends @ np.vstack([w_1, w_2, w_3])
    split = messages.of_receiver(h_NxD @ w_1) + messages.of_sender(h_NxD @ w_2)
    scalars = egnn_module._Scalars(6, 9, jnp.float64)
    split += scalars.apply({"params": {"kernel": w_3}}, [s_Mx1])
    np.testing.assert_allclose(split, joined, rtol=1e-12)


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


# --- training ------------------------------------------------------------------------------------

COARSE = {"shape": (21, 17, 15), "J": 1, "L": 1, "pixels_per_angstrom": 1.0}
# System -> variant of configs/qm9.py, changes.
COMPARED = {
    name: (f"qm9:{name},smoke", {})
    for name in "schnet nmp et tfn se3_transformer equiformer cormorant lieconv".split()
}
# The smallest of the config has too few weights for all of sixteen molecules.
COMPARED["tfn"] = ("qm9:tfn,smoke", {"model.width": 8, "model.num_layers": 3})
COMPARED["wavescatt"] = (
    "qm9:wavescatt,smoke",
    {f"data.scattering.{key}": value for key, value in COARSE.items()},
)


def experiment_of(system, cache_dir, **more):
    text, changes = COMPARED[system]
    return build_experiment(load_config(text, changes | {"data.cache_dir": cache_dir} | more))


@pytest.mark.slow
@pytest.mark.parametrize("system", COMPARED)
def test_a_compared_system_overfits_sixteen_molecules(system, cache_dir):
    """To below 5 % of what predicting their median errs."""
    with jax.enable_x64(False):
        trainer = Trainer(experiment_of(system, cache_dir))
        model, batch = trainer.experiment.model, trainer.gather(0)[1]
        labels = np.asarray(batch.labels["homo"])
        assert len(labels) == 16
        trivial = np.abs(labels - np.median(labels)).mean()
        steps, chunk = 3_000, 100
        adam = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
        )

        def error(params):
            return jnp.abs(predict_batch(model, params, batch)["homo"] - labels).mean()

        def step(carry, _):
            params, slots = carry
            value, gradients = jax.value_and_grad(error)(params)
            updates, slots = adam.update(gradients, slots)
            return (optax.apply_updates(params, updates), slots), value

        some_steps = jax.jit(lambda carry: jax.lax.scan(step, carry, length=chunk))
        params = jax.device_get(trainer.experiment.create_state().params)
        carry = params, adam.init(params)
        for _ in range(steps // chunk):
            carry, values = some_steps(carry)
            if values[-1] < 0.05 * trivial:
                return
    raise AssertionError(f"after {steps} steps {values[-1] / trivial:.1%} of the trivial error")


@pytest.mark.slow
@pytest.mark.parametrize("system", COMPARED)
def test_a_compared_system_trains_and_is_evaluated_by_its_config(system, cache_dir):
    with jax.enable_x64(False):
        experiment = experiment_of(system, cache_dir)
        trainer, state = Trainer(experiment), experiment.create_state()
        for bucket, graphs in trainer.batches(range(3)):
            state, sums = trainer.step(state, bucket, trainer.to_devices(graphs))
            assert np.isfinite(sums.loss) and np.isfinite(sums.grad_norm) and sums.grad_norm > 0
        outcome = Evaluator(experiment).run(state.ema, "validation")
    assert np.isfinite(outcome.score) and outcome.count == len(
        experiment.dataset.split["validation"]
    )


# --- read-outs with the form of their quantity ---------------------------------------------------


def head_inputs(num_atoms=6):
    rng = np.random.default_rng(20)
    token_NxD, relative_Nx3 = rng.normal(size=(num_atoms, 8)), rng.normal(size=(num_atoms, 3))
    return relative_Nx3, np.ones(num_atoms, bool), token_NxD, rng.normal(size=(num_atoms, 3, 4))


def test_a_dipole_is_of_neutral_molecules_and_of_their_form(float64):
    position, mask, token, vector = head_inputs()
    head = Dipole(8, jnp.float64)
    params = head.init(jax.random.key(0), position, mask, token, vector)
    of = jax.jit(lambda *inputs: head.apply(params, *inputs))
    value = of(position, mask, token, vector)
    shifted = of(position + np.array([1.0, -2.0, 3.0]), mask, token, vector)
    np.testing.assert_allclose(shifted, value, rtol=1e-12)  # no charge is left over
    np.testing.assert_allclose(of(2 * position, mask, token, 2 * vector), 2 * value, rtol=1e-12)
    # Each atom has a twin on the other side: nothing but the constant is left.
    twins = (np.concatenate([position, -position]), np.tile(mask, 2), np.tile(token, (2, 1)))
    assert abs(of(*twins, np.concatenate([vector, -vector]))) < 1e-12 < 1e-3 < value


def test_an_extent_grows_with_squared_distances(float64):
    position, mask, token, _ = head_inputs()
    head = Extent(8, 2.0, jnp.float64)
    params = head.init(jax.random.key(0), position, mask, token)
    at_0, at_1, at_2 = (head.apply(params, scale * position, mask, token) for scale in (0, 1, 2))
    np.testing.assert_allclose(at_2 - at_0, 4 * (at_1 - at_0), rtol=1e-12)
    assert abs(at_1 - at_0) > 1e-3
