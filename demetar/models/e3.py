"""DEMETAr in edge space: the E(3)-equivariant double-encoder transformer for positions.

The DEMETAr post's future work, taken further. Node tokens attend to their edges' tokens (one per
pair), edges read the tokens of their two nodes, and the edges' outputs weight relative
vectors (its Equation 6 with the transformer in the place of phi). One round, whose weights all
rounds share:

    edge tokens   <- invariants of the pair's vectors as they are now, both node tokens
    node tokens   <- attention to their own edges (Equation 9), then an MLP
    velocities    <- v_i += t sum_j a_ij (x_i - x_j) / |x_i - x_j| + b_ij (v_i - v_j)
    positions     <- x_i += t v_i + the same sum with gates of its own

where t is the horizon / `rounds`; of data with several horizons each graph has its own. With n
particles and e edges a round costs n + e, and edges need not be all pairs
(`config.data.neighbors`). What far ones do then comes from a pass over all pairs that is cheap,
for it has no tokens: `field_kernels` learned functions of distance, k, `field_steps` times a round:

    velocities    <- v_i += s sum_j q_i q_j (x_i - x_j) sum_k w_k (|x_i - x_j|^2 + l_k^2)^(-3/2)

where s = t / `field_steps`. Then positions move half a step before and half a step after each
change of velocities (leapfrog): the error of a step falls with the third power of its length.

Symmetries: gates are invariant scalars that do not depend on which end of an edge comes first, so
outputs turn, reflect and permute with the inputs. Every move is equal and opposite on the two ends
of a pair, and velocities enter as differences, so the centre of mass moves freely and the
prediction is also the same for an observer in uniform motion. Charges enter through products
alone: flipping all of them changes nothing.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import GraphModel
from demetar.models.layers import Attention, Dense, Links, Mlp, incident_links, layer_norm

_SOFTENING = 1e-6  # added to squares, in the data's length^2: nothing is singular at contact
_BLOCK = 128  # rows of the matrix of all pairs that are there at once


class DemetarE3(GraphModel):
    """Predicts where the nodes of one padded graph are after the horizon and how they move then.

    Positions and velocities are `[N, 3]` each.

    Attributes:
      horizon: time from input to target, the longest of several.
      width: D, of node and edge tokens.
      num_heads: H of the nodes' attention; divides `width`.
      mlp_ratio: hidden width of the MLPs over D.
      rounds: how often the one set of weights is applied.
      num_invariants: learned dot products of a pair's relative position and velocity.
      field_kernels: of the pass over all pairs; 0: there is none.
      field_steps: how often a round makes that pass, and how many steps of time it has.
      field_rate: how fast the field learns beside the tokens: its lengths and strengths are so many
        times their parameters. Where it does nearly all, tokens learn its errors while it is slow.
      remat: rounds are computed again in the backward pass instead of being kept; on a CPU that is
        faster, for what they keep does not fit the caches.
      dtype: of tokens; vectors are float32 or wider.
    """

    READOUTS: ClassVar = ("position", "velocity")
    LEAST: ClassVar = {"field_kernels": 0}
    READS: ClassVar = frozenset({"graph_feature"})  # the horizon, of data with several

    horizon: float
    width: int = 32
    num_heads: int = 4
    mlp_ratio: int = 2
    rounds: int = 12
    num_invariants: int = 8
    field_kernels: int = 0
    field_steps: int = 1
    field_rate: float = 1.0
    remat: bool = True
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
        token = lambda name: self.param(name, nn.initializers.normal(1.0), (self.width,))
        repeat = lambda x, n: jnp.broadcast_to(x.astype(self.dtype), (n, self.width))
        node_NxD = repeat(token("node"), len(graph.node_mask))
        edge_ExD = repeat(token("edge"), len(graph.edge_mask))
        rounds = nn.scan(
            nn.remat(_Round, prevent_cse=False) if self.remat else _Round,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=nn.broadcast,
            length=self.rounds,
        )(
            self.num_heads,
            self.mlp_ratio,
            self.num_invariants,
            self.field_kernels,
            self.field_steps,
            self.field_rate,
            name="round",
        )
        # With several horizons each graph has its own; with one, `self.horizon` is it.
        horizon, relative = jnp.asarray(self.horizon, x_Nx3.dtype), None
        if graph.graph_feature is not None:
            horizon = jnp.where(graph.graph_mask, graph.graph_feature[0], horizon)
            relative = horizon / self.horizon
        start = (x_Nx3, v_Nx3, node_NxD, edge_ExD)
        time = horizon / self.rounds
        (x_Nx3, v_Nx3, *_), _ = rounds(start, graph, incident_links(graph), time, relative)
        found = {
            self.position: x_Nx3 + x_com_3 + horizon * v_com_3,
            self.velocity: v_Nx3 + v_com_3,
        }
        return {name: jnp.where(mask_N, x, 0) for name, x in found.items() if name is not None}


class _Round(nn.Module):
    """One update of positions, velocities, node and edge tokens; see the module's docstring.

    Vectors of edges are held component by component, `[3, E]`: a sum over three components is
    then a sum of rows.
    """

    num_heads: int
    mlp_ratio: int
    num_invariants: int
    field_kernels: int
    field_steps: int
    field_rate: float

    @nn.compact
    def __call__(self, carry, graph: Graph, links: Links, time: Array, relative: Array | None):
        """Args:
        carry: positions and velocities [N, 3], node tokens [N, D], edge tokens [E, D].
        graph: without padding values.
        links: of nodes to their edges.
        time: that passes in this round, in the data's unit.
        relative: the graph's horizon over the longest; None if the data have one horizon.
        """
        x_Nx3, v_Nx3, node_NxD, edge_ExD = carry
        width, dtype = node_NxD.shape[-1], node_NxD.dtype
        hidden = self.mlp_ratio * width
        dense = lambda features, **options: Dense(features, dtype=dtype, **options)
        i_E, j_E, mask_E = graph.senders, graph.receivers, graph.edge_mask

        state_Nx6 = jnp.concatenate([x_Nx3, v_Nx3], axis=1)
        pair_6xE = jnp.where(mask_E, (state_Nx6[i_E] - state_Nx6[j_E]).T, 0)
        r_3xE, rate_3xE = pair_6xE[:3], pair_6xE[3:]  # x_i - x_j and v_i - v_j
        invariant_KxE, distance_E = self._invariants(r_3xE, rate_3xE)
        charge_E = jnp.where(mask_E, graph.charge[i_E] * graph.charge[j_E], 0)
        features_KxE = [invariant_KxE, charge_E * invariant_KxE, charge_E[None]]
        if relative is not None:
            features_KxE.append(jnp.broadcast_to(relative, (1, len(mask_E))))
        features_ExK = jnp.concatenate(features_KxE).T.astype(dtype)

        node_in_NxD = layer_norm(node_NxD)
        from_nodes_NxF = dense(hidden, use_bias=False, name="edge_from_nodes")(node_in_NxD)
        hidden_ExF = (
            dense(hidden, name="edge_from_invariants")(features_ExK)
            + dense(hidden, use_bias=False, name="edge_from_edge")(layer_norm(edge_ExD))
            + jnp.where(mask_E[:, None], from_nodes_NxF[i_E] + from_nodes_NxF[j_E], 0)
        )
        edge_ExD = edge_ExD + dense(width, name="edge_out")(nn.silu(hidden_ExF))
        edge_in_ExD = layer_norm(edge_ExD)

        attention = Attention(self.num_heads, dtype=dtype, name="cross")
        node_NxD = node_NxD + attention(node_in_NxD, edge_in_ExD, links)
        node_NxD = node_NxD + Mlp(hidden, width, dtype, name="node_mlp")(layer_norm(node_NxD))

        # Small at first, so that training starts near free flight.
        small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        gate_Ex4 = dense(4, kernel_init=small, name="gates")(edge_in_ExD)
        gate_4xE = jnp.where(mask_E, gate_Ex4.T.astype(r_3xE.dtype), 0)
        along_r_2xE, along_v_2xE = gate_4xE[:2], gate_4xE[2:]  # of positions, of velocities
        move_2x3xE = along_r_2xE[:, None] * (r_3xE / distance_E) + along_v_2xE[:, None] * rate_3xE
        move_Ex6 = move_2x3xE.reshape(6, -1).T
        ends_L, move_Lx6 = jnp.concatenate([i_E, j_E]), jnp.concatenate([move_Ex6, -move_Ex6])
        move_Nx6 = jax.ops.segment_sum(move_Lx6, ends_L, len(x_Nx3))
        drift_Nx3, force_Nx3 = move_Nx6[:, :3], move_Nx6[:, 3:]

        if not self.field_kernels:
            v_Nx3 = v_Nx3 + time * force_Nx3
            x_Nx3 = x_Nx3 + time * (v_Nx3 + drift_Nx3)
            return (x_Nx3, v_Nx3, node_NxD, edge_ExD), None
        # Leapfrog: the field where particles are in the middle of a step, exact to second order.
        field = _Field(self.field_kernels, self.field_rate, name="field")
        step = time / self.field_steps
        for _ in range(self.field_steps):
            x_Nx3 = x_Nx3 + step / 2 * (v_Nx3 + drift_Nx3)
            v_Nx3 = v_Nx3 + step * (force_Nx3 + field(x_Nx3, graph.charge))
            x_Nx3 = x_Nx3 + step / 2 * (v_Nx3 + drift_Nx3)
        return (x_Nx3, v_Nx3, node_NxD, edge_ExD), None

    def _invariants(self, r_3xE: Array, rate_3xE: Array) -> tuple[Array, Array]:
        """Invariants of each pair's vectors, `[K, E]`, and its distance, `[E]`."""
        dot = lambda a, b: (a * b).sum(axis=0)
        r2, v2, rv = dot(r_3xE, r_3xE), dot(rate_3xE, rate_3xE), dot(r_3xE, rate_3xE)
        distance = jnp.sqrt(r2 + _SOFTENING)
        # Time (in the data's unit, at most 1) and distance of closest approach in free flight.
        time = jnp.clip(-rv / (v2 + 1e-3), 0, 1)
        closest = jnp.sqrt(jnp.maximum(r2 + 2 * time * rv + time**2 * v2, 0) + _SOFTENING)
        # A dot product of two mixtures of r and v is one mixture of r2, v2 and rv.
        left_2xK, right_2xK = (
            _Mixture(self.num_invariants, name=name)() for name in ("dot_left", "dot_right")
        )
        of_r2_K, of_v2_K = left_2xK * right_2xK
        of_rv_K = left_2xK[0] * right_2xK[1] + left_2xK[1] * right_2xK[0]
        learned_KxE = of_r2_K[:, None] * r2 + of_v2_K[:, None] * v2 + of_rv_K[:, None] * rv
        known = [
            jnp.log(distance),
            1 / (distance + 0.05),
            1 / (r2 + 0.05),
            jnp.exp(-distance),
            distance,
            jnp.log(closest + 0.01),
            time,
            rv / distance,
        ]
        tame_KxE = learned_KxE * jax.lax.rsqrt(1 + jnp.abs(learned_KxE))  # grows as a root
        return jnp.concatenate([jnp.stack(known), tame_KxE]), distance


