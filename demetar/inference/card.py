"""The card of a model, `model.json`: what it says, and that it says it in the right types.

A card may come from a stranger. Whoever uses one relies on its fields, so each is looked at once,
when the model is read.
"""

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.targets import Target
from demetar.config import stored
from demetar.training.objective import Normalization

CARD = "model.json"
FORMAT = 1  # raise it when a card of before cannot be read
# What a card keeps of `result.json`.
_RESULT = ("split_name", "step", "count", "targets", "validation_score", "seed", "git_commit")

_fields = lambda row: {field.name: field.type for field in dataclasses.fields(row)}
# What a card must have: a type; a list of such; a mapping from text to such; or a mapping with
# these keys alone. A tuple names alternatives. The card itself may have other keys too.
_SHAPE = {
    "items": str,
    "elements": [int],
    "largest": {"nodes": int, "edges": int},
    "targets": [_fields(Target)],
    "normalizations": {str: _fields(Normalization)},
    "references": {str: {str: float}},
    "edges": (None, {"kind": str, "cutoff": float}),
    "all_pairs": bool,
    "geometry": str,
    "charges": [int],
    "inputs": [str],
    "facts": {str: object},
    "result": {str: object},
    "licence": str,
    "versions": {str: str},
    "passport": {str: object},
    "config": {str: object},
}


def check_card(card: Any, where: pathlib.Path) -> None:
    """Raises `UserError` for a card that is not what `describe` writes."""
    if wrong := _wrong(card, _SHAPE, ""):
        raise UserError(f"{where}: {CARD} is no card of a model: {wrong}. Get the model again.")
    names = {Target(**fields).name for fields in card["targets"]}  # refuses unknown read-outs
    if absent := sorted(names - card["normalizations"].keys()):
        raise UserError(f"{where}: {CARD} has no normalization of {', '.join(absent)}.")
    if odd := [z for row in card["references"].values() for z in row if not z.isdecimal()]:
        raise UserError(f"{where}: {CARD} has a reference of {odd[0]!r}, which is no element.")
    stored.from_json(card["config"])


def _wrong(value: Any, shape: Any, place: str) -> str:
    """What is wrong with a value, for a person; "" if it has the shape."""
    if isinstance(shape, tuple):
        found = [_wrong(value, one, place) for one in shape]
        return "" if "" in found else found[-1]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _not(value, "a list", place)
        parts = ((item, shape[0], f"{place}[{k}]") for k, item in enumerate(value))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return _not(value, "an object", place)
        of_each = shape.get(str)
        for key in () if of_each else shape:
            if key not in value:
                return f"{f'{place}.' if place else ''}{key} is missing"
        if place and not of_each and (more := sorted(value.keys() - shape.keys())):
            return f"{place}.{more[0]} is unknown"
        rows = value if of_each else shape
        parts = ((value[key], of_each or shape[key], f"{place}.{key}".lstrip(".")) for key in rows)
    elif shape is None:
        return "" if value is None else _not(value, "null", place)
    else:
        types = (int, float) if shape is float else shape
        is_flag = isinstance(value, bool) and shape in (int, float)  # to Python a number too
        good = isinstance(value, types) and not is_flag
        return "" if good else _not(value, shape.__name__, place)
    return next((wrong for part in parts if (wrong := _wrong(*part))), "")


def _not(value: Any, wanted: str, place: str) -> str:
    return f"{place or 'it'} is {str(value)[:60]!r}, not {wanted}"


def describe(experiment, result: Mapping[str, Any], licence: str = "") -> dict[str, Any]:
    """The card of a model, but for the hash of its weights.

    Args:
      experiment: it was trained in.
      result: what is known of its errors, as `result.json` has it; may be empty.
      licence: of the weights, as its owner words it.
    """
    dataset, arrays, config = experiment.dataset, experiment.arrays, experiment.config
    passport, train, sizes = dataset.passport, dataset.split["train"], arrays.sizes
    saved = stored.to_json(config)
    saved["mesh"] |= {"data": -1, "fsdp": 1, "model": 1, "cpu_devices": 0}  # of any machine
    saved["data"] |= {"cache_dir": ""}
    are_molecules = dataset.items == "molecules"
    edges = None
    if are_molecules:
        if not ("edges" in config.data and "edge_cutoff" in config.data):
            raise UserError(
                f"Data set {config.data.name!r} has no options `edges` and `edge_cutoff`, so the "
                "model would not know which pairs of a new molecule are edges: give it both."
            )
        edges = {"kind": config.data.edges, "cutoff": config.data.edge_cutoff}
    inputs = ("velocity", "charge", "node_feature", "graph_feature")
    return {
        "format": FORMAT,
        "items": dataset.items,
        "elements": [int(z) for z in dataset.elements],
        "largest": {
            "nodes": int(sizes.num_nodes[train].max()),
            "edges": int(sizes.num_edges[train].max()),
        },
        "targets": [dataclasses.asdict(target) for target in experiment.objective.targets],
        "normalizations": {
            name: dataclasses.asdict(row) for name, row in experiment.normalizations.items()
        },
        "references": {
            name: {str(z): float(x) for z, x in row.items()}
            for name, row in dataset.references.items()
        },
        "edges": edges,
        "all_pairs": bool((sizes.num_edges == sizes.num_nodes * (sizes.num_nodes - 1) // 2).all()),
        "geometry": _geometry_of(passport) if are_molecules else "",
        "charges": sorted(int(charge) for charge in passport.get("charges", {0: 0})),
        "inputs": [name for name in inputs if getattr(arrays, name) is not None],
        "facts": dict(dataset.model_facts),
        "result": {key: result[key] for key in _RESULT if key in result},
        "licence": licence,
        "versions": {name: importlib.metadata.version(name) for name in ("demetar", "jax", "flax")},
        "passport": passport,
        "config": saved,
    }


def _geometry_of(passport: dict) -> str:
    """How the positions of these molecules were made; QM9's passport says more about it."""
    geometry = passport.get("geometry", "file")
    return geometry["kind"] if isinstance(geometry, dict) else geometry
