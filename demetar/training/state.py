"""All that a step changes: step number, parameters, optimizer state, moving average."""

import hashlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.graph import Graph
from data_pipelines.json_text import json_text


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds and a step maps to its successor.

    Attributes:
      step: [] int32, updates done.
      params: of the model, a plain nested dict.
      opt_state: of the optax chain.
      ema: moving average of `params`, what is evaluated.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def create_state(model, tx: optax.GradientTransformation, example: Graph, seed: int) -> TrainState:
    """A fresh state; pure, so it can be jitted with shardings or only evaluated for shapes."""
    params = model.init(jax.random.key(seed), example)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        # A copy: the state is donated, and two names for one buffer cannot be.
        ema=jax.tree.map(jnp.copy, params),
    )


def params_sha256(params) -> str:
    """SHA-256 over names, shapes, types and bytes of all leaves, in order of their path."""
    digest = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ):
        array = np.asarray(leaf)
        digest.update(f"{path}:{array.shape}:{array.dtype.str};".encode() + array.tobytes())
    return digest.hexdigest()


def state_sha256(state: TrainState, progress: dict) -> str:
    """SHA-256 over all that a run is: the whole state, and `progress` but for the seconds."""
    exact = {name: value for name, value in progress.items() if name != "train_seconds"}
    digest = hashlib.sha256(params_sha256(state).encode())
    digest.update(json_text(exact, sort_keys=True).encode())
    return digest.hexdigest()
