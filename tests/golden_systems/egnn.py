"""EGNN: particles and molecules. The files have a loss of their own, and no options in words."""

import jax.numpy as jnp
import numpy as np

from data_pipelines.graph import Graph
from data_pipelines.nbody import POSITION
from demetar.models.egnn import Egnn
from golden_systems.common import ELEMENTS, TARGET, System, molecules

LAYER = {
    "edge_mlp.2": "edge_1",
    "node_mlp.0": "node_0",
    "node_mlp.2": "node_1",
    "coord_mlp.0": "position_0",
    "coord_mlp.2": "position_1",
    "coord_mlp_vel.0": "velocity_0",
    "coord_mlp_vel.2": "velocity_1",
    "att_mlp.0": "attention",
}
ENDS = {
    "embedding": "embedding",
    "node_dec.0": "node_0",
    "node_dec.2": "node_1",
    "graph_dec.0": "graph_0",
    "graph_dec.2": "graph_1",
}


def model(golden, meta, target):
    layers = {name.split(".")[0] for name in golden if name.startswith("param/gcl_")}
    return Egnn(
        targets=(target,),
        elements=ELEMENTS,
        width=len(golden["param/embedding.weight"]),
        num_layers=len(layers),
        attention="param/gcl_0.att_mlp.0.weight" in golden,
        dtype=np.float64,
    )


def official(params, golden, meta):
    flat = {}

    def dense(prefix, names, ours):
        for name, own in names.items():
            if own in ours:
                flat[f"{prefix}{name}.weight"] = ours[own]["kernel"].T
                if "bias" in ours[own]:
                    flat[f"{prefix}{name}.bias"] = ours[own]["bias"]

    dense("", ENDS, params)
    for layer in filter(lambda name: name.startswith("layer_"), params):
        prefix, leaves = layer.replace("layer", "gcl"), params[layer]
        first = [leaves[name]["kernel"] for name in ("edge_to", "edge_from", "edge_scalars")]
        flat[f"{prefix}.edge_mlp.0.weight"] = jnp.concatenate(first).T
        flat[f"{prefix}.edge_mlp.0.bias"] = leaves["edge_to"]["bias"]
        dense(f"{prefix}.", LAYER, leaves)
    return flat


def particles(golden, meta):
    """The systems of the file, one after the other in flat arrays: complete graphs."""
    nodes = len(golden["receivers"]) // len(golden["position"]) + 1
    shape = lambda x: x.reshape(-1, nodes, *x.shape[1:])
    position = shape(golden["position"])
    num = len(position)
    i, j = np.triu_indices(nodes, 1)
    tile = lambda x: np.tile(x, (num, 1))
    return Graph(
        position=position,
        velocity=shape(golden["velocity"]),
        charge=shape(golden["charge"]),
        atomic_number=np.ones((num, nodes), np.int32),
        node_mask=np.ones((num, nodes), bool),
        senders=tile(i),
        receivers=tile(j),
        edge_type=tile(0 * i),
        edge_mask=tile(i >= 0),
        graph_mask=np.ones(num, bool),
        index=np.arange(num),
    )


SYSTEMS = {
    "egnn_nbody": System(
        model=lambda golden, meta: model(golden, meta, POSITION),
        official=official,
        batch=particles,
        output=lambda predictions, batch: predictions["position"].reshape(-1, 3),
        loss=lambda output, golden: jnp.square(output - golden["target"]).mean(),
    ),
    "egnn_qm9": System(
        model=lambda golden, meta: model(golden, meta, TARGET),
        official=official,
        batch=lambda golden, meta: molecules(golden),
        output=lambda predictions, batch: predictions[TARGET.name],
        loss=lambda output, golden: jnp.abs(output - golden["target"]).mean(),
    ),
}
