"""Equiformer: a linear layer's matrices, one of each order, are one vector in the official code.

The official features are one vector of an atom: for each order l, channel by channel.
"""

import re

import jax.numpy as jnp
import numpy as np

from demetar.models.equiformer import Equiformer

from .common import ELEMENTS, TARGET, System, intermediate


def widths(irreps):
    """Channels of each order in e3nn's words: "8x0e+4x1e+2x2e"."""
    return tuple(int(mul) for mul in re.findall(r"(\d+)x\d+e", irreps))


def model(golden, meta):
    options = meta["options"]
    return Equiformer(
        targets=(TARGET,),
        elements=ELEMENTS,
        widths=widths(options["irreps_node_embedding"]),
        head_widths=widths(options["irreps_head"]),
        mlp_widths=widths(options["irreps_mlp_mid"]),
        width=widths(options["irreps_feature"])[0],
        num_layers=options["num_layers"],
        num_heads=options["num_heads"],
        num_radial=options["number_of_basis"],
        radial_widths=tuple(options["fc_neurons"]),
        cutoff=options["max_radius"],
        average_degree=meta["avg_degree"],
        average_nodes=meta["avg_num_nodes"],
        dtype=jnp.float64,
    )


def official(params, golden, meta):
    out = {}

    def linear(name, ours):
        matrices = [ours[order]["kernel"].reshape(-1) for order in sorted(ours)]
        out[f"{name}.tp.weight"] = np.concatenate(matrices)
        if "bias" in ours["order_0"]:
            out[f"{name}.bias.0"] = ours["order_0"]["bias"]

    def norm(name, ours, weight, bias):
        out[f"{name}.{weight}"], out[f"{name}.{bias}"] = ours["weight"], ours["bias"]

    def radial(name, ours):
        number = 0
        while f"hidden_{number}" in ours:
            hidden, normed = ours[f"hidden_{number}"], ours[f"norm_{number}"]
            out[f"{name}.net.{3 * number}.weight"] = hidden["kernel"].T
            out[f"{name}.net.{3 * number}.bias"] = hidden["bias"]
            out[f"{name}.net.{3 * number + 1}.weight"] = normed["scale"]
            out[f"{name}.net.{3 * number + 1}.bias"] = normed["bias"]
            number += 1
        out[f"{name}.net.{3 * number}.weight"] = ours["out"]["kernel"].T
        out[f"{name}.offset"] = ours["offset"]

    for name, ours in {"mean": "mean", "std": "std", "weight": "scale", "bias": "shift"}.items():
        out[f"rbf.{name}"] = params["basis"][ours][None]
    linear("atom_embed.atom_type_lin", {"order_0": params["atom"]})
    degree = params["degree"]
    start = {"kernel": degree["start"], "bias": degree["start_bias"]}
    linear("edge_deg_embed.exp", {"order_0": start})
    radial("edge_deg_embed.rad", degree["radial"])
    linear("edge_deg_embed.proj", degree["out"])
    out["edge_deg_embed.proj.bias.0"] = degree["bias"]
    for number in range(meta["options"]["num_layers"]):
        name, block = f"blocks.{number}", params[f"block_{number}"]
        attention = block["attention"]
        for part, ours in {"norm_1": "norm_attention", "norm_2": "norm_mlp"}.items():
            norm(f"{name}.{part}", block[ours], "affine_weight", "affine_bias")
        out[f"{name}.ga.alpha_dot"] = attention["dot"][None]
        out[f"{name}.ga.sep_value.dtp.tp.weight"] = attention["product"]
        radial(f"{name}.ga.sep_act.dtp_rad", attention["radial"])
        for part, ours in {
            "merge_src": "sender",
            "merge_dst": "receiver",
            "sep_act.lin": "hidden",
            "sep_alpha": "alpha",
            "sep_value.lin": "value",
            "proj": "out",
        }.items():
            linear(f"{name}.ga.{part}", attention[ours])
        linear(f"{name}.ffn.fctp_1", block["hidden"])
        linear(f"{name}.ffn.fctp_2", block["mlp"])
        if "shortcut" in block:
            linear(f"{name}.ffn_shortcut", block["shortcut"])
    norm("norm", params["norm"], "affine_weight", "affine_bias")
    linear("head.0", params["read"])
    linear("head.2", params["out"])
    return out


def layers(captured, predictions, batch, golden, meta):
    def flat(features):
        """[B, N, 2 l + 1, C] of each l -> [B, N, everything]."""
        rows = [x.swapaxes(-1, -2).reshape(*x.shape[:2], -1) for x in features]
        return jnp.concatenate(rows, axis=-1)

    scalars = intermediate(captured, "atom")
    zeros = jnp.zeros((*scalars.shape[:2], golden["atom_embedding"].shape[-1] - scalars.shape[-1]))
    out = {
        "atom_embedding": jnp.concatenate([scalars, zeros], axis=-1),
        "degree_embedding": flat(intermediate(captured, "degree")),
        "norm": flat(intermediate(captured, "norm")),
    }
    for number in range(meta["options"]["num_layers"]):
        out[f"attention_{number}"] = flat(intermediate(captured, f"block_{number}/attention"))
        out[f"block_{number}"] = flat(intermediate(captured, f"block_{number}"))
    # The first atom's edges are those of the first graph that begin at its first atom.
    basis = intermediate(captured, "basis")[0]
    out["rbf_of_first_atom"] = basis[: len(golden["rbf_of_first_atom"])]
    return out


SYSTEMS = {"equiformer": System(model, official, layers=layers)}
