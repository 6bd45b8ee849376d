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
import flax.struct
import jax
import jax.numpy as jnp

from data_pipelines.graph import Array, Graph, without_padding_values
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
      remat: messages are computed again in the backward pass instead of being kept.
      dtype: of features; positions are float32 or wider.
    """

    READOUTS: ClassVar = ("position", "sum")
    symmetries: ClassVar = SYMMETRIES

    readouts: tuple[str, ...]
    width: int = 64
    num_layers: int = 4
    attention: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> Array:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        moves = self.readouts == ("position",)
        x_Nx3 = graph.position
        messages = _messages_of(graph)
        if moves:
            features = safe_norm(graph.velocity)[:, None]
            ends = lambda x: (messages.of_receiver(x), messages.of_sender(x))
            charge, charge_of_other = ends(graph.charge[:, None])
            scalars = [charge * charge_of_other, _square(*ends(x_Nx3))]
        else:
            features = _atom_features(graph.atomic_number, x_Nx3.dtype)
            scalars = []
        h_NxD = _linear(self.width, features.shape[-1], self.dtype, "embedding")(features)
        layer_class = nn.remat(_Layer) if self.remat else _Layer
        for number in range(self.num_layers):
            # The last layer's features are read only where there is a read-out of them.
            updates = not moves or number < self.num_layers - 1
            layer = layer_class(self.width, self.attention, moves, updates, name=f"layer_{number}")
            h_NxD, x_Nx3 = layer(h_NxD, x_Nx3, graph.velocity, messages, scalars)
        if moves:
            return jnp.where(graph.node_mask[:, None], x_Nx3, 0)
        linear = lambda features, name: _linear(features, self.width, self.dtype, name)
        h_NxD = linear(self.width, "node_1")(nn.silu(linear(self.width, "node_0")(h_NxD)))
        h_D = jnp.where(graph.node_mask[:, None], h_NxD, 0).sum(axis=0)
        wide = nn.silu(linear(self.width, "graph_0")(h_D[None]))
        return linear(len(self.readouts), "graph_1")(wide)[0].astype(x_Nx3.dtype)


class _Layer(nn.Module):
    """One round of messages."""

    width: int
    attention: bool
    moves: bool
    updates: bool

    @nn.compact
    def __call__(self, h_NxD, x_Nx3, v_Nx3, messages: "_Messages", scalars):
        width, dtype = self.width, h_NxD.dtype
        linear = lambda features, name, **kw: _linear(features, width, dtype, name, **kw)
        x_to, x_from = messages.of_receiver(x_Nx3), messages.of_sender(x_Nx3)
        scalars = [_square(x_to, x_from), *scalars]
        # phi_e's first layer, split: the products with h are made per node, not per edge, and
        # never concatenated; those with single numbers are no products of matrices.
        fan_in = 2 * width + len(scalars)
        part = lambda name, **kw: _linear(width, fan_in, dtype, name, **kw)
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
            speed_Nx1 = linear(1, "velocity_1")(nn.silu(linear(width, "velocity_0")(h_NxD)))
            x_Nx3 = x_Nx3 + v_Nx3 * speed_Nx1.astype(x_Nx3.dtype)
        if self.updates:
            m_NxD = messages.sum_at_receiver(m_MxD, weight_Mx1)
            wide = _linear(width, 2 * width, dtype, "node_0")
            h_NxD = h_NxD + linear(width, "node_1")(
                nn.silu(wide(jnp.concatenate([h_NxD, m_NxD], axis=-1)))
            )
        return h_NxD, x_Nx3


@flax.struct.dataclass
class _Messages:
    """M = 2E messages: both directions of each edge, one half after the other.

    A gather and a sum by receiver: time and memory grow with the edges, however many nodes
    there are. (A matrix [N, N, D] of all pairs, without either, was no faster on a CPU, on
    complete graphs too.)

    Attributes:
      mask_Mx1: float, 0 for padding.
      receiver_M, sender_M: nodes.
      num_nodes: N.
    """

    mask_Mx1: Array
    receiver_M: Array
    sender_M: Array
    num_nodes: int = flax.struct.field(pytree_node=False)

    @property
    def count_Nx1(self) -> Array:
        """How many each node receives."""
        return self.sum_at_receiver(jnp.ones_like(self.mask_Mx1), self.mask_Mx1)

    def of_receiver(self, x_NxD: Array) -> Array:
        """Of each message, the row of its receiver."""
        return x_NxD[self.receiver_M]

    def of_sender(self, x_NxD: Array) -> Array:
        """Of each message, the row of its sender."""
        return x_NxD[self.sender_M]

    def sum_at_receiver(self, x_MxD: Array, weight_Mx1: Array) -> Array:
        """`sum over messages to i of weight x`, `[N, D]`."""
        wide = jnp.promote_types(x_MxD.dtype, jnp.float32)  # sums of many small numbers
        weighted_MxD = x_MxD.astype(wide) * weight_Mx1.astype(wide)
        sum_NxD = jax.ops.segment_sum(weighted_MxD, self.receiver_M, self.num_nodes)
        return sum_NxD.astype(jnp.promote_types(x_MxD.dtype, weight_Mx1.dtype))


def _messages_of(graph: Graph) -> _Messages:
    """The messages of one graph without padding values."""
    both = lambda a, b: jnp.concatenate([a, b])
    return _Messages(
        both(graph.edge_mask, graph.edge_mask)[:, None].astype(graph.position.dtype),
        both(graph.receivers, graph.senders),
        both(graph.senders, graph.receivers),
        len(graph.node_mask),
    )


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


def _atom_features(atomic_number_N: Array, dtype) -> Array:
    """[N, 15]: one-hot element, times (Z / 9) to the powers 0, 1 and 2."""
    one_hot = (atomic_number_N[:, None] == jnp.asarray(_ELEMENTS)).astype(dtype)
    scaled_N = atomic_number_N.astype(dtype) / _MAX_NUMBER
    powers_Nx3 = jnp.stack([jnp.ones_like(scaled_N), scaled_N, scaled_N**2], axis=-1)
    return (one_hot[..., None] * powers_Nx3[:, None]).reshape(len(atomic_number_N), -1)
