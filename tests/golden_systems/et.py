"""TorchMD-Net's equivariant transformer."""

import numpy as np

from demetar.models.et import Et
from golden_systems.common import TARGET, System, intermediate

EMBEDDING = {
    "neighbor_embedding.distance_proj": "distance",
    "neighbor_embedding.combine": "combine",
}
LAYER = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "vec_proj": "vector",
    "dk_proj": "distance_key",
    "dv_proj": "distance_value",
}
GATED = {
    "vec1_proj": "vector_1",
    "vec2_proj": "vector_2",
    "update_net.layers.0": "update_0",
    "update_net.layers.2": "update_1",
}


def model(golden, meta):
    options = meta["options"]
    return Et(
        targets=(TARGET,),
        width=options["hidden_channels"],
        num_layers=options["num_layers"],
        num_heads=options["num_heads"],
        num_radial=options["num_rbf"],
        cutoff=options["cutoff_upper"],
        vector_cutoff=options["vector_cutoff"],
        dtype=np.float64,
    )


def official(params, golden, meta):
    flat, heads = {}, meta["options"]["num_heads"]

    def dense(prefix, names, ours):
        for name, own in names.items():
            weights = ours[own]
            if own in ("value", "distance_value"):  # three parts inside of each head
                weights = {key: _parts_in_heads(value, heads) for key, value in weights.items()}
            flat[f"{prefix}{name}.weight"] = weights["kernel"].T
            if "bias" in weights:
                flat[f"{prefix}{name}.bias"] = weights["bias"]

    def norm(name, ours):
        flat[f"{name}.weight"], flat[f"{name}.bias"] = ours["scale"], ours["bias"]

    body, embedding = "representation_model.", params["atom_embedding"]
    flat[f"{body}embedding.weight"] = embedding["element"]["table"]
    flat[f"{body}neighbor_embedding.embedding.weight"] = embedding["other_element"]["table"]
    dense(body, EMBEDDING, embedding)
    for number in range(meta["options"]["num_layers"]):
        prefix, layer = f"{body}attention_layers.{number}.", params[f"layer_{number}"]
        norm(f"{prefix}layernorm", layer["norm"])
        dense(prefix, LAYER, layer)
    norm(f"{body}out_norm", params["norm"])
    for number in range(2):
        dense(f"output_model.output_network.{number}.", GATED, params[f"gated_{number}"])
    return flat


def _parts_in_heads(x, heads):
    """[..., 3 x heads x size] -> [..., heads x 3 x size]."""
    split = x.reshape(*x.shape[:-1], 3, heads, -1)
    return split.swapaxes(-2, -3).reshape(x.shape)


def layers(captured, predictions, batch, golden, meta):
    found = {
        "neighbor_embedding": intermediate(captured, "atom_embedding"),
        "out_norm": intermediate(captured, "norm"),
        "atom": intermediate(captured, "gated_1")[0],
    }
    vector = 0
    for number in range(meta["options"]["num_layers"]):
        scalar, change = intermediate(captured, f"layer_{number}")
        found[f"layer_{number}_change_scalar"] = scalar
        found[f"layer_{number}_change_vector"] = change
        vector = vector + change
    found["gated_0_scalar"], found["gated_0_vector"] = intermediate(captured, "gated_0")
    return found | {"vector": vector}


SYSTEMS = dict.fromkeys(
    ("et", "et_vector_cutoff"), System(model=model, official=official, layers=layers)
)
