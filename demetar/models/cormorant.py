"""Cormorant: covariant molecular neural network (Anderson, Hy and Kondor 2019).

Features F^l_i of an atom are C complex vectors of every order l. A level computes, with complex
matrices W and products of Clebsch and Gordan (x), over all pairs i, j, the pair (i, i) included:

    E^l_ij = s(|d_ij|) W_l [E^l_ij, F^l'_i . F^l'_j for all l', b(|d_ij|)]             edges
    F^l_i <- W'_l [sum_j (E^l1_ij Y_l1(d_ij)) (x) F^l2_j, F^l_i, F^l1_i (x) F^l2_i]    atoms

d_ij = x_i - x_j, Y_l(d) = |d|^l times the harmonics of its direction, s a soft cutoff of each
channel, and b_nq(r) = sin(2 pi a_n r + phi_n) r^-q, all trained. The products are the only
non-linearity. Read are invariants of every level: F^0, F^l . F^l and |F^l|^2.

The paper's components are those of complex harmonics. Here they are those of real ones: another
basis for the same network, in which every coupling and harmonic is real but for the factor
(-i)^l of Y_l, and F . G = (-1)^l sum_m F_m G_m. Weights are stored as real and imaginary parts.
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import GraphModel
from demetar.models.layers import atom_features, safe_norm, torch_dense
from demetar.models.spherical import clebsch_gordan, spherical_harmonics

_READ = 64  # features of an atom that are summed


class Cormorant(GraphModel):
    """Predicts graph targets from a sum over nodes. Not invariant under reflections.

    Attributes:
      elements: atomic numbers of the data.
      width: C, complex channels of every order.
      max_order: largest l of features and harmonics.
      num_levels: rounds of messages.
      hidden: width of the hidden layers at the input and at the read-out.
      num_trigonometric: the basis of levels has phases and frequencies 0 .. this, at first.
      num_powers: and powers 0 .. this of 1 / r.
      hard_cutoff: no atom past it is seen by the input layer, angstrom.
      soft_cutoff: where the soft cutoffs are one half, at first.
      cutoff_width: of the soft cutoffs, at first, angstrom.
      gain: of the initial weights of atoms.
      dtype: of dense layers; complex features are of two float32 or wider.
    """

    READOUTS: ClassVar = ("sum",)
    symmetries: ClassVar = frozenset({"rotation", "translation", "permutation"})
    LEAST: ClassVar = {"max_order": 0, "num_trigonometric": 0, "num_powers": 0}

    elements: tuple[int, ...]
    width: int = 16
    max_order: int = 3
    num_levels: int = 4
    hidden: int = 256
    num_trigonometric: int = 3
    num_powers: int = 3
    hard_cutoff: float = 1.73
    soft_cutoff: float = 1.73
    cutoff_width: float = 0.2
    gain: float = 10.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        mask_NxN, r_NxN, harmonics = _pairs(graph, self.max_order)
        numbers_NxF = atom_features(graph.atomic_number, self.elements, r_NxN.dtype)
        cut_NxN = nn.sigmoid((self.soft_cutoff - r_NxN) / self.cutoff_width)
        cut_NxN = jnp.where(mask_NxN & (r_NxN < self.hard_cutoff), cut_NxN, 0)
        first = _Input(self.width, self.hidden, self.dtype, name="input")
        features = [first(numbers_NxF, _Basis(3, 3, name="input_basis")(r_NxN), cut_NxN)]
        edges, levels = None, []
        for k in range(self.num_levels):
            basis = _Basis(self.num_trigonometric, self.num_powers, name=f"basis_{k}")
            sizes = (self.width, self.max_order, self.soft_cutoff, self.cutoff_width)
            of_edges = _Edges(*sizes, name=f"edges_{k}")
            edges = of_edges(edges, features, basis(r_NxN), r_NxN, mask_NxN)
            features = _Atoms(self.gain, name=f"atoms_{k}")(edges, features, harmonics)
            levels.append(features)
        flat_NxF = invariants(levels).reshape(len(r_NxN), -1)
        mlp = lambda features, name: _Mlp(self.hidden, features, self.dtype, name=name)
        h_NxD = jnp.where(graph.node_mask[:, None], mlp(_READ, "atom")(flat_NxF), 0)
        targets = self.names("sum")
        values_T = mlp(len(targets), "graph")(h_NxD.sum(axis=0)[None])[0].astype(r_NxN.dtype)
        return dict(zip(targets, values_T, strict=True))


class _Input(nn.Module):
    """F^0 `[N, C, 1]`: an MLP of an atom's numbers s_i and sum_j e_ij s_j, e_ij linear in b."""

    width: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, s_NxF: Array, basis_NxNxK: Array, cut_NxN: Array) -> Array:
        radial = torch_dense(s_NxF.shape[-1], basis_NxNxK.shape[-1], self.dtype, "radial")
        e_NxNxF = radial(basis_NxNxK) * cut_NxN[..., None]
        both_NxF2 = jnp.concatenate([jnp.einsum("ijf,jf->if", e_NxNxF, s_NxF), s_NxF], axis=-1)
        parts_NxC2 = _Mlp(self.hidden, 2 * self.width, self.dtype, name="mlp")(both_NxF2)
        return _complex(parts_NxC2.reshape(-1, self.width, 1, 2))


