"""Equiformer: equivariant graph attention transformer (Liao and Smidt 2023).

As its official code, so that the same weights give the same numbers. Features h are C_l channels
of every order l = 0 .. L, all of even parity: turning them is a symmetry, reflecting them is not.
Y are harmonics of x_j - x_i, and w(d) are weights from the distance of a pair. D(h, Y; w) is the
depth-wise tensor product (Section 4.2): channel by channel, over all (l, j, k),

    D^k_c = w_c sqrt(2k + 1) sum_{m m'} CG^{l j k}_{m m'} h^l_{c m} Y^j_m'

Lin mixes the channels of each order. A block (Figure 1, Equations 3 to 6) computes

    m_ij = D(Lin(t_j) + Lin(t_i), Y; w(d_ij)),   t = Norm(h)
    a_ij = softmax_j(p . leaky(Lin(scalars of m_ij)))                        for each head
    v_ij = Lin(D(Gate(Lin(m_ij)), Y; w))
    h_i += Lin(sum_j a_ij v_ij);   h_i += Lin(Gate(Lin(Norm(h_i))))

Some weights of the last block make vectors that nothing reads. They are parameters all the same,
so that their number is the published one.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import GraphModel
from demetar.models.layers import Dense, Messages, messages_of, safe_norm
from demetar.models.spherical import clebsch_gordan, spherical_harmonics

# What makes the second moment of each function 1: estimates from random numbers, as published.
_SILU, _SIGMOID, _LEAKY = 1.6791767923989418, 1.8467055342154763, 1.531320475574866
_PI = 3.14159  # of the radial basis, as published

Features = Sequence[Array]  # of order l: [N or M, 2 l + 1, C_l]
Couplings = dict[tuple[int, int, int], Array]  # (l, j, k) -> [M, 2 l + 1, 2 k + 1]


class Equiformer(GraphModel):
    """Predicts graph targets from a sum over nodes. Not invariant under reflections.

    Attributes:
      elements: atomic numbers of the data.
      widths: channels of each order l = 0 .. L.
      head_widths: of each order, of one attention head.
      mlp_widths: of each order, in the hidden layer after attention.
      width: scalars of an atom that are read.
      num_layers: blocks, each with its own weights.
      num_heads: H of attention.
      num_radial: K of the radial basis, which is trained.
      radial_widths: hidden layers of w(d).
      cutoff: angstrom; pairs further apart do not meet.
      average_degree: neighbours of an atom, a constant that the first sum is scaled by.
      average_nodes: atoms of a graph, a constant that the last sum is scaled by.
      dropout: of attention weights.
      dtype: of features; distances and softmax are float32 or wider.
    """

    READOUTS: ClassVar = ("sum",)
    symmetries: ClassVar = frozenset({"rotation", "translation", "permutation"})

    elements: tuple[int, ...]
    widths: tuple[int, ...] = (128, 64, 32)
    head_widths: tuple[int, ...] = (32, 16, 8)
    mlp_widths: tuple[int, ...] = (384, 192, 96)
    width: int = 512
    num_layers: int = 6
    num_heads: int = 4
    num_radial: int = 128
    radial_widths: tuple[int, ...] = (64, 64)
    cutoff: float = 5.0
    average_degree: float = 15.57930850982666
    average_nodes: float = 18.03065905448718
    dropout: float = 0.2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        graph = without_padding_values(graph)
        messages, r_E, couplings = _pairs(graph, self.cutoff, len(self.widths), self.dtype)
        basis_ExK = _Basis(self.num_radial, self.cutoff, name="basis")(r_E).astype(self.dtype)
        one_hot = (graph.atomic_number[:, None] == jnp.asarray(self.elements)).astype(self.dtype)
        embedding = Dense(
            self.widths[0], dtype=self.dtype, kernel_init=nn.initializers.normal(1.0), name="atom"
        )
        degree = _Degree(self.widths, self.radial_widths, self.average_degree, name="degree")
        features = degree(messages, basis_ExK, couplings)
        features = [features[0] + embedding(one_hot)[:, None], *features[1:]]
        for number in range(self.num_layers):
            last = number == self.num_layers - 1
            block = _Block(
                (self.width,) if last else self.widths,
                self.head_widths,
                self.mlp_widths,
                self.radial_widths,
                self.num_heads,
                self.dropout,
                name=f"block_{number}",
            )
            features = block(features, messages, basis_ExK, couplings, deterministic)
        features = _Norm(name="norm")(features)
        (scalars,) = _Linear((self.width,), name="read")(features)
        targets = self.names("sum")
        (values,) = _Linear((len(targets),), name="out")([_SILU * nn.silu(scalars)])
        values_NxT = jnp.where(graph.node_mask[:, None], values[:, 0], 0)
        sum_T = values_NxT.astype(graph.position.dtype).sum(axis=0) / math.sqrt(self.average_nodes)
        return dict(zip(targets, sum_T, strict=True))


class _Block(nn.Module):
    """Attention, then a gated layer of each node; both residual."""

    widths: tuple[int, ...]
    head_widths: tuple[int, ...]
    mlp_widths: tuple[int, ...]
    radial_widths: tuple[int, ...]
    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, features, messages, basis_ExK, couplings, deterministic) -> Features:
        attention = _Attention(
            self.head_widths, self.radial_widths, self.num_heads, self.dropout, name="attention"
        )
        normed = _Norm(name="norm_attention")(features)
        change = attention(normed, messages, basis_ExK, couplings, deterministic)
        features = _add(features, change)
        hidden = _Linear(_with_gates(self.mlp_widths), name="hidden")(
            _Norm(name="norm_mlp")(features)
        )
        change = _Linear(self.widths, name="mlp")(_gate(hidden))
        if self.widths != tuple(x.shape[-1] for x in features):
            features = _Linear(self.widths, name="shortcut")(features)
        return _add(features, change)


class _Attention(nn.Module):
    """What nodes read from their neighbours: non-linear messages, weighted by attention."""

    head_widths: tuple[int, ...]
    radial_widths: tuple[int, ...]
    num_heads: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        features: Features,
        messages: Messages,
        basis_ExK: Array,
        couplings: Couplings,
        deterministic: bool,
    ) -> Features:
        widths = tuple(x.shape[-1] for x in features)
        heads = lambda x: x.reshape(*x.shape[:-1], self.num_heads, -1)
        ends = zip(
            _Linear(widths, name="sender")(features),
            _Linear(widths, use_bias=False, name="receiver")(features),
            strict=True,
        )
        pair = [messages.of_sender(x) + messages.of_receiver(y) for x, y in ends]
        weights = _Radial(widths, self.radial_widths, name="radial")(basis_ExK)
        pair = _product(pair, couplings, [messages.of_edge(w_ExC) for w_ExC in weights])
        (a_Mx1xF,) = _Linear((self.num_heads * self.head_widths[0],), name="alpha")(pair)
        a_MxHxd = heads(a_Mx1xF[:, 0])
        a_MxHxd = _LEAKY * a_MxHxd * (0.6 + 0.4 * (2 * nn.sigmoid(a_MxHxd) - 1))
        shape = (self.num_heads, self.head_widths[0])
        dot_Hxd = self.param("dot", nn.initializers.glorot_uniform(), shape)
        logits_MxH = (a_MxHxd * dot_Hxd.astype(a_MxHxd.dtype)).sum(axis=-1)
        weight_MxH = messages.softmax_at_receiver(logits_MxH)
        weight_MxH = nn.Dropout(self.dropout, deterministic=deterministic)(weight_MxH)

        hidden = _gate(_Linear(_with_gates(widths), name="hidden")(pair))
        sizes = [widths[l1] for l1, _, _ in _paths(len(widths))]
        plain = self.param("product", nn.initializers.normal(1.0), (sum(sizes),))
        plain = _split(plain.astype(basis_ExK.dtype), sizes)
        value_widths = tuple(self.num_heads * width for width in self.head_widths)
        values = _Linear(value_widths, name="value")(_product(hidden, couplings, plain))
        weighted = [
            (heads(x) * weight_MxH[:, None, :, None].astype(x.dtype)).reshape(x.shape)
            for x in values
        ]
        return _Linear(widths, name="out")(_sum_at_receiver(messages, weighted))


class _Degree(nn.Module):
    """Where each node has neighbours: a sum of harmonics, each pair with weights of its own."""

    widths: tuple[int, ...]
    radial_widths: tuple[int, ...]
    average_degree: float

    @nn.compact
    def __call__(self, messages: Messages, basis_ExK: Array, couplings: Couplings) -> Features:
        dtype = basis_ExK.dtype
        # Lin of the number 1.
        start_C = self.param("start", nn.initializers.normal(1.0), self.widths[:1])
        start_C = start_C + self.param("start_bias", nn.initializers.zeros, self.widths[:1])
        weights = _Radial(self.widths, self.radial_widths, name="radial")(basis_ExK)
        # Every atom sends the same scalars, and no vectors: the first path to each order is left.
        pairs = [
            couplings[0, k, k][:, 0, :, None] * messages.of_edge(weights[k])[:, None]
            for k in range(len(self.widths))
        ]
        fan_in = [0] * len(self.widths)
        for l1, _, l3 in _paths(len(self.widths)):
            fan_in[l3] += self.widths[l1]
        sums = [
            jnp.pad(x * start_C.astype(dtype), [(0, 0), (0, 0), (0, size - x.shape[-1])])
            for x, size in zip(_sum_at_receiver(messages, pairs), fan_in, strict=True)
        ]
        # Lin of a sum instead of a sum of Lin: each neighbour brings its bias.
        first, *others = _Linear(self.widths, use_bias=False, name="out")(sums)
        bias_C = self.param("bias", nn.initializers.zeros, self.widths[:1]).astype(dtype)
        first += (messages.count_Nx1.astype(dtype) * bias_C)[:, None]
        return [x / math.sqrt(self.average_degree) for x in (first, *others)]


class _Basis(nn.Module):
    """Gaussians of a scaled distance, `[E] -> [E, K]`: centres, widths and scaling are trained."""

    num_radial: int
    cutoff: float

    @nn.compact
    def __call__(self, r_E: Array) -> Array:
        uniform = lambda low, high: (
            lambda key, shape: jax.random.uniform(key, shape, minval=low, maxval=high)
        )
        param = lambda name, init, size: self.param(name, init, (size,)).astype(r_E.dtype)
        mean_K = param("mean", uniform(0, 1), self.num_radial)
        std_K = param("std", uniform(1 / self.num_radial, 1), self.num_radial)
        scale_1 = param("scale", nn.initializers.ones, 1)
        shift_1 = param("shift", nn.initializers.zeros, 1)
        std_K = jnp.abs(std_K) + 1e-5
        scaled_Ex1 = scale_1 * (r_E[:, None] / self.cutoff) + shift_1
        gauss_ExK = jnp.exp(-0.5 * jnp.square((scaled_Ex1 - mean_K) / std_K))
        return gauss_ExK / (math.sqrt(2 * _PI) * std_K)


class _Radial(nn.Module):
    """w(d): `[E, K] ->` for each path (l, j, k) `[E, C_l]`."""

    widths: tuple[int, ...]
    hidden_widths: tuple[int, ...]

    @nn.compact
    def __call__(self, basis_ExK: Array) -> list[Array]:
        x, dtype = basis_ExK, basis_ExK.dtype
        for i, width in enumerate(self.hidden_widths):
            init = _uniform(x.shape[-1])
            x = Dense(width, dtype=dtype, kernel_init=init, name=f"hidden_{i}")(x)
            norm = nn.LayerNorm(
                epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=f"norm_{i}"
            )
            x = nn.silu(norm(x))
        sizes = [self.widths[l1] for l1, _, _ in _paths(len(self.widths))]
        init = _uniform(x.shape[-1])
        x = Dense(sum(sizes), use_bias=False, dtype=dtype, kernel_init=init, name="out")(x)
        x += self.param("offset", init, (sum(sizes),)).astype(dtype)
        return _split(x, sizes)


class _Linear(nn.Module):
    """Lin: the channels of each order to `widths`, as many orders as these; scalars get a bias."""

    widths: tuple[int, ...]
    use_bias: bool = True

    @nn.compact
    def __call__(self, features: Features) -> Features:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        mixed = []
        for order, (x, width) in enumerate(zip(features, self.widths, strict=False)):
            bias, name = self.use_bias and order == 0, f"order_{order}"
            dense = Dense(width, use_bias=bias, dtype=x.dtype, kernel_init=init, name=name)
            mixed.append(dense(x))
        return mixed


class _Norm(nn.Module):
    """Each order divided by its root mean square; scalars less their mean."""

    @nn.compact
    def __call__(self, features: Features) -> Features:
        widths = [x.shape[-1] for x in features]
        weight = self.param("weight", nn.initializers.ones, (sum(widths),))
        bias_C = self.param("bias", nn.initializers.zeros, widths[:1])
        normed = []
        for x, weight_C in zip(features, _split(weight, widths), strict=True):
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            if not normed:
                wide -= wide.mean(axis=-1, keepdims=True)
            square = jnp.square(wide).mean(axis=(-2, -1), keepdims=True)
            normed.append(wide * jax.lax.rsqrt(square + 1e-5) * weight_C)
        normed[0] += bias_C
        return [y.astype(x.dtype) for x, y in zip(features, normed, strict=True)]


def _pairs(graph: Graph, cutoff: float, num_orders: int, dtype):
    """Messages between nodes closer than the cutoff, distance of each edge, couplings."""
    messages = messages_of(graph)
    # From receiver to sender, of the first half of the messages; the other half is turned round.
    d_Ex3 = graph.position[graph.senders] - graph.position[graph.receivers]
    r_E = safe_norm(d_Ex3)
    near_Ex1 = (r_E < cutoff).astype(r_E.dtype)[:, None]
    messages = messages.replace(mask_Mx1=messages.mask_Mx1 * messages.of_edge(near_Ex1))
    couplings = {}
    for l1, l2, l3 in _paths(num_orders):
        matrix = jnp.asarray(math.sqrt(2 * l3 + 1) * clebsch_gordan(l1, l2, l3), r_E.dtype)
        of_edge = jnp.einsum("ej,ljk->elk", spherical_harmonics(l2, d_Ex3), matrix)
        couplings[l1, l2, l3] = jnp.concatenate([of_edge, (-1) ** l2 * of_edge]).astype(dtype)
    return messages, r_E, couplings


def _product(features: Features, couplings: Couplings, weights: Sequence[Array]) -> Features:
    """D(h, Y; w), `[M, 2 k + 1, channels]` of every k, the channels path by path."""
    products = [[] for _ in features]
    for path, w_MxC in zip(_paths(len(features)), weights, strict=True):
        l1, l2, l3 = path
        product = features[l1]
        if l2 > 0:  # Y_0 is 1
            product = jnp.einsum("mab,mac->mbc", couplings[path], product)
        products[l3].append(product * w_MxC[..., None, :])
    return [jnp.concatenate(parts, axis=-1) for parts in products]


def _paths(num_orders: int) -> list[tuple[int, int, int]]:
    """(l1, l2, l3) such that orders l1 and l2 couple to l3."""
    every = itertools.product(range(num_orders), repeat=3)
    return [(l1, l2, l3) for l1, l2, l3 in every if abs(l1 - l2) <= l3 <= l1 + l2]


def _sum_at_receiver(messages: Messages, features: Features) -> Features:
    """All orders in one sum."""
    rows = [x.reshape(len(x), -1) for x in features]
    sum_NxF = messages.sum_at_receiver(jnp.concatenate(rows, axis=-1), messages.mask_Mx1)
    parts = _split(sum_NxF.astype(features[0].dtype), [x.shape[-1] for x in rows])
    return [part.reshape(-1, *x.shape[1:]) for part, x in zip(parts, features, strict=True)]


def _with_gates(widths: tuple[int, ...]) -> tuple[int, ...]:
    return (sum(widths), *widths[1:])


def _gate(features: Features) -> Features:
    """SiLU of the scalars, of which the last are gates of the other orders."""
    scalars, *others = features
    widths = [x.shape[-1] for x in others]
    scalars, *gates = _split(scalars, [scalars.shape[-1] - sum(widths), *widths])
    gated = [_SIGMOID * nn.sigmoid(g) * x for g, x in zip(gates, others, strict=True)]
    return [_SILU * nn.silu(scalars), *gated]


def _add(features: Features, change: Features) -> Features:
    return [x + y for x, y in zip(features, change, strict=True)]


def _split(x: Array, sizes: Sequence[int]) -> list[Array]:
    """The last axis in parts."""
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=-1)


def _uniform(fan_in: int):
    """PyTorch's initial weights of a linear layer."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