class _Mixture(nn.Module):
    """Weights of r and v in each of K learned vectors, `[2, K]`."""

    number: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", nn.initializers.lecun_normal(), (2, self.number))


class _Field(nn.Module):
    """What all particles do to each by learned kernels of distance, `[N, 3]`."""

    num_kernels: int
    rate: float

    @nn.compact
    def __call__(self, x_Nx3: Array, charge_N: Array) -> Array:
        # Lengths down to 0.1 in the data's unit; a single one starts long, for what a short one
        # does changes with every encounter, and it does not find its strength. Strengths of 0:
        # training starts without a field.
        start = lambda _, shape: jnp.log(jnp.geomspace(2.0, 0.1, *shape)) / self.rate
        learned = lambda name, init: self.rate * self.param(name, init, (self.num_kernels,))
        softening_K = jnp.exp(learned("log_softening", start))
        strength_K = learned("strength", nn.initializers.zeros)
        columns_Nx4 = jnp.pad(x_Nx3, ((0, 0), (0, 1)), constant_values=1.0) * charge_N[:, None]

        @jax.checkpoint  # the pairs are computed again in the backward pass: memory stays linear
        def of_rows(rows):
            x_nx3, charge_n, number_n = rows
            r2_nxN = sum(jnp.square(x_nx3[:, c, None] - x_Nx3[:, c]) for c in range(3))
            pair_nxN = sum(
                strength_K[k] * jax.lax.rsqrt(r2_nxN + softening_K[k] ** 2) ** 3
                for k in range(self.num_kernels)
            )
            pair_nxN = jnp.where(number_n[:, None] == jnp.arange(len(x_Nx3)), 0, pair_nxN)
            # The difference of two large sums: not in a short type of an accelerator.
            sum_nx4 = jnp.matmul(pair_nxN, columns_Nx4, precision=jax.lax.Precision.HIGHEST)
            return charge_n[:, None] * (sum_nx4[:, 3:] * x_nx3 - sum_nx4[:, :3])

        rows = (x_Nx3, charge_N, jnp.arange(len(x_Nx3)))
        if len(x_Nx3) <= _BLOCK:
            return of_rows(rows)
        of_row = lambda row: of_rows(jax.tree.map(lambda a: a[None], row))[0]
        return jax.lax.map(of_row, rows, batch_size=_BLOCK)
