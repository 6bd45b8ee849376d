"""DEMETAr: two encoders, one over atoms and one over edges, joined by attention.

The architecture of the DEMETAr post (its Figure 1 and Equations 9 to 11), for targets of graphs and
for positions of particles:

    edge tokens --p layers--> cross-attention: atoms query their own edges (Eq. 9)   Z_e
    [CLS] and node tokens --r layers------------------------------------------ (Eq. 10) Z_n
    Z_e + Z_n  (Eq. 11)  --h layers--> read-out

Everything the tokens see is invariant under rotation, reflection and translation
(distances, types, speeds), and no token has a position in a sequence, so a graph target is
invariant under those and under permutation of the atoms. Positions are read out as

    velocity:     x_i + v_i phi_i                com:   x_i + (x_i - x_com) phi_i
    translation:  x_i + Phi_i                    none:  Phi_i

with phi_i a number and Phi_i three, both of token i. The first two are equivariant because
phi_i is a *scalar*; in the last two the tokens also see coordinates, relative to the centre
of mass or absolute, and the symmetries that go are declared so (`symmetries`).
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from data_pipelines.bonds import BondType
from data_pipelines.elements import atomic_weights
from data_pipelines.errors import UserError
from data_pipelines.graph import Graph, without_padding_values
from demetar.models.base import SYMMETRIES, GraphModel
from demetar.models.heads import Dipole, Extent
from demetar.models.layers import (
    Array,
    Attention,
    Block,
    Dense,
    Embed,
    Links,
    Mlp,
    gaussian_basis,
    incident_links,
    layer_norm,
    mask_bias,
    mean_of_nodes,
    safe_norm,
)
from demetar.models.surroundings import direction, harmonic_sums, sums_by_element

_DIPOLE_VECTORS = 32  # of each atom, for the read-out `dipole`


class Demetar(GraphModel):
    """Predicts targets of the graph, of its nodes, or positions, from one padded graph.

    Attributes:
      elements: atomic numbers of the data.
      equivariance: how positions are read out, see above; other targets ignore it.
      width: D.
      num_heads: H; divides `width`.
      edge_layers: p, transformer layers over edge tokens; 0: edge embeddings alone.
      cross_attention: False leaves the edges out (the post's "node only").
      node_layers: r, over node tokens.
      joint_layers: h, over the sum of both.
      mlp_ratio: hidden width of the MLPs over D.
      num_radial: K, Gaussians that a distance is expanded in.
      radial_cutoff: angstrom, the last Gaussian's centre.
      attention: of nodes: `all`, every node attends to every node; or `edges`, along the graph's
        edges only, which costs time and memory in proportion to them: for more than 64 nodes.
      edge_attention: `full`, every edge attends to every edge (for bonds); `shared_node`, to
        those it shares an atom with (for many edges: all pairs of 29 atoms); or `none`, edge
        layers are MLPs (with `attention="edges"`).
      edge_atoms: edge tokens also see the two atom types. The post: False.
      pair_bias: distances between all atoms bias the logits of node and joint attention, per
        layer and head. The post: False, geometry enters through edges alone.
      environment: tokens of atoms, and of edges by their midpoint, also see how many atoms of
        each element are how far away. The post: False.
      directions: C, tokens of atoms also see at which angles to each other those lie, by C products
        of vectors and C of tensors. The post: 0, none.
      edge_angles: tokens of edges also see at which angles to them the atoms lie, and the distance
        and angle between two edges bias the logits of edge attention. The post: False.
      scaling: of attention, `standard` or `blog`; see `layers.Attention`.
      dropout: rate on residual branches.
      remat: transformer layers are computed again in the backward pass instead of being kept.
      dtype: of matrix products and activations; parameters stay float32.
    """

    READOUTS: ClassVar = ("cls", "sum", "mean", "dipole", "extent", "node", "position")
    CHOICES: ClassVar = {
        "equivariance": ("none", "translation", "com", "velocity"),
        "attention": ("all", "edges"),
        "edge_attention": ("full", "shared_node", "none"),
        "scaling": ("standard", "blog"),
    }
    LEAST: ClassVar = {"edge_layers": 0, "node_layers": 0, "joint_layers": 0, "directions": 0}
    LEAST |= {"num_radial": 4}  # half of them are of edges; a single one is the same everywhere

    elements: tuple[int, ...]
    equivariance: str = "velocity"
    cross_attention: bool = True
    width: int = 128
    num_heads: int = 8
    edge_layers: int = 2
    node_layers: int = 2
    joint_layers: int = 4
    mlp_ratio: int = 4
    num_radial: int = 64
    radial_cutoff: float = 5.0
    attention: str = "all"
    edge_attention: str = "full"
    edge_atoms: bool = True
    pair_bias: bool = True
    environment: bool = False
    directions: int = 0
    edge_angles: bool = False
    scaling: str = "standard"
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def symmetries(self) -> frozenset[str]:
        """Those that the output has, with positions turning and shifting as the input does."""
        if self.position is None or self.equivariance in ("com", "velocity"):
            return SYMMETRIES
        lost = {"rotation", "reflection"} | (
            {"translation"} if self.equivariance == "none" else set()
        )
        return SYMMETRIES - lost

    def check(self) -> None:
        super().check()
        if self.attention == "edges":
            of_pairs = {"environment": False, "directions": 0, "edge_angles": False}
            for option, wanted in ({"edge_attention": "none"} | of_pairs).items():
                if getattr(self, option) != wanted:
                    raise UserError(
                        "config.model.attention='edges' is for graphs too large for all pairs, but "
                        f"config.model.{option} ({getattr(self, option)!r}) looks at pairs: set it "
                        f"to {wanted!r}."
                    )

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        graph = without_padding_values(graph)
        # Token 0 is [CLS], at no distance from anything: it sees every atom, and all see it.
        token_mask_N = jnp.pad(graph.node_mask, (1, 0), constant_values=True)
        bias = self._biases(graph, token_mask_N)

        x_NxD = self._tokens(graph)
        if self.cross_attention:
            enriched_NxD = self._edge_enrichment(graph, x_NxD, deterministic)
        for layer in range(self.node_layers):
            x_NxD = self._block(f"node_{layer}")(x_NxD, bias[layer], deterministic)
        if self.cross_attention:
            x_NxD = x_NxD + enriched_NxD  # Equation 11
        for layer in range(self.joint_layers):
            b = bias[self.node_layers + layer]
            x_NxD = self._block(f"joint_{layer}")(x_NxD, b, deterministic)
        x_NxD = layer_norm(x_NxD)
        self.keep_embedding(lambda: jnp.concatenate([x_NxD[0], mean_of_nodes(graph, x_NxD[1:])]))
        return self._read_out(graph, x_NxD[0], x_NxD[1:])

    def _block(self, name: str) -> Block:
        block = nn.remat(Block, static_argnums=3) if self.remat else Block
        return block(
            self.num_heads, self.mlp_ratio, self.dropout, self.scaling, self.dtype, name=name
        )

    def _radial(self, distance: Array) -> Array:
        return gaussian_basis(distance, self.num_radial, self.radial_cutoff).astype(self.dtype)

    def _biases(self, graph: Graph, token_mask_N: Array) -> list[Array | Links]:
        """Logit bias of each node and joint layer: `[1 or H, 1 or N, N]`, or `Links`.

        Masks padded keys and, with `pair_bias`, adds a learned function of all distances.
        """
        num_layers = self.node_layers + self.joint_layers
        if not num_layers:
            return []
        # No offset: a constant added to all logits of a row cancels in the softmax.
        features = num_layers * self.num_heads
        dense = Dense(features, use_bias=False, dtype=self.dtype, name="pair_bias")
        x_Nx3 = graph.position
        of_layers = lambda x, axis: jnp.split(x, num_layers, axis)
        if self.attention == "edges":
            links, distance_L = _node_links(graph)
            if not self.pair_bias:
                return [links] * num_layers
            b_LxF = dense(self._radial(distance_L)).astype(x_Nx3.dtype)
            # [CLS] is at no distance: it has no bias.
            near = (links.query_L > 0) & (links.key_L > 0)
            b_LxF = jnp.where(near[:, None], b_LxF, 0)
            return [links.replace(bias_LxH=b_LxH) for b_LxH in of_layers(b_LxF, 1)]
        mask_1xN = mask_bias(token_mask_N)[None]
        if not self.pair_bias:
            return [mask_1xN[None]] * num_layers
        distance_NxN = safe_norm(x_Nx3[:, None] - x_Nx3[None])
        b_NxNxF = dense(self._radial(distance_NxN)).astype(distance_NxN.dtype)
        # [CLS] is at no distance: its row and column have no bias.
        b_FxNxN = jnp.pad(b_NxNxF.transpose(2, 0, 1), ((0, 0), (1, 0), (1, 0))) + mask_1xN
        return of_layers(b_FxNxN, 0)

    def _tokens(self, graph: Graph) -> Array:
        """[CLS], then for each node its type and distance to the centre of mass (F_n).

        A particle's charge and speed are node features too, and so is the charge of a molecule
        where the data have several.
        """
        distance_N = safe_norm(graph.position - _centre_of_mass(graph))
        atom = Embed(max(self.elements) + 1, self.width, dtype=self.dtype, name="atom")
        radial = Dense(self.width, dtype=self.dtype, name="distance_to_com")
        node_NxD = atom(graph.atomic_number) + radial(self._radial(distance_N))
        node_NxD += self._surroundings_of_atoms(graph)
        if graph.velocity is not None:
            columns = [graph.charge[:, None], safe_norm(graph.velocity)[:, None]]
            if self.equivariance == "none":
                columns += [graph.position, graph.velocity]
            elif self.equivariance == "translation":
                columns += [graph.position - _centre_of_mass(graph), graph.velocity]
            particle = Dense(self.width, dtype=self.dtype, name="particle")
            node_NxD += particle(jnp.concatenate(columns, axis=-1))
        elif graph.charge is not None:  # of the whole molecule, the same at each of its atoms
            node_NxD += Dense(self.width, dtype=self.dtype, name="charge")(graph.charge[:, None])
        cls_1xD = self.param("cls", nn.initializers.normal(1.0), (1, self.width))
        return jnp.concatenate([cls_1xD.astype(self.dtype), node_NxD])

    def _surroundings_of_atoms(self, graph: Graph) -> Array | float:
        """`environment` and `directions`, `[N, D]`.

        The environment is how many atoms of each element are how far away. Directions are products
        of C mixtures of vectors with C others, and of tensors: such sums over the atoms around with
        spherical harmonics of order 1, and of order 2. A product does not turn with the molecule,
        and tells at which angles its atoms lie (the power spectrum of SOAP, Bartok et al. 2013).
        """
        found, C = 0.0, self.directions
        orders = [0] * self.environment + [1, 2] * (C > 0)
        for order, sum_NxMxF in zip(orders, self._harmonic_sums(graph, orders), strict=True):
            if order == 0:
                dense = Dense(self.width, dtype=self.dtype, name="atom_environment")
                found += dense(sum_NxMxF[:, 0])
                continue
            mix = Dense(2 * C, use_bias=False, dtype=self.dtype, name=f"order_{order}")
            mixed_NxMx2C = mix(sum_NxMxF)
            product_NxC = (mixed_NxMx2C[..., :C] * mixed_NxMx2C[..., C:]).sum(axis=1)
            found += Dense(self.width, dtype=self.dtype, name=f"directions_{order}")(product_NxC)
        return found

    def _harmonic_sums(self, graph: Graph, orders: list[int]) -> list[Array]:
        return harmonic_sums(graph, self.elements, self._radial, orders) if orders else []

    def _edge_enrichment(self, graph: Graph, x_NxD: Array, deterministic: bool) -> Array:
        """Edge encoder, then cross-attention of each token to its own edges (Eq. 9)."""
        s_E, r_E, mask_E = graph.senders, graph.receivers, graph.edge_mask
        distance_E = safe_norm(graph.position[s_E] - graph.position[r_E])
        kind = Embed(len(BondType), self.width, dtype=self.dtype, name="bond")
        radial = Dense(self.width, dtype=self.dtype, name="edge_length")
        edge_ExD = kind(graph.edge_type) + radial(self._radial(distance_E))
        if graph.velocity is not None:
            charges_E = graph.charge[s_E] * graph.charge[r_E]
            x_Ex3 = graph.position[s_E] - graph.position[r_E]
            v_Ex3 = graph.velocity[s_E] - graph.velocity[r_E]
            approach_E = (x_Ex3 * v_Ex3).sum(axis=-1) / jnp.maximum(distance_E, 1e-3)
            columns = jnp.stack([charges_E, approach_E], axis=-1)
            edge_ExD += Dense(self.width, dtype=self.dtype, name="pair")(columns)
        middle_Ex3 = (graph.position[s_E] + graph.position[r_E]) / 2
        along_Ex3 = direction(graph.position[s_E] - graph.position[r_E])
        edge_ExD += self._surroundings_of_edges(graph, middle_Ex3, along_Ex3)
        if self.edge_atoms:
            # The sum does not depend on which end of an edge is called the sender.
            atom = Embed(max(self.elements) + 1, self.width, dtype=self.dtype, name="edge_atom")
            edge_ExD += atom(graph.atomic_number[s_E]) + atom(graph.atomic_number[r_E])
        attend_ExE = None
        if self.edge_attention != "none":
            attend_ExE = mask_bias(mask_E[None])
        if self.edge_attention == "shared_node":
            attend_ExE = mask_bias(mask_E[None] & _share_a_node(s_E, r_E))[None]
        biases = [attend_ExE] * self.edge_layers
        if self.edge_angles and attend_ExE is not None:
            biases = self._edge_biases(middle_Ex3, along_Ex3, attend_ExE)
        for layer, bias in enumerate(biases):
            edge_ExD = self._block(f"edge_{layer}")(edge_ExD, bias, deterministic)
        cross = Attention(self.num_heads, self.scaling, self.dtype, name="cross")
        if self.attention == "edges":
            bias = incident_links(graph, first=1)  # token 0 is [CLS], which has none
            has_edge_N = jnp.zeros(len(x_NxD), bool).at[bias.query_L].max(bias.mask_L)
        else:
            number_Nx1 = jnp.arange(-1, len(x_NxD) - 1)[:, None]  # [CLS], -1, has no edges
            incident_NxE = ((number_Nx1 == s_E) | (number_Nx1 == r_E)) & mask_E
            has_edge_N = incident_NxE.any(axis=1)
            bias = mask_bias(incident_NxE)
        enriched_NxD = cross(layer_norm(x_NxD), layer_norm(edge_ExD), bias)
        return jnp.where(has_edge_N[:, None], enriched_NxD, 0)

    def _surroundings_of_edges(self, graph: Graph, middle_Ex3: Array, along_Ex3: Array) -> Array:
        """`environment` of the midpoint, and `edge_angles` to the atoms around it, `[E, D]`.

        The squared cosine, because an edge has no sense: swapping its ends changes nothing.
        """
        if not (self.environment or self.edge_angles):
            return 0.0
        apart_ExNx3 = graph.position[None] - middle_Ex3[:, None]
        distance_ExN = safe_norm(apart_ExNx3)
        weights = {}
        if self.environment:
            weights["edge_environment"] = jnp.ones_like(distance_ExN)
        if self.edge_angles:
            cosine_ExN = (direction(apart_ExNx3) * along_Ex3[:, None]).sum(axis=-1)
            weights["edge_angles"] = jnp.square(cosine_ExN)
        weight_ExNxM = jnp.stack([*weights.values()], axis=-1)
        sum_ExMxF = sums_by_element(graph, self.elements, self._radial(distance_ExN), weight_ExNxM)
        dense = lambda name: Dense(self.width, dtype=self.dtype, name=name)
        return sum(dense(name)(sum_ExMxF[:, m]) for m, name in enumerate(weights))

    def _edge_biases(self, middle_Ex3: Array, along_Ex3: Array, mask_ExE: Array) -> list[Array]:
        """Logit bias of each edge layer, `[H, E, E]`: of distance and angle between two edges."""
        if not self.edge_layers:
            return []
        distance_ExE = safe_norm(middle_Ex3[:, None] - middle_Ex3[None])
        cosine_ExE = along_Ex3 @ along_Ex3.T
        # Half as many Gaussians as elsewhere: pairs of edges are many.
        radial_ExExK = gaussian_basis(distance_ExE, self.num_radial // 2, self.radial_cutoff)
        radial_ExExK = radial_ExExK.astype(self.dtype)
        turned_ExExK = jnp.square(cosine_ExE).astype(self.dtype)[..., None] * radial_ExExK
        dense = Dense(
            self.edge_layers * self.num_heads, use_bias=False, dtype=self.dtype, name="edge_bias"
        )
        b_ExExF = dense(jnp.concatenate([radial_ExExK, turned_ExExK], axis=-1))
        b_FxExE = b_ExExF.astype(distance_ExE.dtype).transpose(2, 0, 1) + mask_ExE
        return jnp.split(b_FxExE, self.edge_layers)

    def _read_out(self, graph: Graph, cls_D: Array, node_NxD: Array) -> dict[str, Array]:
        """Each target by its read-out: see `data_pipelines.targets.READOUTS`."""
        mask_N = graph.node_mask
        wide = jnp.promote_types(self.dtype, jnp.float32)  # a target has more than 8 bits
        predictions = {}
        for readout in ("cls", "mean", "node", "sum"):
            if names := self.names(readout):
                head = Mlp(self.width, len(names), wide, name=f"head_{readout}")
                if readout == "cls":
                    values = head(cls_D[None])[0]
                else:
                    values = jnp.where(mask_N[:, None], head(node_NxD), 0.0)
                if readout in ("sum", "mean"):
                    values = values.sum(axis=0)
                if readout == "mean":
                    values = values / jnp.maximum(mask_N.sum(), 1)
                predictions |= {name: values[..., k] for k, name in enumerate(names)}
        relative_Nx3 = graph.position - _centre_of_mass(graph)
        for k, name in enumerate(self.names("dipole")):
            mix = Dense(_DIPOLE_VECTORS, use_bias=False, dtype=self.dtype, name=f"dipole_{k}")
            vector_Nx3xC = mix(self._harmonic_sums(graph, [1])[0])
            head = Dipole(self.width, wide, name=f"head_dipole_{k}")
            predictions[name] = head(relative_Nx3, mask_N, node_NxD, vector_Nx3xC)
        for k, name in enumerate(self.names("extent")):
            head = Extent(self.width, self.radial_cutoff, wide, name=f"head_extent_{k}")
            predictions[name] = head(relative_Nx3, mask_N, node_NxD)
        if self.position is not None:
            predictions[self.position] = self._positions(graph, node_NxD, wide)
        return predictions

    def _positions(self, graph: Graph, node_NxD: Array, wide) -> Array:
        """Where the nodes are after the horizon, by the formula that `equivariance` names."""
        x_Nx3, mask = graph.position, graph.node_mask[:, None]
        if self.equivariance == "velocity" and graph.velocity is None:
            raise UserError(
                "config.model.equivariance='velocity' moves nodes along their velocities, and "
                "these data have none: set it to 'com' or 'translation'."
            )
        if self.equivariance in ("com", "velocity"):
            phi_Nx1 = Mlp(self.width, 1, wide, name="head_position")(node_NxD)
            along = (
                graph.velocity
                if self.equivariance == "velocity"
                else (x_Nx3 - _centre_of_mass(graph))
            )
            return jnp.where(mask, x_Nx3 + along * phi_Nx1, 0)
        phi_Nx3 = Mlp(self.width, 3, wide, name="head_position")(node_NxD)
        return jnp.where(mask, phi_Nx3 + (x_Nx3 if self.equivariance == "translation" else 0), 0)


def _centre_of_mass(graph: Graph) -> Array:
    mass_N = jnp.asarray(atomic_weights(), graph.position.dtype)[graph.atomic_number]
    return mass_N @ graph.position / jnp.maximum(mass_N.sum(), 1e-6)  # 0: all padding


def _node_links(graph: Graph) -> tuple[Links, Array]:
    """Tokens along edges, both ways, each to itself, and [CLS], token 0, with all; distances."""
    both = lambda a, b: jnp.concatenate([a, b])
    receiver_M, sender_M = (
        both(graph.receivers, graph.senders),
        both(graph.senders, graph.receivers),
    )
    x_Nx3, node_N = graph.position, jnp.arange(1, len(graph.node_mask) + 1)
    zero_N = jnp.zeros_like(node_N)
    links = Links(
        query_L=jnp.concatenate([receiver_M + 1, node_N, node_N, zero_N, zero_N[:1]]),
        key_L=jnp.concatenate([sender_M + 1, node_N, zero_N, node_N, zero_N[:1]]),
        bias_LxH=jnp.zeros((2 * len(graph.edge_mask) + 3 * len(node_N) + 1, 1), x_Nx3.dtype),
        mask_L=jnp.concatenate([graph.edge_mask] * 2 + [graph.node_mask] * 3 + [jnp.ones(1, bool)]),
    )
    distance_M = safe_norm(x_Nx3[receiver_M] - x_Nx3[sender_M])
    return links, jnp.pad(distance_M, (0, 3 * len(node_N) + 1))


def _share_a_node(s_E: Array, r_E: Array) -> Array:
    same = lambda a, b: a[:, None] == b[None]
    return same(s_E, s_E) | same(s_E, r_E) | same(r_E, s_E) | same(r_E, r_E)
