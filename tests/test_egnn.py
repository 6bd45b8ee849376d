"""Our EGNN against numbers of the official PyTorch code: same weights, same results.

`golden/egnn_*.npz`: outputs and gradients that the official implementation computed in
float64 from the float32 weights stored beside them; data, not code.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

from data_pipelines.graph import Graph
from data_pipelines.nbody import POSITION
from data_pipelines.targets import Target
from demetar.models import create_model

pytestmark = pytest.mark.usefixtures("float64")
GOLDEN = REPOSITORY / "tests" / "golden"
NAMES = {
    "embedding": "embedding",
    "edge_mlp.2": "edge_1",
    "node_mlp.0": "node_0",
    "node_mlp.2": "node_1",
    "coord_mlp.0": "position_0",
    "coord_mlp.2": "position_1",
    "coord_mlp_vel.0": "velocity_0",
    "coord_mlp_vel.2": "velocity_1",
    "att_mlp.0": "attention",
    "node_dec.0": "node_0",
    "node_dec.2": "node_1",
    "graph_dec.0": "graph_0",
    "graph_dec.2": "graph_1",
}


def official(params: dict, width: int) -> dict[str, np.ndarray]:
    """Our parameters (or gradients) under the official names and in torch's layout."""
    flat = {}
    for layer, leaves in params.items():
        if not layer.startswith("layer_"):
            official_name = {v: k for k, v in NAMES.items() if "_mlp" not in k}[layer]
            flat[f"{official_name}.weight"] = leaves["kernel"].T
            flat[f"{official_name}.bias"] = leaves["bias"]
            continue
        prefix = layer.replace("layer", "gcl")
        first = [leaves[name]["kernel"] for name in ("edge_to", "edge_from", "edge_scalars")]
        flat[f"{prefix}.edge_mlp.0.weight"] = jnp.concatenate(first).T
        flat[f"{prefix}.edge_mlp.0.bias"] = leaves["edge_to"]["bias"]
        for name, ours in NAMES.items():
            if "_mlp" in name and ours in leaves:
                flat[f"{prefix}.{name}.weight"] = leaves[ours]["kernel"].T
                if "bias" in leaves[ours]:
                    flat[f"{prefix}.{name}.bias"] = leaves[ours]["bias"]
    return flat


def load_weights(shapes: dict, golden, width: int) -> dict:
    """The official weights in our tree, by inverting `official` on numbered parameters."""
    counter = iter(range(10**6))
    numbered = jax.tree.map(
        lambda s: np.array([next(counter) for _ in range(s.size)]).reshape(s.shape), shapes
    )
    values = np.full(next(counter), np.nan)
    for name, numbers in official(numbered, width).items():
        values[np.asarray(numbers).ravel()] = golden[f"param/{name}"].astype(float).ravel()
    assert not np.isnan(values).any()
    return jax.tree.map(lambda numbers: jnp.asarray(values[numbers]), numbered)


def nbody_batch(golden) -> Graph:
    i, j = np.triu_indices(5, 1)
    shape = lambda x: x.reshape(6, 5, *x.shape[1:])
    tile = lambda x: np.tile(x, (6, 1))
    return Graph(
        position=shape(golden["position"]),
        velocity=shape(golden["velocity"]),
        charge=shape(golden["charge"]),
        labels={"position": shape(golden["target"])},
        atomic_number=np.ones((6, 5), np.int32),
        node_mask=np.ones((6, 5), bool),
        senders=tile(i),
        receivers=tile(j),
        edge_type=tile(0 * i),
        edge_mask=tile(i >= 0),
        graph_mask=np.ones(6, bool),
        index=np.arange(6),
    )


def test_nbody_predictions_and_gradients_equal_the_official_ones():
    golden = np.load(GOLDEN / "egnn_nbody.npz")
    batch = nbody_batch(golden)
    facts = {"elements": (1,)}
    options = {"name": "egnn", "dtype": "float64"}
    model = create_model(targets=(POSITION,), facts=facts, width=64, num_layers=4, **options)
    one = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    params = load_weights(shapes, golden, 64)

    def loss(params):
        predictions = jax.vmap(lambda graph: model.apply({"params": params}, graph))(batch)
        prediction = predictions["position"]
        return jnp.square(prediction - batch.labels["position"]).mean(), prediction

    (value, prediction), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(prediction.reshape(30, 3), golden["prediction"], rtol=1e-9)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-9)
    compared = 0
    for name, ours in official(grad, 64).items():
        theirs = golden[f"grad/{name}"]
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max(), err_msg=name
        )
        compared += 1
    theirs = {k for k in golden.files if k.startswith("grad/") and np.abs(golden[k]).max() > 0}
    assert compared == len(theirs)


def test_qm9_predictions_and_gradients_equal_the_official_ones():
    golden = np.load(GOLDEN / "egnn_qm9.npz")
    num, n = golden["atomic_number"].shape
    i, j = np.triu_indices(n, 1)
    mask = golden["node_mask"] > 0
    batch = Graph(
        position=golden["position"],
        labels={"homo": golden["target"]},
        atomic_number=golden["atomic_number"].astype(np.int32),
        node_mask=mask,
        senders=np.tile(i, (num, 1)),
        receivers=np.tile(j, (num, 1)),
        edge_type=np.zeros((num, len(i)), np.int32),
        edge_mask=mask[:, i] & mask[:, j],
        graph_mask=np.ones(num, bool),
        index=golden["index"],
    )
    targets, facts = (Target("homo", "meV"),), {"elements": (1, 6, 7, 8, 9)}
    options = {"name": "egnn", "dtype": "float64", "attention": True}
    model = create_model(targets=targets, facts=facts, width=128, num_layers=7, **options)
    one = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)["params"]
    params = load_weights(shapes, golden, 128)

    def loss(params):
        predictions = jax.vmap(lambda graph: model.apply({"params": params}, graph))(batch)
        prediction = predictions["homo"]
        return jnp.abs(prediction - batch.labels["homo"]).mean(), prediction

    (value, prediction), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(prediction, golden["prediction"], rtol=1e-9)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-9)
    ours = official(grad, 128)
    theirs = [k.removeprefix("gradnorm/") for k in golden.files if k.startswith("gradnorm/")]
    assert set(ours) == set(theirs)
    for name in theirs:
        norm = np.linalg.norm(ours[name])
        np.testing.assert_allclose(norm, golden[f"gradnorm/{name}"], rtol=1e-9, err_msg=name)
