"""DEMETAr in edge space: the E(3)-equivariant double-encoder transformer for positions.

The DEMETAr post's future work, taken further. Node tokens attend to their edges' tokens (one per
pair), edges read the tokens of their two nodes, and the edges' outputs weight relative
vectors (its Equation 6 with the transformer in the place of phi). One round, whose weights all
rounds share:

    edge tokens   <- invariants of the pair's vectors as they are now, both node tokens
    node tokens   <- attention to their own edges (Equation 9), then an MLP
    velocities    <- v_i += t sum_j a_ij (x_i - x_j) / |x_i - x_j| + b_ij (v_i - v_j)
    positions     <- x_i += t v_i + the same sum with gates of its own

where t is the horizon / `rounds`.

Symmetries: gates are invariant scalars that do not depend on which end of an edge comes
first, so outputs turn, reflect and permute with the inputs. Every move is equal and opposite
on the two ends, and velocities enter as differences, so the centre of mass moves freely and
the prediction is also the same for an observer in uniform motion. Charges enter through
products alone: flipping all of them changes nothing.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import GraphModel
from demetar.models.layers import Attention, Dense, Mlp, layer_norm, mask_bias
from demetar.models.ops import select_rows

_SOFTENING = 1e-6  # added to squares, in the data's length^2: nothing is singular at contact


class DemetarE3(GraphModel):
    """Predicts where the nodes of one padded graph are after the horizon: `[N, 3]`.

    Attributes:
      horizon: time from input to target.
      width: D, of node and edge tokens.
      num_heads: H of the nodes' attention; divides `width`.
      mlp_ratio: hidden width of the MLPs over D.
      rounds: how often the one set of weights is applied.
      num_invariants: learned dot products of a pair's relative position and velocity.
      dtype: of tokens; vectors are float32 or wider.
    """

    READOUTS: ClassVar = ("position",)

    horizon: float
    width: int = 32
    num_heads: int = 4
    mlp_ratio: int = 2
    rounds: int = 12
    num_invariants: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        mask_N = graph.node_mask[:, None]
        mean = lambda x_Nx3: x_Nx3.sum(axis=0) / jnp.maximum(mask_N.sum(), 1)
        x_com_3, v_com_3 = mean(graph.position), mean(graph.velocity)
        x_Nx3 = jnp.where(mask_N, graph.position - x_com_3, 0)
        v_Nx3 = jnp.where(mask_N, graph.velocity - v_com_3, 0)
        vector_Nx3xC = jnp.stack([x_Nx3, v_Nx3], axis=-1)
        token = lambda name: self.param(name, nn.initializers.normal(1.0), (self.width,))
        repeat = lambda x, n: jnp.broadcast_to(x.astype(self.dtype), (n, self.width))
        node_NxD = repeat(token("node"), len(graph.node_mask))
        edge_ExD = repeat(token("edge"), len(graph.edge_mask))
        rounds = nn.scan(
            _Round,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=nn.broadcast,
            length=self.rounds,
        )(
            self.num_heads,
            self.mlp_ratio,
            self.num_invariants,
            self.horizon / self.rounds,
            name="round",
        )
        start = (vector_Nx3xC, node_NxD, edge_ExD)
        (vector_Nx3xC, _, _), _ = rounds(start, _incidence(graph), _coupling(graph))
        moved_Nx3 = vector_Nx3xC[..., 0] + x_com_3 + self.horizon * v_com_3
        return {self.position: jnp.where(mask_N, moved_Nx3, 0)}


class _Round(nn.Module):
    """One update of vectors, node tokens and edge tokens; see the module's docstring."""

    num_heads: int
    mlp_ratio: int
    num_invariants: int
    duration: float

    @nn.compact
    def __call__(self, carry, signed_ExN: Array, coupling_Ex1: Array):
        vector_Nx3xC, node_NxD, edge_ExD = carry  # C = 2: position, velocity
        num_nodes, _, channels = vector_Nx3xC.shape
        width, dtype = node_NxD.shape[-1], node_NxD.dtype
        dense = lambda features, **options: Dense(features, dtype=dtype, **options)
        incident_ExN = jnp.abs(signed_ExN)

        # Of each pair: x_i - x_j and v_i - v_j.
        pair_Ex3C = select_rows(signed_ExN, vector_Nx3xC.reshape(num_nodes, -1))
        pair_Ex3xC = pair_Ex3C.reshape(-1, 3, channels)
        invariant_ExK, distance_Ex1 = self._invariants(pair_Ex3xC, dtype)
        sign_ExK = coupling_Ex1.astype(dtype)
        features = [invariant_ExK, sign_ExK * invariant_ExK, sign_ExK]

        node_in_NxD = layer_norm(node_NxD)
        hidden = self.mlp_ratio * width
        from_nodes_NxF = dense(hidden, use_bias=False, name="edge_from_nodes")(node_in_NxD)
        hidden_ExF = (
            dense(hidden, name="edge_from_invariants")(jnp.concatenate(features, axis=-1))
            + dense(hidden, use_bias=False, name="edge_from_edge")(layer_norm(edge_ExD))
            + select_rows(incident_ExN.astype(dtype), from_nodes_NxF)
        )
        edge_ExD = edge_ExD + dense(width, name="edge_out")(nn.silu(hidden_ExF))
        edge_in_ExD = layer_norm(edge_ExD)

        is_incident_NxE = incident_ExN.T > 0
        attention = Attention(self.num_heads, dtype=dtype, name="cross")
        mixed_NxD = attention(node_in_NxD, edge_in_ExD, mask_bias(is_incident_NxE)[None])
        node_NxD = node_NxD + jnp.where(is_incident_NxE.any(axis=1)[:, None], mixed_NxD, 0)
        node_NxD = node_NxD + Mlp(hidden, width, dtype, name="node_mlp")(layer_norm(node_NxD))

        # Small at first, so that training starts near free flight.
        small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        gate_ExC2 = dense(2 * channels, kernel_init=small, name="gates")(edge_in_ExD)
        along_r_ExC, along_v_ExC = jnp.split(gate_ExC2.astype(pair_Ex3xC.dtype), 2, axis=-1)
        direction_Ex3 = pair_Ex3xC[..., 0] / distance_Ex1
        move_Ex3xC = (
            along_r_ExC[:, None] * direction_Ex3[..., None]
            + along_v_ExC[:, None] * pair_Ex3xC[..., 1:2]
        )
        move_Nx3C = select_rows(signed_ExN.T, move_Ex3xC.reshape(-1, 3 * channels))
        vector_Nx3xC = vector_Nx3xC + self.duration * move_Nx3C.reshape(vector_Nx3xC.shape)
        vector_Nx3xC = vector_Nx3xC.at[..., 0].add(self.duration * vector_Nx3xC[..., 1])
        return (vector_Nx3xC, node_NxD, edge_ExD), None

    def _invariants(self, pair_Ex3xC: Array, dtype) -> tuple[Array, Array]:
        """Invariants of each pair's vectors, `[E, K]`, and its distance, `[E, 1]`."""
        r_Ex3, v_Ex3 = pair_Ex3xC[..., 0], pair_Ex3xC[..., 1]
        dot = lambda a, b: (a * b).sum(axis=-1, keepdims=True)
        r2, v2, rv = dot(r_Ex3, r_Ex3), dot(v_Ex3, v_Ex3), dot(r_Ex3, v_Ex3)
        distance = jnp.sqrt(r2 + _SOFTENING)
        # Time (in the data's unit, at most 1) and distance of closest approach in free flight.
        time = jnp.clip(-rv / (v2 + 1e-3), 0, 1)
        closest = jnp.sqrt(jnp.maximum(r2 + 2 * time * rv + time**2 * v2, 0) + _SOFTENING)
        mix = lambda name: Dense(
            self.num_invariants, use_bias=False, dtype=pair_Ex3xC.dtype, name=name
        )(pair_Ex3xC)
        learned_ExK = (mix("dot_left") * mix("dot_right")).sum(axis=-2)
        invariants = [
            jnp.log(distance),
            1 / (distance + 0.05),
            1 / (r2 + 0.05),
            jnp.exp(-distance),
            distance,
            jnp.log(closest + 0.01),
            time,
            rv / distance,
            learned_ExK * jax.lax.rsqrt(1 + jnp.abs(learned_ExK)),  # grows as a root: tame
        ]
        return jnp.concatenate(invariants, axis=-1).astype(dtype), distance


def _incidence(graph: Graph) -> Array:
    """[E, N]: +1 where an edge starts, -1 where it ends, rows of 0 in padding.

    Products with it gather and scatter: a scatter-add runs on one thread of a CPU.
    """
    number_N = jnp.arange(len(graph.node_mask))
    at = lambda ends_E: (ends_E[:, None] == number_N).astype(graph.position.dtype)
    return jnp.where(graph.edge_mask[:, None], at(graph.senders) - at(graph.receivers), 0)


def _coupling(graph: Graph) -> Array:
    """[E, 1]: the product of both charges."""
    product_E = graph.charge[graph.senders] * graph.charge[graph.receivers]
    return jnp.where(graph.edge_mask, product_E, 0)[:, None]
