"""EGNN, the baseline: E(n)-equivariant graph neural network (Satorras et al. 2021).

As its official code, so that the same weights give the same numbers:

    m_ij  = phi_e(h_i, h_j, |x_i - x_j|^2, a_ij)                                 Equation 3
    x_i  <- x_i + mean_j (x_i - x_j) phi_x(m_ij) + v_i phi_v(h_i)                Equations 4, 7
    h_i  <- h_i + phi_h(h_i, sum_j m_ij)                                         Equations 5, 6

For particles h starts from the speed, a_ij is (q_i q_j, squared distance at the input), and
phi_v reads h before its update in the layer. For molecules positions stay, messages are
weighted by a sigmoid of their own (`attention`, Equation 8), and the sum over atoms is read.
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import GraphModel
from demetar.models.layers import (
    Dense,
    Messages,
    atom_features,
    messages_of,
    safe_norm,
    torch_dense,
)


class Egnn(GraphModel):
    """Predicts positions after the horizon, or graph targets as a sum over nodes.

    Attributes:
      elements: atomic numbers of the data.
      width: D.
      num_layers: rounds of messages, each with its own weights.
      attention: messages are weighted by a sigmoid of themselves.
      remat: messages are computed again in the backward pass instead of being kept.
      dtype: of features; positions are float32 or wider.
    """

    READOUTS: ClassVar = ("position", "sum")

    elements: tuple[int, ...]
    width: int = 64
    num_layers: int = 4
    attention: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        moves, graph_targets = self.position is not None, self.names("sum")
        x_Nx3 = graph.position
        messages = messages_of(graph)
        if graph.velocity is not None:
            features = safe_norm(graph.velocity)[:, None]
            ends = lambda x: (messages.of_receiver(x), messages.of_sender(x))
            charge, charge_of_other = ends(graph.charge[:, None])
            scalars = [charge * charge_of_other, _square(*ends(x_Nx3))]
        else:
            features = atom_features(graph.atomic_number, self.elements, x_Nx3.dtype)
            scalars = []
        h_NxD = torch_dense(self.width, features.shape[-1], self.dtype, "embedding")(features)
        layer_class = nn.remat(_Layer) if self.remat else _Layer
        for number in range(self.num_layers):
            # The last layer's features are read only where there is a read-out of them.
            updates = bool(graph_targets) or number < self.num_layers - 1
            layer = layer_class(self.width, self.attention, moves, updates, name=f"layer_{number}")
            h_NxD, x_Nx3 = layer(h_NxD, x_Nx3, graph.velocity, messages, scalars)
        predictions = {}
        if moves:
            predictions[self.position] = jnp.where(graph.node_mask[:, None], x_Nx3, 0)
        if graph_targets:
            linear = lambda features, name: torch_dense(features, self.width, self.dtype, name)
            h_NxD = linear(self.width, "node_1")(nn.silu(linear(self.width, "node_0")(h_NxD)))
            h_D = jnp.where(graph.node_mask[:, None], h_NxD, 0).sum(axis=0)
            self.keep_embedding(lambda: h_D)
            wide = nn.silu(linear(self.width, "graph_0")(h_D[None]))
            values_T = linear(len(graph_targets), "graph_1")(wide)[0].astype(x_Nx3.dtype)
            predictions |= dict(zip(graph_targets, values_T, strict=True))
        return predictions


class _Layer(nn.Module):
    """One round of messages."""

    width: int
    attention: bool
    moves: bool
    updates: bool

    @nn.compact
    def __call__(self, h_NxD, x_Nx3, v_Nx3, messages: Messages, scalars):
        width, dtype = self.width, h_NxD.dtype
        linear = lambda features, name, **kw: torch_dense(features, width, dtype, name, **kw)
        x_to, x_from = messages.of_receiver(x_Nx3), messages.of_sender(x_Nx3)
        scalars = [_square(x_to, x_from), *scalars]
        # phi_e's first layer, split: the products with h are made per node, not per edge, and
        # never concatenated; those with single numbers are no products of matrices.
        fan_in = 2 * width + len(scalars)
        part = lambda name, **kw: torch_dense(width, fan_in, dtype, name, **kw)
        m_MxD = messages.of_receiver(part("edge_to")(h_NxD))
        m_MxD += messages.of_sender(part("edge_from", use_bias=False)(h_NxD))
        m_MxD += _Scalars(width, fan_in, dtype, name="edge_scalars")(scalars)
        m_MxD = nn.silu(linear(width, "edge_1")(nn.silu(m_MxD)))
        weight_Mx1 = messages.mask_Mx1.astype(dtype)
        if self.attention:
            weight_Mx1 *= nn.sigmoid(linear(1, "attention")(m_MxD))
        if self.moves:
            small = nn.initializers.variance_scaling(1e-6, "fan_avg", "uniform")
            last = Dense(1, use_bias=False, dtype=dtype, kernel_init=small, name="position_1")
            m_in_MxD = weight_Mx1 * m_MxD if self.attention else m_MxD
            gate_Mx1 = last(nn.silu(linear(width, "position_0")(m_in_MxD))).astype(x_Nx3.dtype)
            shift_Nx3 = messages.sum_at_receiver(x_to - x_from, gate_Mx1 * messages.mask_Mx1)
            x_Nx3 = x_Nx3 + shift_Nx3 / jnp.maximum(messages.count_Nx1, 1)
            if v_Nx3 is not None:
                speed_Nx1 = linear(1, "velocity_1")(nn.silu(linear(width, "velocity_0")(h_NxD)))
                x_Nx3 = x_Nx3 + v_Nx3 * speed_Nx1.astype(x_Nx3.dtype)
        if self.updates:
            m_NxD = messages.sum_at_receiver(m_MxD, weight_Mx1)
            wide = torch_dense(width, 2 * width, dtype, "node_0")
            h_NxD = h_NxD + linear(width, "node_1")(
                nn.silu(wide(jnp.concatenate([h_NxD, m_NxD], axis=-1)))
            )
        return h_NxD, x_Nx3


class _Scalars(nn.Module):
    """`sum_k s_k w_k` of single numbers s_k `[..., 1]`: elementwise, fused with what follows."""

    features: int
    fan_in: int
    dtype: Any

    @nn.compact
    def __call__(self, scalars: list[Array]) -> Array:
        bound = 1 / math.sqrt(self.fan_in)
        draw = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        kernel = self.param("kernel", draw, (len(scalars), self.features)).astype(self.dtype)
        return sum(s.astype(self.dtype) * kernel[k] for k, s in enumerate(scalars))


def _square(a: Array, b: Array) -> Array:
    return jnp.square(a - b).sum(axis=-1, keepdims=True)
