"""SchNet: continuous-filter convolutions (Schütt et al. 2017, NIPS; 2018, J. Chem. Phys. 148).

    e_k(d) = exp(-(d - mu_k)^2 gamma)                       radial basis, mu_k on [0, cutoff]
    m_i    = sum_{j != i} W(e(d_ij)) * (A x_j)              continuous-filter convolution
    x_i   <- x_i + linear(ssp(linear(m_i)))                 interaction block
    y_i    = linear(ssp(linear(x_i))),  y = sum_i y_i or its mean over atoms

with ssp(x) = log(1 + e^x) - log 2. Two generations of the authors' code differ:

    `first`        W has an activation after both layers, and no pair is too far; gamma = 1 / gap.
                   The published errors on QM9 are its own.
    `schnetpack`   W has none after the second, fades to 0 at the cutoff (cosine), and gamma =
                   1 / (2 delta^2), delta the spacing. SchNetPack and PyTorch Geometric compute
                   this (the latter with at most 32 neighbours of an atom, here with all).
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models.base import GraphModel
from demetar.models.layers import (
    Dense,
    Messages,
    cosine_cutoff,
    mean_of_nodes,
    messages_of,
    safe_norm,
)

_NUM_TYPES = 100  # rows of the published table: one for each atomic number, and row 0 for none


class Schnet(GraphModel):
    """Predicts graph targets as a sum or mean over atoms.

    Attributes:
      elements: atomic numbers of the data.
      generation: `first` or `schnetpack`.
      width: D, of an atom's features.
      filter_width: F, of the filters.
      num_layers: interaction blocks, each with its own weights.
      cutoff: angstrom; the last centre of the basis, for `schnetpack` also of the pairs.
      gap: of `first`: angstrom, between centres (cutoff / gap of them), and 1 / gamma.
      num_radial: of `schnetpack`: K, Gaussians of the basis.
      dtype: of features and filters; distances are float32 or wider.
    """

    READOUTS: ClassVar = ("sum", "mean")
    LEAST: ClassVar = {"width": 2, "num_radial": 2}
    CHOICES: ClassVar = {"generation": ("first", "schnetpack")}

    elements: tuple[int, ...]
    generation: str = "first"
    width: int = 64
    filter_width: int = 64
    num_layers: int = 3
    cutoff: float = 30.0
    gap: float = 0.1
    num_radial: int = 50
    dtype: Any = jnp.float32

    def check(self) -> None:
        super().check()
        if max(self.elements) >= _NUM_TYPES:
            raise UserError(
                f"Model 'schnet' has a table of atomic numbers up to {_NUM_TYPES - 1}, but the "
                f"data have {max(self.elements)}: choose another model."
            )

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        first = self.generation == "first"
        messages = messages_of(graph)
        ends = graph.position[graph.senders], graph.position[graph.receivers]
        distance_E = safe_norm(ends[0] - ends[1])
        # Basis and filters once for each pair: they are the same in both directions.
        basis_ExK = _Basis(*self._gaussians(), self.dtype, name="basis")(distance_E)
        fade_Mx1 = messages.mask_Mx1
        if not first:
            fade_Mx1 = fade_Mx1 * messages.of_edge(cosine_cutoff(distance_E, self.cutoff)[:, None])
        # A variance, not a deviation, of 1 / sqrt(D) in the first code.
        draw = nn.initializers.normal(self.width**-0.25 if first else 1.0)
        one_hot = jax.nn.one_hot(graph.atomic_number, _NUM_TYPES, dtype=self.dtype)
        table = Dense(self.width, False, self.dtype, draw, name="atom_embedding")
        x_NxD = table(one_hot)
        for number in range(self.num_layers):
            layer = _Interaction(self.width, self.filter_width, first, name=f"layer_{number}")
            x_NxD = x_NxD + layer(x_NxD, basis_ExK, messages, fade_Mx1)
        last = nn.initializers.zeros if first else _xavier
        hidden_NxD2 = _ssp(_linear(self.width // 2, self.dtype, "readout_0")(x_NxD), first)
        self.keep_embedding(lambda: mean_of_nodes(graph, hidden_NxD2))
        readout = Dense(len(self.targets), dtype=self.dtype, kernel_init=last, name="readout_1")
        y_NxT = readout(hidden_NxD2).astype(graph.position.dtype)
        sum_T = jnp.where(graph.node_mask[:, None], y_NxT, 0).sum(axis=0)
        mean_T = mean_of_nodes(graph, y_NxT)
        return {
            target.name: (sum_T if target.readout == "sum" else mean_T)[number]
            for number, target in enumerate(self.targets)
        }

    def _gaussians(self) -> tuple[int, float, float]:
        """(K, last centre, gamma) of the basis."""
        if self.generation == "first":
            return math.ceil(self.cutoff / self.gap), self.cutoff, 1 / self.gap
        spacing = self.cutoff / (self.num_radial - 1)
        return self.num_radial, self.cutoff, 0.5 / spacing**2


class _Basis(nn.Module):
    """exp(-gamma (d - mu_k)^2) of K centres mu_k on [0, last], `[E] -> [E, K]`."""

    num: int
    last: float
    gamma: float
    dtype: Any

    def __call__(self, distance_E: Array) -> Array:
        # The root of gamma inside the square: one pass less over [E, K].
        root = math.sqrt(self.gamma)
        centres_K = jnp.asarray(np.linspace(0, self.last, self.num) * root, distance_E.dtype)
        scaled_ExK = (distance_E * root)[:, None] - centres_K
        return jnp.exp(-jnp.square(scaled_ExK)).astype(self.dtype)


class _Interaction(nn.Module):
    """What one interaction block adds to the features, `[N, D]`."""

    width: int
    filter_width: int
    first: bool

    @nn.compact
    def __call__(self, x_NxD: Array, basis_ExK: Array, messages: Messages, fade_Mx1: Array):
        dtype, first = x_NxD.dtype, self.first
        filter_ExF = _ssp(_linear(self.filter_width, dtype, "filter_0")(basis_ExK), first)
        filter_ExF = _linear(self.filter_width, dtype, "filter_1")(filter_ExF)
        if first:
            filter_ExF = _ssp(filter_ExF, first)
        sent_NxF = _linear(self.filter_width, dtype, "sent", use_bias=False)(x_NxD)
        m_MxF = messages.of_edge(filter_ExF) * messages.of_sender(sent_NxF)
        m_NxF = messages.sum_at_receiver(m_MxF, fade_Mx1).astype(dtype)
        v_NxD = _ssp(_linear(self.width, dtype, "update_0")(m_NxF), first)
        return _linear(self.width, dtype, "update_1")(v_NxD)


_xavier = nn.initializers.glorot_uniform()


def _linear(features: int, dtype, name: str, use_bias: bool = True) -> Dense:
    return Dense(features, use_bias, dtype, _xavier, name=name)


def _ssp(x: Array, first: bool) -> Array:
    """Shifted softplus; past a threshold, x - log 2, as TensorFlow's code and PyTorch have it."""
    threshold = 14.0 if first else 20.0
    # The smaller number in the exponential: where() keeps the gradient of an overflow, nan.
    soft = jnp.log1p(jnp.exp(jnp.minimum(x, threshold)))
    return jnp.where(x < threshold, soft, x) - math.log(2)
