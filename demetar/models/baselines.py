"""Small baselines for positions: those of the DEMETAr post's tables that are no graph network."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import SYMMETRIES, GraphModel
from demetar.models.layers import Block, Dense, Mlp, layer_norm, mask_bias


def _features(graph: Graph, dtype) -> Array:
    """[N, 7]: position relative to the mean of all, velocity, charge."""
    mask = graph.node_mask[:, None]
    mean_3 = graph.position.sum(axis=0) / jnp.maximum(mask.sum(), 1)
    columns = (graph.position - mean_3, graph.velocity, graph.charge[:, None])
    return jnp.where(mask, jnp.concatenate(columns, axis=-1), 0).astype(dtype)


class Linear(GraphModel):
    """x + c v with one learned number, which starts at the horizon (EGNN's baseline)."""

    READOUTS: ClassVar = ("position",)

    horizon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        """One graph -> positions after the horizon, [N, 3]."""
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        time = self.param("time", nn.initializers.constant(self.horizon), ())
        moved_Nx3 = graph.position + time.astype(self.dtype) * graph.velocity
        return {self.position: moved_Nx3}


class DeepSet(GraphModel):
    """Each layer rho(x_i, mean_j x_j) (Zaheer et al. 2017); not rotation equivariant."""

    READOUTS: ClassVar = ("position",)
    symmetries: ClassVar = SYMMETRIES - {"rotation", "reflection"}

    width: int = 128
    num_layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        """One graph -> positions after the horizon, [N, 3]."""
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        mask = graph.node_mask[:, None]
        x_NxD = Dense(self.width, dtype=self.dtype, name="input")(_features(graph, self.dtype))
        for number in range(self.num_layers):
            mean_D = jnp.where(mask, x_NxD, 0).sum(axis=0) / jnp.maximum(mask.sum(), 1)
            both = jnp.concatenate([x_NxD, jnp.broadcast_to(mean_D, x_NxD.shape)], axis=-1)
            x_NxD = x_NxD + Mlp(self.width, self.width, self.dtype, name=f"layer_{number}")(both)
        moved = Dense(3, dtype=self.dtype, name="output")(nn.silu(x_NxD))
        return {self.position: jnp.where(mask, graph.position + moved, 0)}


class SetTransformer(GraphModel):
    """Self-attention over the particles (Lee et al. 2019); not rotation equivariant."""

    READOUTS: ClassVar = ("position",)
    symmetries: ClassVar = SYMMETRIES - {"rotation", "reflection"}

    width: int = 64
    num_heads: int = 4
    num_layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        """One graph -> positions after the horizon, [N, 3]."""
        graph = without_padding_values(graph)
        mask_N = graph.node_mask
        x_NxD = Dense(self.width, dtype=self.dtype, name="input")(_features(graph, self.dtype))
        for number in range(self.num_layers):
            block = Block(self.num_heads, mlp_ratio=2, dtype=self.dtype, name=f"layer_{number}")
            x_NxD = block(x_NxD, mask_bias(mask_N)[None, None], deterministic)
        moved = Dense(3, dtype=self.dtype, name="output")(layer_norm(x_NxD))
        return {self.position: jnp.where(mask_N[:, None], graph.position + moved, 0)}
