"""What Tensor Field Networks and the SE(3)-Transformer share: features that turn, and kernels.

A node's features of degree l turn by the rotation matrices of order l. They are kept as
`[N, 2 l + 1, C]`, by degree. A kernel from degree l to k maps along one relative position
d_ij = x_i - x_j (Fuchs et al. 2020, Equation 8; as their code):

    K^lk(d)[o m, i m'] = sum_J R^lk_oiJ(|d|, e) sum_M Y_JM(d) Q_J[m, m', M],   J = |l - k| .. l + k

Y are real spherical harmonics, Q what couples degrees l and J to k, and R a network of the
distance and the pair's features e: linear, layer norm, ReLU, twice, and linear.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.graph import Array, Graph
from demetar.models.base import GraphModel
from demetar.models.layers import Dense, Messages, messages_of, safe_norm
from demetar.models.spherical import clebsch_gordan, spherical_harmonics

Features = Mapping[int, Array]  # degree l -> [N, 2 l + 1, C]
HIDDEN = 32  # width of the radial networks
NUM_BONDS = 4
# (J, l, k) where the official code's numerical null space has the other sign than the rest.
_NEGATIVE = {(1, 1, 1), (2, 1, 1), (2, 1, 2), (3, 1, 2), (3, 2, 1), (2, 2, 2), (3, 2, 2)}


class EquivariantModel(GraphModel):
    """What both models read of a graph, and how they predict.

    Molecules: bonds are the edges, whatever other pairs the graph holds; numbers of the graph are
    pooled over atoms as the targets' read-out says. Particles (with a velocity): all edges, and
    each node's move and change of velocity, added to what it has.
    """

    READOUTS: ClassVar = ("mean", "max", "sum", "position", "velocity")
    symmetries: ClassVar = frozenset({"rotation", "translation", "permutation"})

    def check(self) -> None:
        super().check()
        if len(readouts := {t.readout for t in self.targets if not t.per_node}) > 1:
            raise UserError(
                f"This model pools its atoms in one way, but the targets are read out by "
                f"{', '.join(sorted(readouts))}: choose one by config.model.readout."
            )
        if self.vector_targets and self.num_degrees < 2:
            raise UserError(
                f"config.model.num_degrees ({self.num_degrees}) must be at least 2: a vector such "
                f"as {self.vector_targets[0]} has degree 1."
            )
        if len({t.per_node for t in self.targets}) > 1:
            raise UserError(
                "This model predicts numbers of a graph or vectors of its nodes, not both at once: "
                f"choose of {', '.join(t.name for t in self.targets)}."
            )

    @property
    def vector_targets(self) -> list[str]:
        """Targets that are vectors of nodes: the move first, then the change of velocity."""
        return self.names("position") + self.names("velocity")

    def moved(self, graph: Graph, vector_NxTx3: Array) -> dict[str, Array]:
        """Positions and velocities after the horizon, of the model's vectors."""
        start = dict.fromkeys(self.names("position"), graph.position)
        start |= dict.fromkeys(self.names("velocity"), graph.velocity)
        return {
            name: jnp.where(graph.node_mask[:, None], start[name] + vector_NxTx3[:, t], 0)
            for t, name in enumerate(self.vector_targets)
        }

    def graph_numbers(self, graph: Graph, x_NxD: Array) -> dict[str, Array]:
        """The targets of the graph, of scalars of its nodes: pooled, linear, ReLU, linear."""
        pooled_1xD = pooled(self.targets[0].readout, x_NxD, graph.node_mask)[None]
        hidden = Dense(x_NxD.shape[-1], dtype=self.dtype, name="hidden")
        out = Dense(len(self.targets), dtype=self.dtype, name="out")
        values_T = out(nn.relu(hidden(pooled_1xD)))[0].astype(graph.position.dtype)
        return dict(zip([t.name for t in self.targets], values_T, strict=True))


def pooled(readout: str, x_NxD: Array, node_mask_N: Array) -> Array:
    """Mean, largest or sum over the nodes, `[D]`."""
    mask_Nx1 = node_mask_N[:, None]
    if readout == "max":
        largest_D = jnp.where(mask_Nx1, x_NxD, -jnp.inf).max(axis=0)
        return jnp.where(mask_Nx1.any(), largest_D, 0)
    sum_D = jnp.where(mask_Nx1, x_NxD, 0).sum(axis=0)
    return sum_D / jnp.maximum(mask_Nx1.sum(), 1) if readout == "mean" else sum_D


