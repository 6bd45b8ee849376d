"""The registry of models: a name in `config.model.name` -> a class for one graph."""

import dataclasses

import jax
import jax.numpy as jnp

from data_pipelines.errors import UserError, suggest
from data_pipelines.graph import Array, Graph
from demetar.models.baselines import DeepSet, Linear, SetTransformer
from demetar.models.demetar import EQUIVARIANCES, Demetar
from demetar.models.e3 import DemetarE3
from demetar.models.egnn import Egnn

MODELS = {
    "demetar": Demetar,
    "demetar_e3": DemetarE3,
    "egnn": Egnn,
    "linear": Linear,
    "deep_set": DeepSet,
    "set_transformer": SetTransformer,
}

_CHOICES = {
    "equivariance": EQUIVARIANCES,
    "attention": ("all", "edges"),
    "edge_attention": ("full", "shared_node", "none"),
    "scaling": ("standard", "blog"),
    "dtype": ("float32", "bfloat16", "float64"),
}
READOUTS = ("cls", "sum", "mean", "position")


def create_model(
    name: str,
    readout: str,
    target_readouts: tuple[str, ...],
    horizon: float | None = None,
    **options,
):
    """The model of a config; wrong names and values are `UserError`s.

    Args:
      name: of `MODELS`.
      readout: `auto` takes each target's own, else one of `READOUTS` for all.
      target_readouts: of the targets, from their table.
      horizon: of the data set, for models of positions.
      **options: fields of the model; `dtype` as a name.
    """
    _check("name", name, MODELS)
    _check("readout", readout, ("auto", *READOUTS))
    model_class = MODELS[name]
    fields = {field.name for field in dataclasses.fields(model_class)}
    for key, value in options.items():
        if key not in fields:
            raise UserError(f"Model {name!r} has no option {key!r}.{suggest(key, fields)}")
        if key in _CHOICES and not isinstance(value, bool):
            _check(key, value, _CHOICES[key])
    # EGNN's `attention` is a switch, DEMETAr's a name.
    if options.get("attention") == "edges":
        defaults = {field.name: field.default for field in dataclasses.fields(model_class)}
        for key, value in {"edge_attention": "none", "environment": False}.items():
            given = options.get(key, defaults[key])
            if given != value:
                raise UserError(
                    "config.model.attention='edges' is for graphs too large for all pairs, but "
                    f"config.model.{key} ({given!r}) looks at pairs: set it to {value!r}."
                )
    heads = options.get("num_heads", 1)
    if options.get("width", heads) % heads:
        raise UserError(
            f"config.model.width ({options['width']}) must be a multiple of "
            f"config.model.num_heads ({heads})."
        )
    readouts = target_readouts if readout == "auto" else (readout,) * len(target_readouts)
    for wanted in readouts:
        # A target of nodes has no graph read-out, nor the other way round.
        if wanted not in model_class.READOUTS or ("position" in target_readouts) != (
            wanted == "position"
        ):
            raise UserError(
                f"Model {name!r} (read-outs: {', '.join(model_class.READOUTS)}) cannot give "
                f"read-out {wanted!r} for these data (their own: {', '.join(target_readouts)})."
            )
    if "horizon" in fields:
        options["horizon"] = horizon
    return model_class(readouts=readouts, **options | {"dtype": jnp.dtype(options["dtype"])})


def _check(key: str, value, known) -> None:
    if value not in known:
        raise UserError(
            f"Unknown config.model.{key} {value!r}.{suggest(value, known)} "
            f"Known: {', '.join(known)}."
        )


def apply_one(model, params, graph: Graph, **options) -> Array:
    """The output for one graph, outside any batch: `[T]` or `[N, 3]`.

    The same as `model.apply`, and differentiable: dense layers join the rows of a batch,
    and that is defined inside a vmap only (see `layers.Dense`).
    """
    predict = lambda graph: model.apply({"params": params}, graph, **options)
    return jax.vmap(predict)(jax.tree.map(lambda x: jnp.asarray(x)[None], graph))[0]
