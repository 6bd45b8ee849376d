"""Fuchs et al.'s SE(3)-Transformer."""

from golden_systems.common import System
from golden_systems.tfn import (
    VECTORS,
    convolution,
    kernels,
    layers,
    mix,
    model_of,
    norm,
    particles,
    perceptron,
    targets_of,
    vectors,
)


def attention(ours, name, channels):
    official = kernels(ours["value"], f"{name}.GMAB.v", channels)
    official |= kernels(ours["key"], f"{name}.GMAB.k", channels)
    official |= mix(ours["query"], f"{name}.GMAB.q.transform")
    if "norm_1" not in ours["mix"]:
        return official | mix(ours["mix"], f"{name}.project.transform")
    last = f"{name}.project.transform.1"
    return official | {
        f"{last}.0.weight": ours["mix"]["norm_1"]["scale"],
        f"{last}.0.bias": ours["mix"]["norm_1"]["bias"],
        f"{last}.2.weight": ours["mix"]["degree_1"]["kernel"].T,
        f"{last}.2.bias": ours["mix"]["degree_1"]["bias"],
    }


def official(params, golden, meta):
    options = meta["options"]
    width, num = options["num_channels"], options["num_layers"]
    found = {}
    for i in range(num):
        found |= attention(params[f"layer_{i}"], f"Gblock.{2 * i}", width // options["div"])
        found |= norm(params[f"norm_{i}"], f"Gblock.{2 * i + 1}")
    if "velocity" in golden:
        return found | attention(params["last"], f"Gblock.{2 * num}", len(VECTORS))
    found |= convolution(params["last"], f"Gblock.{2 * num}", width * options["num_degrees"])
    return found | perceptron(params, "FCblock")


def model(golden, meta):
    options = meta["options"]
    return model_of(
        "se3_transformer",
        targets_of(golden, meta),
        width=options["num_channels"],
        num_layers=options["num_layers"],
        num_degrees=options["num_degrees"],
        division=options["div"],
        num_heads=options["n_heads"],
    )


SYSTEMS = {
    "se3_transformer": System(model=model, official=official, layers=layers),
    "se3_transformer_nbody": System(
        model=model,
        official=official,
        layers=layers,
        batch=particles,
        output=vectors,
    ),
}
