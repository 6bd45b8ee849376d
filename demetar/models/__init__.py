"""The registry of models: a name in `config.model.name` -> a class for one graph."""

import dataclasses

import jax
import jax.numpy as jnp

from demetar.errors import UserError, suggest
from demetar.graph import Array, Graph
from demetar.models.demetar import Demetar

MODELS = {"demetar": Demetar}

_CHOICES = {
    "edge_attention": ("full", "shared_node"),
    "scaling": ("standard", "blog"),
    "dtype": ("float32", "bfloat16", "float64"),
}
READOUTS = ("auto", "cls", "sum", "mean")


def create_model(name: str, readout: str, target_readouts: tuple[str, ...], **options):
    """The model of a config; wrong names and values are `UserError`s.

    Args:
      name: of `MODELS`.
      readout: `auto` takes each target's own, else one of `READOUTS` for all.
      target_readouts: of the targets, from their table.
      **options: fields of the model; `dtype` as a name.
    """
    _check("name", name, MODELS)
    _check("readout", readout, READOUTS)
    model_class = MODELS[name]
    fields = {field.name for field in dataclasses.fields(model_class)}
    for key, value in options.items():
        if key not in fields:
            raise UserError(f"Model {name!r} has no option {key!r}.{suggest(key, fields)}")
        if key in _CHOICES:
            _check(key, value, _CHOICES[key])
    if options["width"] % options["num_heads"]:
        raise UserError(
            f"config.model.width ({options['width']}) must be a multiple of "
            f"config.model.num_heads ({options['num_heads']})."
        )
    readouts = target_readouts if readout == "auto" else (readout,) * len(target_readouts)
    return model_class(readouts=readouts, **options | {"dtype": jnp.dtype(options["dtype"])})


def _check(key: str, value, known) -> None:
    if value not in known:
        raise UserError(
            f"Unknown config.model.{key} {value!r}.{suggest(value, known)} "
            f"Known: {', '.join(known)}."
        )


def apply_one(model, params, graph: Graph, **options) -> Array:
    """The output for one graph, outside any batch: `[T]`.

    The same as `model.apply`, and differentiable: dense layers join the rows of a batch,
    and that is defined inside a vmap only (see `layers.Dense`).
    """
    predict = lambda graph: model.apply({"params": params}, graph, **options)
    return jax.vmap(predict)(jax.tree.map(lambda x: jnp.asarray(x)[None], graph))[0]