@flax.struct.dataclass
class Pairs:
    """What kernels read of the pairs that send messages.

    Attributes:
      messages: both directions of each edge.
      basis: (l, k) -> [M, 2 k + 1, J, 2 l + 1], the sums over M of the module's equation.
      radial_ExF: input of the radial networks.
      relative_Mx3: x_i - x_j, receiver minus sender.
    """

    messages: Messages
    basis: dict[tuple[int, int], Array]
    radial_ExF: Array
    relative_Mx3: Array


def pairs_of(graph: Graph, num_degrees: int, dtype) -> Pairs:
    """The pairs of one graph without padding values, for degrees below `num_degrees`."""
    if graph.velocity is None:
        graph = graph.replace(edge_mask=graph.edge_mask & (graph.edge_type > 0))
        feature_ExF = jax.nn.one_hot(graph.edge_type - 1, NUM_BONDS)
    else:
        feature_ExF = (graph.charge[graph.senders] * graph.charge[graph.receivers])[:, None]
    messages = messages_of(graph)
    relative_Ex3 = graph.position[graph.receivers] - graph.position[graph.senders]
    distance_Ex1 = safe_norm(relative_Ex3)[:, None]
    harmonics = {}
    for order in range(2 * num_degrees - 1):
        y_ExM = spherical_harmonics(order, relative_Ex3, "integral")
        harmonics[order] = jnp.concatenate([y_ExM, (-1) ** order * y_ExM])
    basis = {
        (start, k): jnp.stack(
            [
                jnp.einsum("yz,abz->yab", harmonics[order], _coupling(start, k, order))
                for order in range(abs(start - k), start + k + 1)
            ],
            axis=2,
        ).astype(dtype)
        for start, k in itertools.product(range(num_degrees), repeat=2)
    }
    radial_ExF = jnp.concatenate([feature_ExF, distance_Ex1], axis=-1).astype(dtype)
    return Pairs(messages, basis, radial_ExF, jnp.concatenate([relative_Ex3, -relative_Ex3]))


def _coupling(start: int, k: int, order: int) -> np.ndarray:
    """Q_J with the official code's sign of it and of Y_J, `[2 k + 1, 2 l + 1, 2 J + 1]`."""
    sign = -1 if (order, start, k) in _NEGATIVE else 1
    return sign * (-1) ** (start + k) * clebsch_gordan(k, start, order)