class _Basis(nn.Module):
    """b_nq(r) `[N, N, 2 (t + 1) (p + 1)]`, 0 at r = 0: sines, then cosines, each with all q."""

    num_trigonometric: int
    num_powers: int

    @nn.compact
    def __call__(self, r_NxN: Array) -> Array:
        numbers = np.arange(self.num_trigonometric + 1.0)
        phases = np.where(np.arange(2 * len(numbers)) < len(numbers), 0, math.pi / 2)
        phases[0] = math.pi / 2  # a sine of frequency 0 would be 0 at every r
        constant = lambda values: lambda key: jnp.asarray(values, jnp.float32)
        scale_S = self.param("scale", constant(np.tile(numbers, 2))).astype(r_NxN.dtype)
        phase_S = self.param("phase", constant(phases)).astype(r_NxN.dtype)
        apart = r_NxN[..., None, None] > 0
        r = jnp.where(apart, r_NxN[..., None, None], 1)
        wave = jnp.sin(2 * math.pi * scale_S[:, None] * r + phase_S[:, None])
        powers = [jnp.ones_like(r)]
        for _ in range(self.num_powers):
            powers.append(powers[-1] / r)
        basis = jnp.where(apart, wave * jnp.concatenate(powers, axis=-1), 0)
        return basis.reshape(*r_NxN.shape, -1)


class _Edges(nn.Module):
    """E `[N, N, L, C]`: one complex number per pair, order and channel."""

    width: int
    max_order: int
    cutoff: float
    cutoff_width: float

    @nn.compact
    def __call__(self, edges, features, basis_NxNxK, r_NxN, mask_NxN) -> Array:
        width, num = self.width, self.max_order + 1
        dots = [
            (-1) ** order * jnp.einsum("icm,jcm->ijc", f_NxCxm, f_NxCxm)
            for order, f_NxCxm in enumerate(features)
        ]
        # Of the basis, neighbours in the list are the real and the imaginary part.
        inputs = {
            "dots": jnp.concatenate(dots, axis=-1),
            "basis": _complex(basis_NxNxK.reshape(*r_NxN.shape, -1, 2)),
        }
        # The dot products feed the orders that the features have: at first l = 0 alone.
        orders = {"dots": len(features), "basis": num}
        size = sum(x.shape[-1] for x in inputs.values()) + (0 if edges is None else width)
        draw = lambda key, shape: jax.random.normal(key, shape) / max(width, size)
        mixed = 0 if edges is None else self._mix("edges", draw, "ijlp,plc->ijlc", edges, num)
        for name, x_NxNxP in inputs.items():
            fed = self._mix(name, draw, "ijp,plc->ijlc", x_NxNxP, orders[name])
            mixed += jnp.pad(fed, [(0, 0), (0, 0), (0, num - orders[name]), (0, 0)])
        constant = lambda value: lambda key, shape: jnp.full(shape, value)
        radius_C = self.param("radius", constant(self.cutoff), (width,))
        width_C = self.param("decay", constant(self.cutoff_width), (width,))
        slope_C = 1 / jnp.maximum(jnp.abs(width_C), 1e-3)
        soft = nn.sigmoid((jnp.abs(radius_C) - r_NxN[..., None]) * slope_C)
        return mixed * jnp.where(mask_NxN[..., None], soft, 0)[:, :, None]

    def _mix(self, name: str, draw, formula: str, x: Array, num_orders: int) -> Array:
        shape = (x.shape[-1], num_orders, self.width, 2)
        return jnp.einsum(formula, x, _complex(self.param(name, draw, shape)).astype(x.dtype))


