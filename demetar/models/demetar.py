"""DEMETAr: two encoders, one over atoms and one over edges, joined by attention.

The seed's architecture (its Figure 1 and Equations 9 to 11) for graph-level targets:

    edge tokens --p layers--> cross-attention: atoms query their own edges (Eq. 9)   Z_e
    node tokens --r layers--------------------------------------------------- (Eq. 10) Z_n
    Z_e + Z_n  (Eq. 11), with a [CLS] token  --h layers--> read-out

Everything the tokens see is invariant under rotation, reflection and translation
(distances, types), and no token has a position in a sequence, so the output is invariant
under those and under permutation of the atoms.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from demetar.graph import Graph, without_padding_values
from demetar.models.layers import (
    Array,
    Attention,
    Block,
    Dense,
    Embed,
    LayerNorm,
    Mlp,
    gaussian_basis,
    safe_norm,
)

NUM_EDGE_TYPES = 5  # BondType: none, single, double, triple, aromatic
MAX_ATOMIC_NUMBER = 9  # H to F
# Standard atomic weights by atomic number; 0 for padding and for elements not in QM9.
_MASSES = np.zeros(MAX_ATOMIC_NUMBER + 1)
_MASSES[[1, 6, 7, 8, 9]] = 1.008, 12.011, 14.007, 15.999, 18.998


class Demetar(nn.Module):
    """Predicts T graph targets (standardised) from one padded graph.

    Attributes:
      readouts: one of `cls`, `sum`, `mean` for each target.
      width: D.
      num_heads: H; divides `width`.
      edge_layers: p, transformer layers over edge tokens.
      node_layers: r, over node tokens.
      joint_layers: h, over the sum of both and [CLS].
      mlp_ratio: hidden width of the MLPs over D.
      num_radial: K, Gaussians that a distance is expanded in.
      radial_cutoff: angstrom, the last Gaussian's centre.
      edge_attention: `full`, every edge attends to every edge (for bonds); or `shared_node`,
        to those it shares an atom with (for many edges: all pairs of 29 atoms).
      edge_atoms: edge tokens also see the two atom types. The seed: False.
      pair_bias: distances between all atoms bias the logits of node and joint attention, per
        layer and head. The seed: False, geometry enters through edges alone.
      scaling: of attention, `standard` or `blog`; see `layers.Attention`.
      dropout: rate on residual branches.
      dtype: of matrix products and activations; parameters stay float32.
    """

    readouts: tuple[str, ...]
    width: int = 128
    num_heads: int = 8
    edge_layers: int = 2
    node_layers: int = 2
    joint_layers: int = 4
    mlp_ratio: int = 4
    num_radial: int = 64
    radial_cutoff: float = 5.0
    edge_attention: str = "full"
    edge_atoms: bool = True
    pair_bias: bool = True
    scaling: str = "standard"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> Array:
        """One graph -> [T]. Dropout, if any, draws from the rng stream `dropout`."""
        graph = without_padding_values(graph)
        node_mask_N = graph.node_mask
        attend_NxN = node_mask_N[:, None] & node_mask_N[None]
        bias = self._pair_biases(graph) if self.pair_bias else [None] * self._num_biased

        node_NxD = self._node_tokens(graph)
        enriched_NxD = self._edge_enrichment(graph, node_NxD, deterministic)
        for layer in range(self.node_layers):
            node_NxD = self._block(f"node_{layer}")(
                node_NxD, attend_NxN, bias[layer], deterministic
            )
        joint_NxD = node_NxD + enriched_NxD  # Equation 11

        # [CLS] is token 0: it sees every atom and every atom sees it, at no distance.
        cls_1xD = self.param("cls", nn.initializers.normal(0.02), (1, self.width))
        x_NxD = jnp.concatenate([cls_1xD.astype(self.dtype), joint_NxD])
        mask_N = jnp.concatenate([jnp.ones((1,), bool), node_mask_N])
        attend = mask_N[:, None] & mask_N[None]
        for layer in range(self.joint_layers):
            b = bias[self.node_layers + layer]
            b = None if b is None else jnp.pad(b, ((0, 0), (1, 0), (1, 0)))
            x_NxD = self._block(f"joint_{layer}")(x_NxD, attend, b, deterministic)
        x_NxD = LayerNorm(name="final_norm")(x_NxD)
        return self._read_out(x_NxD[0], x_NxD[1:], node_mask_N)

    @property
    def _num_biased(self) -> int:
        return self.node_layers + self.joint_layers

    def _block(self, name: str) -> Block:
        return Block(
            self.num_heads, self.mlp_ratio, self.dropout, self.scaling, self.dtype, name=name
        )

    def _radial(self, distance: Array) -> Array:
        return gaussian_basis(distance, self.num_radial, self.radial_cutoff).astype(self.dtype)

    def _pair_biases(self, graph: Graph) -> list[Array]:
        """Logit biases `[H, N, N]`, one for each node and joint layer, from all distances."""
        x_Nx3 = graph.position
        distance_NxN = safe_norm(x_Nx3[:, None] - x_Nx3[None])
        dense = Dense(self._num_biased * self.num_heads, dtype=self.dtype, name="pair_bias")
        b_NxNxF = dense(self._radial(distance_NxN)).astype(distance_NxN.dtype)
        num_nodes = x_Nx3.shape[0]
        return list(
            b_NxNxF.transpose(2, 0, 1).reshape(
                self._num_biased, self.num_heads, num_nodes, num_nodes
            )
        )

    def _node_tokens(self, graph: Graph) -> Array:
        """Atom type and distance to the centre of mass, the seed's F_n: `[N, D]`."""
        mass_N = jnp.asarray(_MASSES, graph.position.dtype)[graph.atomic_number]
        total = jnp.maximum(mass_N.sum(), 1e-6)  # 0 only in an all-padding graph
        com_3 = mass_N @ graph.position / total
        distance_N = safe_norm(graph.position - com_3)
        atom = Embed(MAX_ATOMIC_NUMBER + 1, self.width, dtype=self.dtype, name="atom")
        radial = Dense(self.width, dtype=self.dtype, name="distance_to_com")
        return atom(graph.atomic_number) + radial(self._radial(distance_N))

    def _edge_enrichment(self, graph: Graph, node_NxD: Array, deterministic: bool) -> Array:
        """Edge encoder and cross-attention of each atom to its own edges (Eq. 9): `[N, D]`."""
        s_E, r_E, mask_E = graph.senders, graph.receivers, graph.edge_mask
        distance_E = safe_norm(graph.position[s_E] - graph.position[r_E])
        kind = Embed(NUM_EDGE_TYPES, self.width, dtype=self.dtype, name="bond")
        radial = Dense(self.width, dtype=self.dtype, name="edge_length")
        edge_ExD = kind(graph.edge_type) + radial(self._radial(distance_E))
        if self.edge_atoms:
            # The sum does not depend on which end of an edge is called the sender.
            atom = Embed(MAX_ATOMIC_NUMBER + 1, self.width, dtype=self.dtype, name="edge_atom")
            edge_ExD += atom(graph.atomic_number[s_E]) + atom(graph.atomic_number[r_E])
        attend_ExE = mask_E[:, None] & mask_E[None]
        if self.edge_attention == "shared_node":
            attend_ExE &= _share_a_node(s_E, r_E)
        for layer in range(self.edge_layers):
            edge_ExD = self._block(f"edge_{layer}")(edge_ExD, attend_ExE, None, deterministic)
        number_N = jnp.arange(node_NxD.shape[0])[:, None]
        incident_NxE = ((number_N == s_E) | (number_N == r_E)) & mask_E
        cross = Attention(self.num_heads, self.scaling, self.dtype, name="cross")
        edge_ExD = LayerNorm(dtype=self.dtype, name="cross_key_norm")(edge_ExD)
        node_NxD = LayerNorm(dtype=self.dtype, name="cross_query_norm")(node_NxD)
        return cross(node_NxD, edge_ExD, incident_NxE)

    def _read_out(self, cls_D: Array, node_NxD: Array, node_mask_N: Array) -> Array:
        """[CLS], sum over atoms or mean over atoms, as each target asks: `[T]`."""
        count = jnp.maximum(node_mask_N.sum(), 1)
        output_T = [None] * len(self.readouts)
        for readout in sorted(set(self.readouts)):
            places = [t for t, name in enumerate(self.readouts) if name == readout]
            head = Mlp(self.width, len(places), name=f"head_{readout}")
            if readout == "cls":
                value = head(cls_D[None])[0]
            else:
                value = jnp.where(node_mask_N[:, None], head(node_NxD), 0.0).sum(axis=0)
                value = value / count if readout == "mean" else value
            for k, t in enumerate(places):
                output_T[t] = value[k]
        return jnp.stack(output_T)


def _share_a_node(s_E: Array, r_E: Array) -> Array:
    same = lambda a, b: a[:, None] == b[None]
    return same(s_E, s_E) | same(s_E, r_E) | same(r_E, s_E) | same(r_E, r_E)