def _uniform(fan_in: int):
    """He et al. 2015, uniform: PyTorch's `kaiming_uniform_`."""
    bound = math.sqrt(6 / fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Radial(nn.Module):
    """One radial network for each pair (l, k), `[E, F] -> (l, k) -> [E, J, C_in, C_out]`.

    All read the same, so their first layers are one, and the next is one for all of them too.
    """

    shapes: Mapping[tuple[int, int], tuple[int, int, int]]
    dtype: Any

    @nn.compact
    def __call__(self, x_ExF: Array) -> dict[tuple[int, int], Array]:
        num = len(self.shapes)
        norm = lambda name: nn.LayerNorm(
            1e-5, self.dtype, feature_axes=(-2, -1), use_fast_variance=False, name=name
        )
        first = Dense(
            num * HIDDEN, dtype=self.dtype, kernel_init=_uniform(x_ExF.shape[-1]), name="first"
        )
        x_ExPxD = nn.relu(norm("norm_0")(first(x_ExF).reshape(-1, num, HIDDEN)))
        kernel = self.param("kernel", _uniform(HIDDEN), (num, HIDDEN, HIDDEN))
        bias = self.param("bias", nn.initializers.zeros, (num, HIDDEN))
        x_ExPxD = jnp.einsum("epa,pab->epb", x_ExPxD, kernel.astype(self.dtype))
        x_ExPxD = nn.relu(norm("norm_1")(x_ExPxD + bias.astype(self.dtype)))
        radial = {}
        for p, ((start, k), shape) in enumerate(self.shapes.items()):
            last = Dense(
                math.prod(shape),
                dtype=self.dtype,
                kernel_init=_uniform(HIDDEN),
                name=f"{start}_{k}",
            )
            radial[start, k] = last(x_ExPxD[:, p]).reshape(-1, *shape)
        return radial


class Kernels(nn.Module):
    """`sum_l K^lk(d_ij) f^l_j` for each message, by degree k: `[M, 2 k + 1, C_out]`.

    Attributes:
      channels: degree k -> C_out.
      add_relative: x_i - x_j is added to the first channel of degree 1, if it has more than one.
    """

    channels: Mapping[int, int]
    dtype: Any
    add_relative: bool = False

    @nn.compact
    def __call__(self, features: Features, pairs: Pairs) -> dict[int, Array]:
        num_edges = pairs.messages.num_edges
        sent = {k: pairs.messages.of_sender(f).astype(self.dtype) for k, f in features.items()}
        if self.add_relative and sent.get(1, np.zeros(1)).shape[-1] > 1:
            # Harmonics of order 1 are (x, y, z), so a vector is a feature as it is.
            sent[1] = sent[1].at[..., 0].add(pairs.relative_Mx3.astype(self.dtype))
        shapes = {
            (start, k): (2 * min(start, k) + 1, sent[start].shape[-1], self.channels[k])
            for start in sorted(sent)
            for k in sorted(self.channels)
        }
        radial = Radial(shapes, self.dtype, name="radial")(pairs.radial_ExF)
        result = {}
        for k in sorted(self.channels):
            total = 0
            for start in sorted(sent):
                turned_Mx = jnp.einsum("ykJl,yli->ykJi", pairs.basis[start, k], sent[start])
                # Both directions of an edge have one radial network: one product for both.
                paths = math.prod(shapes[start, k][:2])
                turned_2xEx = turned_Mx.reshape(2, num_edges, 2 * k + 1, paths)
                rows_Ex = turned_2xEx.swapaxes(0, 1).reshape(num_edges, 2 * (2 * k + 1), paths)
                radial_Ex = radial[start, k].reshape(num_edges, paths, self.channels[k])
                total += jnp.einsum("erx,exo->ero", rows_Ex, radial_Ex)
            sum_Ex2xC = total.reshape(num_edges, 2, 2 * k + 1, self.channels[k])
            result[k] = jnp.concatenate([sum_Ex2xC[:, 0], sum_Ex2xC[:, 1]])
        return result


def sum_at_receiver(messages: Messages, x_Mxc: Array, weight_Mx1: Array) -> Array:
    """`Messages.sum_at_receiver` of features with their components, `[N, 2 l + 1, C]`."""
    flat_NxF = messages.sum_at_receiver(x_Mxc.reshape(len(x_Mxc), -1), weight_Mx1)
    return flat_NxF.reshape(-1, *x_Mxc.shape[1:])


class Mix(nn.Module):
    """`W^k f^k` of each degree, without bias: the self-interaction "1x1"."""

    channels: Mapping[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, features: Features) -> dict[int, Array]:
        draw = nn.initializers.variance_scaling(1, "fan_in", "normal")
        return {
            k: Dense(c, False, self.dtype, draw, name=f"degree_{k}")(features[k])
            for k, c in sorted(self.channels.items())
            if k in features
        }


class NormNonlinearity(nn.Module):
    """A non-linearity of lengths: f_c <- t_c f_c / |f_c|, by degree.

    t = ReLU(LayerNorm_c |f_c|) or, with `bias` (particles), t_c = ReLU(|f_c| + b_c).
    What vanishes by a symmetry of the graph has no direction: rounding decides it, here as in the
    official code.
    """

    bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, features: Features) -> dict[int, Array]:
        result = {}
        for k, f in sorted(features.items()):
            wide = f.astype(jnp.promote_types(f.dtype, jnp.float32))
            length_NxC = safe_norm(wide.swapaxes(1, 2))
            if self.bias:
                draw = nn.initializers.normal(1.0)
                bias_C = self.param(f"bias_{k}", draw, f.shape[-1:])
                scale_NxC = nn.relu(length_NxC + bias_C)
            else:
                norm = nn.LayerNorm(1e-5, use_fast_variance=False, name=f"norm_{k}")
                scale_NxC = nn.relu(norm(length_NxC))
            safe_NxC = jnp.where(length_NxC > 0, jnp.maximum(length_NxC, 1e-12), 1)
            result[k] = ((scale_NxC / safe_NxC)[:, None] * wide).astype(self.dtype)
        return result


def atom_features(graph: Graph, elements: tuple[int, ...], dtype) -> Features:
    """Degree 0 of molecules: one-hot element and Z, `[N, 1, elements + 1]`."""
    number_Nx1 = graph.atomic_number[:, None]
    one_hot_NxZ = number_Nx1 == jnp.asarray(elements)
    return {0: jnp.concatenate([one_hot_NxZ, number_Nx1], axis=-1).astype(dtype)[:, None]}
