"""ET: the equivariant transformer of TorchMD-Net (Thölke and De Fabritiis 2022).

As its official code, so that the same weights give the same numbers. Pairs are closer than the
cutoff; phi is the cosine cutoff; a node is a neighbour of itself in attention, at distance 0.

    e_k(d) = phi(d) exp(-beta (exp(-5 d / cutoff) - mu_k)^2)                     Equation 3
    n_i    = sum_{j != i} table'[Z_j] * W e(d_ij) phi(d_ij)                      Equation 5
    x_i    = W [table[Z_i], n_i],  v_i = 0                                       Equation 6

Each layer normalises x, and adds to x and v (Section 2.2.2; <,> is a product over space):

    a_ij           = silu(sum_c q_i k_j dk_ij) phi(d_ij)   for each head         Equations 8 to 10
    (s, s1, s2)_ij = value_j * dv_ij
    (o1, o2, o3)_i = W sum_j a_ij s_ij,   (v1, v2, v3)_i = U v_i
    x_i           += <v1, v2> o2 + o3                                            Equation 11
    v_i           += v3 * o1 + sum_j (s1_ij * v_j + s2_ij u_ij)                  Equation 12

u_ij is the direction from i to j. `vector_cutoff` multiplies phi to the values and not to a: then
vectors too have no step at the cutoff; the paper's have. Two gated equivariant blocks (Figure 1d)
make numbers of each atom out of x and |v|.

Two matrices reach no output: U of the first layer, where v is 0, and W2 of the last block. They
are parameters all the same, so that their number is the published one.
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import GraphModel
from demetar.models.layers import (
    Dense,
    Embed,
    Messages,
    cosine_cutoff,
    mean_of_nodes,
    messages_of,
    safe_norm,
)

_NUM_ELEMENTS = 100  # rows of the tables, as published


def _linear(features: int, dtype, name: str, use_bias: bool = True) -> Dense:
    init = nn.initializers.xavier_uniform()
    return Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=init, name=name)


def _norm(dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


class Et(GraphModel):
    """Predicts graph targets as a sum or a mean over atoms.

    Attributes:
      width: D.
      num_layers: of attention, each with its own weights.
      num_heads: H of attention; divides `width`.
      num_radial: K of the basis, which is not trained.
      cutoff: angstrom; pairs further apart do not meet.
      vector_cutoff: messages between vectors fade at the cutoff too.
      dtype: of features; distances are float32 or wider.
    """

    READOUTS: ClassVar = ("sum", "mean")
    LEAST: ClassVar = {"width": 2, "num_radial": 2}

    width: int = 256
    num_layers: int = 8
    num_heads: int = 8
    num_radial: int = 64
    cutoff: float = 5.0
    vector_cutoff: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        pairs = _pairs_of(graph, self.cutoff, self.num_radial, self.dtype)
        x_NxD = _Embedding(self.width, self.dtype, name="atom_embedding")(
            graph.atomic_number, pairs
        )
        v_Nx3xD = None
        for number in range(self.num_layers):
            layer = _Layer(self.num_heads, self.vector_cutoff, name=f"layer_{number}")
            x_change_NxD, v_change_Nx3xD = layer(x_NxD, v_Nx3xD, pairs)
            x_NxD += x_change_NxD
            v_Nx3xD = v_change_Nx3xD if v_Nx3xD is None else v_Nx3xD + v_change_Nx3xD
        x_NxD = _norm(self.dtype, "norm")(x_NxD)
        x_NxD, v_Nx3xD = _Gated(self.width // 2, last=False, name="gated_0")(x_NxD, v_Nx3xD)
        self.keep_embedding(lambda: mean_of_nodes(graph, x_NxD))
        value_NxT, _ = _Gated(len(self.targets), last=True, name="gated_1")(x_NxD, v_Nx3xD)
        value_NxT = value_NxT.astype(graph.position.dtype)
        mean_T, num_nodes = mean_of_nodes(graph, value_NxT), graph.node_mask.sum()
        return {
            target.name: mean if target.readout == "mean" else mean * num_nodes
            for target, mean in zip(self.targets, mean_T, strict=True)
        }


@flax.struct.dataclass
class _Pairs:
    """What the layers know of the pairs: M messages, of both directions and of loops.

    Attributes:
      messages: whose mask leaves out what is past the cutoff.
      basis_PxK: e of each edge, and last of a loop, P = E + 1.
      phi_Px1: the same of phi.
      direction_Mx3: unit vector from receiver to sender; 0 of loops.
    """

    messages: Messages
    basis_PxK: Array
    phi_Px1: Array
    direction_Mx3: Array

    def of_edge(self, x_PxD: Array) -> Array:
        """Of each message, the row of its edge, or the last row for a loop."""
        return self.messages.of_edge(x_PxD[:-1], x_PxD[-1])


def _pairs_of(graph: Graph, cutoff: float, num_radial: int, dtype) -> _Pairs:
    messages = messages_of(graph, loops=True)
    x_Nx3 = graph.position
    to_sender_Ex3 = x_Nx3[graph.senders] - x_Nx3[graph.receivers]
    distance_Ex1 = safe_norm(to_sender_Ex3)[:, None]
    unit_Ex3 = to_sender_Ex3 / jnp.where(distance_Ex1 > 0, distance_Ex1, 1)
    direction_Mx3 = jnp.concatenate([unit_Ex3, -unit_Ex3, jnp.zeros_like(x_Nx3)])
    distance_Px1 = jnp.concatenate([distance_Ex1, jnp.zeros_like(distance_Ex1[:1])])
    near_Mx1 = messages.of_edge(distance_Ex1 < cutoff, True)
    centres_K = jnp.asarray(np.linspace(math.exp(-cutoff), 1, num_radial), x_Nx3.dtype)
    beta = (2 * (1 - math.exp(-cutoff)) / num_radial) ** -2
    phi_Px1 = cosine_cutoff(distance_Px1, cutoff)
    scaled_Px1 = jnp.exp(-5 / cutoff * distance_Px1)
    basis_PxK = phi_Px1 * jnp.exp(-beta * jnp.square(scaled_Px1 - centres_K))
    return _Pairs(
        messages.replace(mask_Mx1=messages.mask_Mx1 * near_Mx1),
        basis_PxK.astype(dtype),
        phi_Px1.astype(dtype),
        direction_Mx3.astype(dtype),
    )


class _Embedding(nn.Module):
    """Element and neighbouring elements of each atom: x at the start."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, atomic_number_N: Array, pairs: _Pairs) -> Array:
        embed = lambda name: Embed(_NUM_ELEMENTS, self.width, self.dtype, name=name)
        messages = pairs.messages
        filter_PxD = _linear(self.width, self.dtype, "distance")(pairs.basis_PxK) * pairs.phi_Px1
        filter_MxD = messages.of_edge(filter_PxD[:-1])  # 0 of loops
        other_MxD = messages.of_sender(embed("other_element")(atomic_number_N))
        neighbour_NxD = messages.sum_at_receiver(other_MxD * filter_MxD, messages.mask_Mx1)
        own_NxD = embed("element")(atomic_number_N)
        both_NxD2 = jnp.concatenate([own_NxD, neighbour_NxD.astype(self.dtype)], axis=-1)
        return _linear(self.width, self.dtype, "combine")(both_NxD2)