class _Atoms(nn.Module):
    """The next F, a list over l of `[N, C, 2 l + 1]`."""

    gain: float

    @nn.compact
    def __call__(self, edges_NxNxLxC: Array, features: list, harmonics: list) -> list[Array]:
        num, width = len(harmonics), features[0].shape[1]
        rows_NxCxM = jnp.concatenate(features, axis=-1)
        around = [
            (edges_NxNxLxC[:, :, order] * (-1j) ** order)[..., None] * harmonics[order][:, :, None]
            for order in range(num)
        ]
        # sum_j first, for every pair of components: then one coupling per atom, not per message.
        products_NxCxmxn = jnp.einsum(
            "ijcm,jcn->icmn", jnp.concatenate(around, axis=-1), rows_NxCxM
        )
        squares_NxCxmxn = rows_NxCxM[..., :, None] * rows_NxCxM[..., None, :]
        coupled = _couple(products_NxCxmxn, num)
        coupled_with_self = _couple(squares_NxCxmxn, num)
        mixed = []
        for order in range(num):
            parts = coupled[order] + features[order : order + 1] + coupled_with_self[order]
            parts_NxFxm = jnp.concatenate(parts, axis=1)
            shape = (parts_NxFxm.shape[1], width, 2)
            draw = lambda key, shape: (
                jax.random.uniform(key, shape, minval=-1) * (self.gain / max(shape))
            )
            kernel = _complex(self.param(f"order_{order}", draw, shape))
            mixed.append(jnp.einsum("ifm,fc->icm", parts_NxFxm, kernel.astype(parts_NxFxm.dtype)))
        return mixed


def _couple(products_NxCxmxn: Array, num_orders: int) -> list[list[Array]]:
    """Of products of components, those that are vectors: for each l, `[N, C, 2 l + 1]` of every
    (l1, l2) in order."""
    # The gradient of a split is one concatenation; that of a slice is a sum of padded arrays.
    components = lambda x, axis: jnp.split(
        x, [order**2 for order in range(1, math.isqrt(x.shape[axis]))], axis
    )
    coupled = [[] for _ in range(num_orders)]
    for order_1, rows in enumerate(components(products_NxCxmxn, -2)):
        for order_2, block in enumerate(components(rows, -1)):
            orders = range(abs(order_1 - order_2), min(order_1 + order_2 + 1, num_orders))
            matrix = [math.sqrt(2 * k + 1) * clebsch_gordan(order_1, order_2, k) for k in orders]
            matrix = jnp.asarray(np.concatenate(matrix, axis=-1), block.dtype)
            vectors = jnp.einsum("icmn,mnk->ick", block, matrix)
            starts = [k**2 - orders[0] ** 2 for k in orders[1:]]
            for k, vector in zip(orders, jnp.split(vectors, starts, axis=-1), strict=True):
                coupled[k].append(vector)
    return coupled


def invariants(levels: list[list[Array]]) -> Array:
    """Pairs of real numbers `[N, F, 2]` of the features of all levels."""
    orders = [jnp.concatenate(parts, axis=1) for parts in zip(*levels, strict=True)]
    scalar_NxF = orders[0][..., 0]
    pairs = [jnp.stack([scalar_NxF.real, scalar_NxF.imag], axis=-1)]
    for order, f_NxFxm in enumerate(orders):
        dot = (-1) ** order * jnp.square(f_NxFxm).real.sum(axis=-1)
        length = (jnp.square(f_NxFxm.real) + jnp.square(f_NxFxm.imag)).sum(axis=-1)
        pairs.append(jnp.stack([dot, length], axis=-1))
    return jnp.concatenate(pairs, axis=1)


def _pairs(graph: Graph, max_order: int) -> tuple[Array, Array, list[Array]]:
    """Of all pairs of nodes: whether they are an edge or one node, distance, |d|^l Y_l."""
    mask_NxN = jnp.diag(graph.node_mask)
    mask_NxN = mask_NxN.at[graph.senders, graph.receivers].max(graph.edge_mask)
    mask_NxN = mask_NxN | mask_NxN.T
    d_NxNx3 = graph.position[:, None] - graph.position
    d_NxNx3 = jnp.where(mask_NxN[..., None], d_NxNx3, 0)
    r_NxN = safe_norm(d_NxNx3)
    return mask_NxN, r_NxN, [solid_harmonics(k, d_NxNx3) for k in range(max_order + 1)]


def solid_harmonics(order: int, d_NxNx3: Array) -> Array:
    """|d|^l Y_l(d), real, `[N, N, 2 l + 1]`: their squares add up to |d|^2l."""
    return safe_norm(d_NxNx3)[..., None] ** order * spherical_harmonics(order, d_NxNx3, "norm")


class _Mlp(nn.Module):
    """Linear, leaky ReLU, linear."""

    hidden: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.leaky_relu(torch_dense(self.hidden, x.shape[-1], self.dtype, "hidden")(x))
        return torch_dense(self.features, self.hidden, self.dtype, "out")(x)


def _complex(parts: Array) -> Array:
    """Of real and imaginary parts on the last axis."""
    wide = parts.astype(jnp.promote_types(parts.dtype, jnp.float32))
    return jax.lax.complex(wide[..., 0], wide[..., 1])
