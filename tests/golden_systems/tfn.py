"""Fuchs et al.'s Tensor Field Network, and what its weights share with the SE(3)-Transformer's."""

import re

import jax.numpy as jnp
import numpy as np

from data_pipelines.graph import Graph
from data_pipelines.targets import Target
from demetar.models import create_model
from demetar.models.equivariant import HIDDEN, _coupling
from golden_systems.common import ELEMENTS, System, intermediate

VECTORS = (
    Target("position", "1", readout="position", normalization="none"),
    Target("velocity", "1", readout="velocity", normalization="none"),
)


def targets_of(golden, meta):
    """Vectors of particles; or one number, pooled as the options say (their TFN: always `max`)."""
    if "velocity" in golden:
        return VECTORS
    readout = {"avg": "mean", "max": "max"}[meta["options"].get("pooling", "max")]
    return (Target("output", "1", readout=readout, normalization="none"),)


def model_of(name, targets, **options):
    facts = {"elements": ELEMENTS}
    return create_model(name=name, targets=targets, facts=facts, dtype="float64", **options)


def particles(golden, meta) -> Graph:
    """Every pair of a file's particles is an edge."""
    num, n, _ = golden["position"].shape
    i, j = (np.tile(ends.astype(np.int32), (num, 1)) for ends in np.triu_indices(n, 1))
    mask = golden["node_mask"].astype(bool)
    return Graph(
        position=golden["position"].astype(float),
        velocity=golden["velocity"].astype(float),
        charge=golden["charge"].astype(float),
        atomic_number=mask.astype(np.int32),
        node_mask=mask,
        senders=i,
        receivers=j,
        edge_type=np.zeros_like(i),
        edge_mask=np.take_along_axis(mask, i, 1) & np.take_along_axis(mask, j, 1),
        graph_mask=np.ones(num, bool),
        index=np.arange(num, dtype=np.int32),
    )


def vectors(predictions, batch):
    move = predictions["position"] - batch.position
    return jnp.stack([move, predictions["velocity"] - batch.velocity], axis=2)


def kernels(ours, name, channels):
    """The radial networks of one `Kernels` to so many channels, under official names."""
    ours, official = ours["radial"], {}
    ends = sorted(tuple(map(int, key.split("_"))) for key in ours if key[0].isdigit())
    for p, (start, k) in enumerate(ends):
        net = f"{name}.kernel_unary.({start},{k}).rp.net"
        rows = slice(p * HIDDEN, (p + 1) * HIDDEN)
        official[f"{net}.0.weight"] = ours["first"]["kernel"][:, rows].T
        official[f"{net}.0.bias"] = ours["first"]["bias"][rows]
        official[f"{net}.3.weight"] = ours["kernel"][p].T
        official[f"{net}.3.bias"] = ours["bias"][p]
        for number, norm in ((1, "norm_0"), (4, "norm_1")):
            official[f"{net}.{number}.bn.weight"] = ours[norm]["scale"][p]
            official[f"{net}.{number}.bn.bias"] = ours[norm]["bias"][p]
        # Ours [frequency, in, out], theirs [out, in, frequency].
        shape = (2 * min(start, k) + 1, -1, channels)
        last = ours[f"{start}_{k}"]
        official[f"{net}.6.bias"] = last["bias"].reshape(shape).T.reshape(-1)
        official[f"{net}.6.weight"] = last["kernel"].reshape(HIDDEN, *shape).T.reshape(-1, HIDDEN)
    return official


def mix(ours, name, degrees_first=False):
    """Self-interactions without bias; the TFN layers' have a leading axis of 1."""
    return {
        f"{name}.{key.removeprefix('degree_')}": x["kernel"].T[None] if degrees_first
        else x["kernel"].T
        for key, x in ours.items()
    }  # fmt: skip


def convolution(ours, name, channels):
    return kernels(ours["kernels"], name, channels) | (
        mix(ours["mix"], f"{name}.kernel_self", degrees_first=True) if "mix" in ours else {}
    )


def norm(ours, name):
    """Biases of particles, or layer norms of molecules."""
    official = {}
    for key, x in ours.items():
        kind, degree = key.split("_")
        if kind == "bias":
            official[f"{name}.bias.{degree}"] = x[None]
        else:
            official[f"{name}.transform.{degree}.0.bn.weight"] = x["scale"]
            official[f"{name}.transform.{degree}.0.bn.bias"] = x["bias"]
    return official


def perceptron(ours, name):
    return {
        f"{name}.{number}.{'weight' if part == 'kernel' else part}": x.T
        for number, layer in ((0, "hidden"), (2, "out"))
        for part, x in ours[layer].items()
    }


def layers(captured, predictions, batch, golden, meta):
    """What each layer and each non-linearity gave, channels before components."""
    found = {}
    names = [name for name in golden if name.startswith("block_")]
    last = max(int(name.split("_")[1]) for name in names)
    for name in names:
        _, block, _, degree = name.split("_")
        kind = ("layer", "norm")[int(block) % 2]
        path = "last" if int(block) == last else f"{kind}_{int(block) // 2}"
        x = jnp.swapaxes(intermediate(captured, path)[int(degree)], -1, -2)
        found[name] = jnp.where(batch.node_mask[..., None, None], x, 0)
    for name in golden:
        if match := re.match(r"buffer/Q_J(\d)_in(\d)_out(\d)", name):
            order, start, k = map(int, match.groups())
            # Theirs goes with harmonics of another sign, see `_coupling`.
            ours = (-1) ** order * _coupling(start, k, order)
            found[name] = ours.reshape(-1, 2 * order + 1)
    return found


def official(block, head=None):
    """The mapping of a TFN whose list of layers and last perceptron have these names."""

    def names(params, golden, meta):
        width, degrees = meta["options"]["num_channels"], meta["options"]["num_degrees"]
        num = sum(name.startswith("layer_") for name in params)
        found = {}
        for i in range(num):
            found |= convolution(params[f"layer_{i}"], f"{block}.{2 * i}", width)
            found |= norm(params[f"norm_{i}"], f"{block}.{2 * i + 1}")
        channels = width * degrees if head else len(VECTORS)
        found |= convolution(params["last"], f"{block}.{2 * num}", channels)
        return found | (perceptron(params, head) if head else {})

    return names


def model(golden, meta):
    options = meta["options"]
    return model_of(
        "tfn",
        targets_of(golden, meta),
        width=options["num_channels"],
        num_layers=options["num_layers"],
        num_degrees=options["num_degrees"],
    )


SYSTEMS = {
    "tfn": System(model=model, official=official("block0", "block2"), layers=layers),
    "tfn_nbody": System(
        model=model, official=official("Gblock"), layers=layers, batch=particles, output=vectors
    ),
}