class _Layer(nn.Module):
    """What one layer adds to x, `[N, D]`, and to v, `[N, 3, D]`; v is None where it is 0."""

    num_heads: int
    vector_cutoff: bool

    @nn.compact
    def __call__(self, x_NxD: Array, v_Nx3xD: Array | None, pairs: _Pairs):
        width, dtype, messages = x_NxD.shape[-1], x_NxD.dtype, pairs.messages
        linear = lambda features, name, **kw: _linear(features, dtype, name, **kw)
        y_NxD = _norm(dtype, "norm")(x_NxD)
        q_NxD, k_NxD = linear(width, "query")(y_NxD), linear(width, "key")(y_NxD)
        value_NxD3 = linear(3 * width, "value")(y_NxD)
        dk_PxD = nn.silu(linear(width, "distance_key")(pairs.basis_PxK))
        dv_PxD3 = nn.silu(linear(3 * width, "distance_value")(pairs.basis_PxK))
        if self.vector_cutoff:
            dv_PxD3 *= pairs.phi_Px1

        qk_MxD = messages.of_receiver(q_NxD) * messages.of_sender(k_NxD) * pairs.of_edge(dk_PxD)
        by_head = lambda x_MxD: x_MxD.reshape(-1, self.num_heads, width // self.num_heads)
        a_MxH = nn.silu(by_head(qk_MxD).sum(axis=-1))
        if not self.vector_cutoff:
            a_MxH *= pairs.of_edge(pairs.phi_Px1)
        message_MxD3 = messages.of_sender(value_NxD3) * pairs.of_edge(dv_PxD3)
        s_MxD, s1_MxD, s2_MxD = jnp.split(message_MxD3, 3, axis=-1)
        s_MxD = (by_head(s_MxD) * a_MxH[..., None]).reshape(-1, width)
        vector_Mx3xD = s2_MxD[:, None] * pairs.direction_Mx3[..., None]
        if v_Nx3xD is not None:
            vector_Mx3xD += s1_MxD[:, None] * messages.of_sender(v_Nx3xD)
        all_Mx4xD = jnp.concatenate([s_MxD[:, None], vector_Mx3xD], axis=1)
        weight_Mx1x1 = messages.mask_Mx1[..., None]
        sum_Nx4xD = messages.sum_at_receiver(all_Mx4xD, weight_Mx1x1).astype(dtype)

        o1_NxD, o2_NxD, o3_NxD = jnp.split(linear(3 * width, "out")(sum_Nx4xD[:, 0]), 3, axis=-1)
        # One row of zeros for all where v is 0.
        own = 0 * x_NxD[:1, None] if v_Nx3xD is None else v_Nx3xD
        v1, v2, v3 = jnp.split(linear(3 * width, "vector", use_bias=False)(own), 3, axis=-1)
        x_change_NxD = (v1 * v2).sum(axis=1) * o2_NxD + o3_NxD
        return x_change_NxD, v3 * o1_NxD[:, None] + sum_Nx4xD[:, 1:]


class _Gated(nn.Module):
    """Gated equivariant block: `[N, D]`, `[N, 3, D]` -> `[N, features]`, `[N, 3, features]`."""

    features: int
    last: bool

    @nn.compact
    def __call__(self, x_NxD: Array, v_Nx3xD: Array):
        width, dtype = x_NxD.shape[-1], x_NxD.dtype
        linear = lambda features, name, **kw: _linear(features, dtype, name, **kw)
        v1_Nx3xD = linear(width, "vector_1", use_bias=False)(v_Nx3xD)
        v2_Nx3xF = linear(self.features, "vector_2", use_bias=False)(v_Nx3xD)
        length_NxD = safe_norm(v1_Nx3xD.swapaxes(1, 2))
        both_NxD2 = jnp.concatenate([x_NxD, length_NxD], axis=-1)
        out_NxF2 = linear(2 * self.features, "update_1")(
            nn.silu(linear(width, "update_0")(both_NxD2))
        )
        x_NxF, gate_NxF = jnp.split(out_NxF2, 2, axis=-1)
        return x_NxF if self.last else nn.silu(x_NxF), gate_NxF[:, None] * v2_Nx3xF
