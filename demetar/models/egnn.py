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

from demetar.graph import Array, Graph, without_padding_values
from demetar.models.layers import SYMMETRIES, Dense, safe_norm

_ELEMENTS = (1, 6, 7, 8, 9)  # of QM9; node features are one-hot times powers of Z / 9
_MAX_NUMBER = 9


def _linear(features: int, fan_in: int, dtype, name: str, use_bias: bool = True) -> Dense:
    """With PyTorch's initial weights, uniform within 1 / sqrt(fan_in); biases start at 0."""
    bound = 1 / math.sqrt(fan_in)
    draw = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    return Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=draw, name=name)


class Egnn(nn.Module):
    """Predicts positions after the horizon, `[N, 3]`, or T graph targets, `[T]`.

    Attributes:
      readouts: `("position",)`, or `sum` for each graph target.
      width: D.
      num_layers: rounds of messages, each with its own weights.
      attention: messages are weighted by a sigmoid of themselves.
      dtype: of features; positions are float32 or wider.
    """

    READOUTS: ClassVar = ("position", "sum")
    symmetries: ClassVar = SYMMETRIES

    readouts: tuple[str, ...]
    width: int = 64
    num_layers: int = 4
    attention: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> Array:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        moves = self.readouts == ("position",)
        x_Nx3 = graph.position
        to_ExN, from_ExN = _ends(graph)
        square = lambda x_Nx3: jnp.square((to_ExN - from_ExN) @ x_Nx3).sum(-1, keepdims=True)
        if moves:
            features = safe_norm(graph.velocity)[:, None]
            charges = (to_ExN @ graph.charge) * (from_ExN @ graph.charge)
            edge_ExA = jnp.concatenate([charges[:, None], square(x_Nx3)], axis=-1)
        else:
            features = _atom_features(graph.atomic_number, x_Nx3.dtype)
            edge_ExA = jnp.zeros((len(to_ExN), 0), x_Nx3.dtype)
        h_NxD = _linear(self.width, features.shape[-1], self.dtype, "embedding")(features)
        for number in range(self.num_layers):
            # The last layer's features are read only where there is a read-out of them.
            updates = not moves or number < self.num_layers - 1
            layer = _Layer(self.width, self.attention, moves, updates, name=f"layer_{number}")
            h_NxD, x_Nx3 = layer(h_NxD, x_Nx3, graph.velocity, to_ExN, from_ExN, edge_ExA)
        if moves:
            return jnp.where(graph.node_mask[:, None], x_Nx3, 0)
        linear = lambda features, name: _linear(features, self.width, self.dtype, name)
        h_NxD = linear(self.width, "node_1")(nn.silu(linear(self.width, "node_0")(h_NxD)))
        h_D = jnp.where(graph.node_mask[:, None], h_NxD, 0).sum(axis=0)
        wide = nn.silu(linear(self.width, "graph_0")(h_D[None]))
        return linear(len(self.readouts), "graph_1")(wide)[0].astype(x_Nx3.dtype)


class _Layer(nn.Module):
    """One round of messages; edges here are directed, each pair of a graph is two."""

    width: int
    attention: bool
    moves: bool
    updates: bool

    @nn.compact
    def __call__(self, h_NxD, x_Nx3, v_Nx3, to_ExN, from_ExN, edge_ExA):
        width, dtype = self.width, h_NxD.dtype
        linear = lambda features, name, **kw: _linear(features, width, dtype, name, **kw)
        difference_Ex3 = (to_ExN - from_ExN) @ x_Nx3
        square_Ex1 = jnp.square(difference_Ex3).sum(axis=-1, keepdims=True)
        # phi_e's first layer, split: the products with h are made per node, not per edge.
        fan_in = 2 * width + 1 + edge_ExA.shape[-1]
        part = lambda name, **kw: _linear(width, fan_in, dtype, name, **kw)
        to, back = to_ExN.astype(dtype), from_ExN.astype(dtype)
        m_ExD = to @ part("edge_to")(h_NxD) + back @ part("edge_from", use_bias=False)(h_NxD)
        scalars = jnp.concatenate([square_Ex1, edge_ExA], axis=-1)
        m_ExD += part("edge_scalars", use_bias=False)(scalars)
        m_ExD = nn.silu(linear(width, "edge_1")(nn.silu(m_ExD)))
        if self.attention:
            m_ExD *= nn.sigmoid(linear(1, "attention")(m_ExD))
        if self.moves:
            small = nn.initializers.variance_scaling(1e-6, "fan_avg", "uniform")
            last = Dense(1, use_bias=False, dtype=dtype, kernel_init=small, name="position_1")
            gate_Ex1 = last(nn.silu(linear(width, "position_0")(m_ExD))).astype(x_Nx3.dtype)
            neighbours_Nx1 = jnp.maximum(to_ExN.sum(axis=0), 1)[:, None]
            x_Nx3 = x_Nx3 + to_ExN.T @ (difference_Ex3 * gate_Ex1) / neighbours_Nx1
            speed_Nx1 = linear(1, "velocity_1")(nn.silu(linear(width, "velocity_0")(h_NxD)))
            x_Nx3 = x_Nx3 + v_Nx3 * speed_Nx1.astype(x_Nx3.dtype)
        if self.updates:
            m_NxD = to.T @ m_ExD
            wide = _linear(width, 2 * width, dtype, "node_0")
            h_NxD = h_NxD + linear(width, "node_1")(
                nn.silu(wide(jnp.concatenate([h_NxD, m_NxD], axis=-1)))
            )
        return h_NxD, x_Nx3


def _ends(graph: Graph) -> tuple[Array, Array]:
    """One-hot [2E, N] of the node that a message goes to, and of the one it comes from.

    Every pair of the graph gives two messages; rows of padding are 0.
    """
    number_N = jnp.arange(len(graph.node_mask))
    one_hot = lambda ends_E: ((ends_E[:, None] == number_N) & graph.edge_mask[:, None]).astype(
        graph.position.dtype
    )
    s_ExN, r_ExN = one_hot(graph.senders), one_hot(graph.receivers)
    return jnp.concatenate([s_ExN, r_ExN]), jnp.concatenate([r_ExN, s_ExN])


def _atom_features(atomic_number_N: Array, dtype) -> Array:
    """[N, 15]: one-hot element, times (Z / 9) to the powers 0, 1 and 2."""
    one_hot = (atomic_number_N[:, None] == jnp.asarray(_ELEMENTS)).astype(dtype)
    scaled_N = atomic_number_N.astype(dtype) / _MAX_NUMBER
    powers_Nx3 = jnp.stack([jnp.ones_like(scaled_N), scaled_N, scaled_N**2], axis=-1)
    return (one_hot[..., None] * powers_Nx3[:, None]).reshape(len(atomic_number_N), -1)
