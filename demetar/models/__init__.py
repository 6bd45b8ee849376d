"""The registry of models: a name in `config.model.name` -> a class for one graph."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines.errors import UserError, check_known, suggest
from data_pipelines.graph import Array, Graph
from data_pipelines.targets import READOUTS, Target
from demetar.models.base import EMBEDDING, GraphModel
from demetar.models.baselines import DeepSet, Linear, SetTransformer
from demetar.models.cormorant import Cormorant
from demetar.models.demetar import Demetar
from demetar.models.e3 import DemetarE3
from demetar.models.egnn import Egnn
from demetar.models.equiformer import Equiformer
from demetar.models.et import Et
from demetar.models.lieconv import LieConv
from demetar.models.nmp import Nmp
from demetar.models.schnet import Schnet
from demetar.models.se3_transformer import Se3Transformer
from demetar.models.tfn import Tfn
from demetar.models.wavescatt import WaveScatt

MODELS: dict[str, type[GraphModel]] = {
    "demetar": Demetar,
    "demetar_e3": DemetarE3,
    "egnn": Egnn,
    "et": Et,
    "lieconv": LieConv,
    "linear": Linear,
    "deep_set": DeepSet,
    "set_transformer": SetTransformer,
    "se3_transformer": Se3Transformer,
    "tfn": Tfn,
    "schnet": Schnet,
    "nmp": Nmp,
    "cormorant": Cormorant,
    "equiformer": Equiformer,
    "wavescatt": WaveScatt,
}
DTYPES = ("float32", "bfloat16", "float64")


def option_defaults(name: str) -> dict[str, Any]:
    """The options of a model in `config.model`, with their defaults; `dtype` as a name."""
    check_known("config.model.name", name, MODELS)
    options = {
        field.name: field.default
        for field in dataclasses.fields(MODELS[name])
        if field.init and not _is_fact(field) and field.name not in ("parent", "name")
    }
    return {"readout": "auto"} | options | {"dtype": "float32"}


def _is_fact(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def create_model(
    *,
    name: str,
    targets: tuple[Target, ...],
    facts: Mapping[str, Any],
    readout: str = "auto",
    dtype: str = "float32",
    **options,
) -> GraphModel:
    """The model of a config; wrong names and values are `UserError`s.

    Args:
      name: of `MODELS`.
      targets: of the data set.
      facts: what else the data set knows: `elements` and its `model_facts`.
      readout: `auto` takes each target's own, else one for all.
      dtype: of `DTYPES`, of matrix products and activations.
      **options: fields of the model.
    """
    defaults = option_defaults(name)
    check_known("config.model.dtype", dtype, DTYPES)
    for key in options:
        if key not in defaults:
            raise UserError(f"Model {name!r} has no option {key!r}.{suggest(key, defaults)}")
    model_class = MODELS[name]
    fields = [f.name for f in dataclasses.fields(model_class) if _is_fact(f)]
    given = {"targets": _with_readouts(name, targets, readout), **facts}
    if missing := [field for field in fields if field not in given]:
        raise UserError(f"Model {name!r} needs {missing[0]}, which these data do not give.")
    own_facts = {field: given[field] for field in fields}
    model = model_class(**own_facts, **options, dtype=jnp.dtype(dtype))
    model.check()
    return model


def _with_readouts(name: str, targets: tuple[Target, ...], readout: str) -> tuple[Target, ...]:
    """The targets with the read-out that the model is to use for each."""
    check_known("config.model.readout", readout, ("auto", *READOUTS))
    chosen = []
    for target in targets:
        wanted = target.readout if readout == "auto" else readout
        known = MODELS[name].READOUTS
        if wanted not in known or READOUTS[wanted] != READOUTS[target.readout]:
            raise UserError(
                f"Model {name!r} (read-outs: {', '.join(known)}) cannot give read-out {wanted!r} "
                f"for target {target.name!r}, whose own is {target.readout!r}. Choose one by "
                "config.model.readout, or another model."
            )
        chosen.append(dataclasses.replace(target, readout=wanted))
    return tuple(chosen)


def predict(model: GraphModel, params, batch: Graph, keys_B=None) -> dict[str, Array]:
    """The predictions for a batch: name of each target -> [B], [B, N] or [B, N, 3].

    Training, evaluation and counting all come here: what a whole batch needs beside the model of
    one graph (forces as a gradient of its energies, say) has its place here.

    Args:
      model: for one graph.
      params: its parameters.
      batch: graphs with a leading axis B.
      keys_B: randomness of dropout for each graph; None: no dropout.
    """
    if keys_B is None:
        return jax.vmap(lambda graph: model.apply({"params": params}, graph))(batch)

    def with_dropout(graph, key):
        return model.apply({"params": params}, graph, False, rngs={"dropout": key})

    return jax.vmap(with_dropout)(batch, keys_B)


def predict_and_embed(
    model: GraphModel, params, batch: Graph
) -> tuple[dict[str, Array], Array | None]:
    """The predictions, and what the model keeps of each graph `[B, D]`, of one pass.

    None in its place if the model keeps nothing (see `GraphModel.keep_embedding`).
    """

    def one(graph):
        predictions, kept = model.apply({"params": params}, graph, mutable=["intermediates"])
        return predictions, kept.get("intermediates", {}).get(EMBEDDING)

    predictions, kept = jax.vmap(one)(batch)
    return predictions, None if kept is None else kept[0]


def apply_one(model: GraphModel, params, graph: Graph) -> dict[str, Array]:
    """The predictions for one graph, outside any batch.

    The same as `model.apply`, and differentiable: dense layers join the rows of a batch,
    and that is defined inside a vmap only (see `ops.matmul`).
    """
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], graph)
    return jax.tree.map(lambda x: x[0], predict(model, params, batch))
