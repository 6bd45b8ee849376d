"""A model as StableHLO, to be used where demetar is not: by `jax.export`, for several platforms.

The program takes padded graphs as arrays and gives standardised numbers. The JSON beside it says
which arrays, and how the numbers become those of the targets: in float64, because a total energy
is known better than float32 can say.
"""

import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch_plan import Bucket
from data_pipelines.elements import symbols
from data_pipelines.errors import UserError, check_known
from data_pipelines.graph import Graph
from data_pipelines.json_text import json_text
from demetar.config.stored import real_dtype
from demetar.inference.graphs import bucket_of
from demetar.inference.package import Package
from demetar.models import predict

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Input -> its dimensions after the batch, whether it is real, what it is.
_INPUTS = {
    "position": ("N3", "float", "angstrom; 0 in padding"),
    "atomic_number": ("N", "int32", "0 in padding"),
    "node_mask": ("N", "bool", "true for atoms, false for padding"),
    "senders": ("E", "int32", "index of an edge's first atom; 0 in padding"),
    "receivers": ("E", "int32", "index of its second atom, larger than the first"),
    "edge_type": ("E", "int32", "0: no bond, 1: single, 2: double, 3: triple, 4: aromatic"),
    "edge_mask": ("E", "bool", "true for edges, false for padding"),
}
_OPTIONAL = {
    "charge": ("N", "float", "of the molecule, at each of its atoms; 0 in padding"),
    "velocity": ("N3", "float", "0 in padding"),
}
_HOW = (
    "value = output * scale + offset + slope * number of atoms + sum of the references of the "
    "atoms, in float64; for a target of nodes without slope, and with the node's own reference"
)


def export(
    package: Package,
    destination: pathlib.Path,
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
    batch: int | None = None,
    nodes: int = 0,
    edges: int = 0,
) -> dict[str, Any]:
    """Writes `destination` and, beside it, a JSON that says how it is called; returns the latter.

    Args:
      package: the model.
      destination: file of the program.
      platforms: of `PLATFORMS`.
      batch: graphs of a call; None: any number.
      nodes, edges: of the padded graphs; 0: what the largest training molecule needs.
    """
    for platform in platforms:
        check_known("platform", platform, PLATFORMS)
    if destination.suffix == ".json":
        raise UserError(f"{destination}: its JSON is written beside it: choose another suffix.")
    if unknown := set(package.card["inputs"]) - _OPTIONAL.keys():
        raise UserError(
            f"{package.name} needs {', '.join(sorted(unknown))} of each graph, which an exported "
            "program cannot be given yet."
        )
    bucket = _bucket(package, nodes, edges)
    real = real_dtype(package.config)
    with jax.enable_x64(real == np.float64):
        size = jax.export.symbolic_shape("batch")[0] if batch is None else batch
        arguments = _arguments(package, size, bucket, real)
        program = jax.jit(_function(package))
        content = jax.export.export(program, platforms=platforms)(arguments).serialize()
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.write_bytes(content)
    card = {
        "model": package.name,
        "weights_sha256": package.card.get("weights_sha256"),
        "program_sha256": hashlib.sha256(content).hexdigest(),
        "platforms": list(platforms),
        "jax": jax.__version__,
        "inputs": _said_inputs(arguments),
        "outputs": _said_outputs(package),
        "value": _HOW,
        "elements": {symbols()[z]: z for z in package.elements},
        "edges": package.card["edges"],
        "geometry": package.card["geometry"],
        "charges": package.card["charges"],
        "licence": package.card["licence"],
    }
    destination.with_suffix(".json").write_text(json_text(card, indent=1) + "\n")
    return card


def _bucket(package: Package, nodes: int, edges: int) -> Bucket:
    largest, all_pairs = package.card["largest"], package.card["all_pairs"]
    kind = "complete" if all_pairs else ""
    wanted = bucket_of(nodes or largest["nodes"], edges or largest["edges"], kind)
    nodes = nodes or wanted.num_nodes
    pairs = nodes * (nodes - 1) // 2
    return Bucket(nodes, edges or (pairs if all_pairs else wanted.num_edges))


def _arguments(package: Package, batch, bucket: Bucket, real: np.dtype) -> dict[str, Any]:
    """Shapes and types of the inputs, by name."""
    rows = _INPUTS | {name: _OPTIONAL[name] for name in package.card["inputs"]}
    size = {"N": bucket.num_nodes, "E": bucket.num_edges, "3": 3}
    return {
        name: jax.ShapeDtypeStruct(
            (batch, *(size[letter] for letter in letters)),
            real if kind == "float" else np.dtype(kind),
        )
        for name, (letters, kind, _) in rows.items()
    }


def _function(package: Package):
    network, params = package.network(), package.params

    def program(arrays):
        number = arrays["position"].shape[0]
        graph = Graph(
            **arrays, graph_mask=jnp.ones(number, bool), index=jnp.zeros(number, jnp.int32)
        )
        return predict(network, params, graph)

    return program


def _said_inputs(arguments: dict[str, Any]) -> dict[str, dict]:
    about = _INPUTS | _OPTIONAL
    return {
        name: {
            "shape": [d if isinstance(d, int) else str(d) for d in leaf.shape],
            "dtype": leaf.dtype.name,
            "about": about[name][2],
        }
        for name, leaf in arguments.items()
    }


def _said_outputs(package: Package) -> dict[str, dict]:
    card = package.card
    return {
        target.name: {
            "unit": target.unit,
            "of": "node" if target.per_node else "graph",
            **card["normalizations"][target.name],
            "references": card["references"].get(target.name, {}),
        }
        for target in package.targets
    }
