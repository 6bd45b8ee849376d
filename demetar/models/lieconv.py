"""LieConv with the group T(3) (Finzi et al. 2020): convolution over pairs by relative position.

As its official code, so that the same weights give the same numbers. h starts as a linear map of
each element, and a block adds to it (Section 4 and Figure 4; BN is a batch normalisation):

    t    = swish(BN(W swish(BN(h))))                                             k -> k/4
    w_ij = MLP(x_i - x_j), three times swish(BN(W .)): 3 -> 32 -> 32 -> 16
    t_i  = (W sum_j t_j w_ij^T + b) / number of neighbours                       Equation 7
    h   += W swish(BN(t))                                                        k/4 -> k

Neighbours are the candidate pairs closer than the radius, and each node itself. At the end the
mean over atoms of W swish(BN(h)). Invariant under translation alone: a model in the loop may learn
rotations from turned copies of the data, as the authors trained it.

**What BN takes its statistics from.** The official ones are of all real atoms (for w: all pairs of
neighbours) of a batch in training, and running averages of them otherwise: a prediction for one
graph depends on others, and there is state beside the parameters. In our loop there is neither:

    in training and prediction   the real atoms, or pairs, of the graph itself: a stand-in
    given the collection `batch_stats` (golden tests)   the running averages in it
    `batch_axis` set in a subclass (golden tests)       the atoms, or pairs, of all graphs of a vmap

All three divide by sqrt(max(variance, 1e-5)): clamped, not added. The stand-in takes away the
scale of a whole graph: one that is stretched evenly, with the same neighbours, gives the same.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import GraphModel
from demetar.models.layers import atom_features, mean_of_nodes, safe_norm, torch_dense

_MIN_VARIANCE = 1e-5
_WEIGHT_WIDTHS = (32, 32, 16)  # of the MLP of relative positions


class LieConv(GraphModel):
    """Predicts graph targets as a mean or a sum over atoms.

    Attributes:
      elements: atomic numbers of the data.
      width: k, of node features; a multiple of 4.
      num_layers: blocks, each with its own weights.
      radius: angstrom; nodes further apart are no neighbours. The official ball starts at 10 and
        grows in training until it holds whole molecules.
      dtype: of features; distances are float32 or wider.
    """

    READOUTS: ClassVar = ("mean", "sum")
    LEAST: ClassVar = {"width": 4}
    symmetries: ClassVar = frozenset({"translation", "permutation"})
    batch_axis: ClassVar[str | None] = None  # name of the vmapped axis over the graphs of a batch

    elements: tuple[int, ...]
    width: int = 1536
    num_layers: int = 6
    radius: float = 10.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        x_Nx3, mask_N = graph.position, graph.node_mask
        shift_NxNx3 = (x_Nx3[:, None] - x_Nx3).astype(self.dtype)
        near_NxN = _candidates(graph) & (safe_norm(x_Nx3[:, None] - x_Nx3) < self.radius)
        features = atom_features(graph.atomic_number, self.elements, x_Nx3.dtype)
        h_NxD = torch_dense(self.width, features.shape[-1], self.dtype, "atom_embedding")(features)
        for number in range(self.num_layers):
            block = _Block(self.batch_axis, name=f"block_{number}")
            h_NxD = block(h_NxD, shift_NxNx3, mask_N, near_NxN)
        h_NxD = nn.swish(_Norm(self.batch_axis, name="norm")(h_NxD, mask_N))
        self.keep_embedding(lambda: mean_of_nodes(graph, h_NxD))
        value_NxT = torch_dense(len(self.targets), self.width, self.dtype, "head")(h_NxD)
        mean_T = mean_of_nodes(graph, value_NxT.astype(x_Nx3.dtype))
        return {
            target.name: mean if target.readout == "mean" else mean * mask_N.sum()
            for target, mean in zip(self.targets, mean_T, strict=True)
        }


def _candidates(graph: Graph) -> Array:
    """[N, N] bool: which nodes the edges of the graph join, both ways, and each to itself."""
    num_nodes = len(graph.node_mask)
    joined_NxN = jnp.zeros((num_nodes, num_nodes), bool)
    joined_NxN = joined_NxN.at[graph.receivers, graph.senders].max(graph.edge_mask)
    own_NxN = jnp.eye(num_nodes, dtype=bool) & graph.node_mask
    return joined_NxN | joined_NxN.T | own_NxN


class _Block(nn.Module):
    """A residual block with a bottleneck around the convolution, `[N, D]`."""

    batch_axis: str | None

    @nn.compact
    def __call__(self, h_NxD: Array, shift_NxNx3: Array, mask_N: Array, near_NxN: Array):
        width, dtype = h_NxD.shape[-1], h_NxD.dtype
        inner = width // 4
        norm = lambda x, name: nn.swish(_Norm(self.batch_axis, name=name)(x, mask_N))
        t_NxC = norm(torch_dense(inner, width, dtype, "reduce")(norm(h_NxD, "norm_in")), "norm_0")
        convolution = _Convolution(self.batch_axis, name="convolution")
        t_NxC = norm(convolution(t_NxC, shift_NxNx3, near_NxN), "norm_1")
        return h_NxD + torch_dense(width, inner, dtype, "expand")(t_NxC)


class _Convolution(nn.Module):
    """Mean over neighbours of features times weights of their relative position, `[N, C]`.

    All pairs are computed, each once. The sum over neighbours comes before the linear map of the
    products: there is no product [C x 16] of a pair, only of a node.
    """

    batch_axis: str | None

    @nn.compact
    def __call__(self, t_NxC: Array, shift_NxNx3: Array, near_NxN: Array) -> Array:
        (num_nodes, channels), dtype = t_NxC.shape, t_NxC.dtype
        near_P, w_PxA = near_NxN.reshape(-1), shift_NxNx3.reshape(-1, 3)
        for number, features in enumerate(_WEIGHT_WIDTHS):
            w_PxA = torch_dense(features, w_PxA.shape[-1], dtype, f"weight_{number}")(w_PxA)
            w_PxA = nn.swish(_Norm(self.batch_axis, name=f"norm_{number}")(w_PxA, near_P))
        w_NxNxA = jnp.where(near_P[:, None], w_PxA, 0).reshape(num_nodes, num_nodes, -1)
        sum_NxCxA = jnp.einsum("ija,jc->ica", w_NxNxA, t_NxC)
        fan_in = channels * _WEIGHT_WIDTHS[-1]
        out_NxC = torch_dense(channels, fan_in, dtype, "out")(sum_NxCxA.reshape(num_nodes, -1))
        return out_NxC / jnp.maximum(near_NxN.sum(axis=1, keepdims=True), 1).astype(dtype)


class _Norm(nn.Module):
    """(x - mean) / sqrt(max(variance, 1e-5)) of each channel, scaled and shifted; `[P, C]`.

    Where the mean and the variance come from, the module's docstring says.
    """

    batch_axis: str | None

    @nn.compact
    def __call__(self, x_PxC: Array, mask_P: Array) -> Array:
        channels, dtype = x_PxC.shape[-1], x_PxC.dtype
        scale_C = self.param("scale", nn.initializers.ones, (channels,))
        bias_C = self.param("bias", nn.initializers.zeros, (channels,))
        wide_PxC = x_PxC.astype(jnp.promote_types(dtype, jnp.float32))
        if self.has_variable("batch_stats", "mean"):
            mean_C = self.get_variable("batch_stats", "mean")
            variance_C = self.get_variable("batch_stats", "variance")
        else:
            mean_C = self._mean(wide_PxC, mask_P)
            variance_C = self._mean(jnp.square(wide_PxC - mean_C), mask_P)
        factor_C = scale_C * jax.lax.rsqrt(jnp.maximum(variance_C, _MIN_VARIANCE))
        return ((wide_PxC - mean_C) * factor_C + bias_C).astype(dtype)

    def _mean(self, x_PxC: Array, mask_P: Array) -> Array:
        sum_C, count = jnp.where(mask_P[:, None], x_PxC, 0).sum(axis=0), mask_P.sum()
        if self.batch_axis:
            sum_C, count = jax.lax.psum((sum_C, count), self.batch_axis)
        return sum_C / jnp.maximum(count, 1)
