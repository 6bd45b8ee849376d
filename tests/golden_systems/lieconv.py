"""LieConv, T(3)."""

import dataclasses

import numpy as np

from demetar.models.lieconv import LieConv
from golden_systems.common import BATCH_AXIS, TARGET, System, intermediate

DENSE = {"net.2.module": "reduce", "net.8.module": "expand", "conv.linear": "convolution/out"}
NORMS = {"net.0": "norm_in", "net.3": "norm_0", "net.6": "norm_1"}
for number in range(3):
    DENSE[f"conv.weightnet.{3 * number}.module"] = f"convolution/weight_{number}"
    NORMS[f"conv.weightnet.{3 * number + 1}"] = f"convolution/norm_{number}"


class LieConvOfBatch(LieConv):
    """With statistics over the batch, as the official code trains."""

    batch_axis = BATCH_AXIS


def model(golden, meta, model_class=LieConv):
    options = meta["options"]
    assert options["bn"] and meta["group"] == "T(3)"
    target = dataclasses.replace(TARGET, readout="mean" if options["mean"] else "sum")
    return model_class(
        targets=(target,),
        elements=(1, 6, 7, 8, meta["charge_scale"]),
        width=options["k"],
        num_layers=options["num_layers"],
        radius=meta["radius"] / meta["alpha"],
        dtype=np.float64,
    )


def official(params, golden, meta):
    flat, last = {}, meta["options"]["num_layers"] + 1

    def dense(name, ours):
        flat[f"{name}.weight"], flat[f"{name}.bias"] = ours["kernel"].T, ours["bias"]

    dense("net.0.module", params["atom_embedding"])
    dense(f"net.{last + 2}.module", params["head"])
    for name, path in norms(meta).items():
        ours = at(params, path)
        flat[f"{name}.weight"], flat[f"{name}.bias"] = ours["scale"], ours["bias"]
    for number in range(1, last):
        for name, path in DENSE.items():
            dense(f"net.{number}.{name}", at(params, f"block_{number - 1}/{path}"))
    return flat


def norms(meta):
    """Official name of a batch normalisation -> its path in our tree."""
    last = meta["options"]["num_layers"] + 1
    of_blocks = {
        f"net.{number}.{name}": f"block_{number - 1}/{path}"
        for number in range(1, last)
        for name, path in NORMS.items()
    }
    return of_blocks | {f"net.{last}": "norm"}


def at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def variables(golden, meta):
    stats = {}
    for name, path in norms(meta).items():
        here = stats
        for part in path.split("/"):
            here = here.setdefault(part, {})
        here["mean"] = golden[f"buffer/{name}.running_mean"]
        here["variance"] = golden[f"buffer/{name}.running_var"]
    return {"batch_stats": stats}


def layers(captured, predictions, batch, golden, meta):
    found = {"net_0": intermediate(captured, "atom_embedding")}
    for number in range(meta["options"]["num_layers"]):
        found[f"conv_{number}"] = intermediate(captured, f"block_{number}/convolution")
        found[f"net_{number + 1}"] = intermediate(captured, f"block_{number}")
    found[f"net_{meta['options']['num_layers'] + 1}"] = intermediate(captured, "norm")
    return found


SYSTEMS = {
    "lieconv": System(
        model=model,
        official=official,
        layers=layers,
        variables=variables,
        of_batch=lambda golden, meta: model(golden, meta, LieConvOfBatch),
    )
}
