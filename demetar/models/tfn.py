"""Tensor Field Network (Thomas et al. 2018), as Fuchs et al. 2020 compare with it.

As their code, so that the same weights give the same numbers; K are the kernels of
`equivariant.py`. For molecules a layer has a self-interaction of the input ("skip"):

    f^k_i <- mean_j (sum_l K^lk(d_ij) f^l_j + W^k f^k_i)

and for particles one of the sum:

    f^k_i <- mean_j W^k sum_l K^lk(d_ij) f^l_j

Each layer but the last is followed by a non-linearity of lengths. A node without neighbours gets
0. Molecules start from [one-hot element, Z] along their bonds, and end with a perceptron of
pooled scalars; particles from charge and velocity, and end with vectors. All of it turns with the
input, but a reflection gives something else: the kernels couple true and pseudo-vectors.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models import equivariant as eq


class Tfn(eq.EquivariantModel):
    """Predicts numbers of a molecule, or positions and velocities of particles.

    Attributes:
      elements: atomic numbers of the data.
      width: channels of each degree.
      num_layers: layers, the last one with those channels alone that predictions need.
      num_degrees: degrees 0 .. num_degrees - 1.
      dtype: of features; positions are float32 or wider.
    """

    elements: tuple[int, ...]
    width: int = 32
    num_layers: int = 4
    num_degrees: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        moves = bool(self.vector_targets)
        pairs = eq.pairs_of(graph, self.num_degrees, self.dtype)
        all_degrees = dict.fromkeys(range(self.num_degrees), self.width)
        if moves:
            features = {0: graph.charge[:, None, None], 1: graph.velocity[..., None]}
            last = {1: len(self.vector_targets)}
        else:
            features = eq.atom_features(graph, self.elements, self.dtype)
            last = {0: self.width * self.num_degrees}
        for number in range(self.num_layers - 1):
            layer = Convolution(all_degrees, not moves, self.dtype, name=f"layer_{number}")
            norm = eq.NormNonlinearity(moves, self.dtype, name=f"norm_{number}")
            features = norm(layer(features, pairs))
        features = Convolution(last, not moves, self.dtype, name="last")(features, pairs)
        if moves:
            return self.moved(graph, features[1].swapaxes(1, 2).astype(graph.position.dtype))
        return self.graph_numbers(graph, features[0][:, 0])


class Convolution(nn.Module):
    """One layer, degree -> `[N, 2 k + 1, C]`; see the module's docstring.

    Attributes:
      channels: degree k -> channels.
      skip: self-interaction of the input, not of the sum.
    """

    channels: Mapping[int, int]
    skip: bool
    dtype: Any

    @nn.compact
    def __call__(self, features: eq.Features, pairs: eq.Pairs) -> dict[int, Array]:
        messages = pairs.messages
        sent = eq.Kernels(self.channels, self.dtype, name="kernels")(features, pairs)
        count_Nx1x1 = messages.count_Nx1[..., None]
        mean = {
            k: eq.sum_at_receiver(messages, x, messages.mask_Mx1) / jnp.maximum(count_Nx1x1, 1)
            for k, x in sent.items()
        }
        mix = eq.Mix(self.channels, self.dtype, name="mix")
        if not self.skip:
            return mix(mean)
        own = mix(features)
        has_neighbours = count_Nx1x1 > 0
        return {
            k: x + jnp.where(has_neighbours, own[k], 0) if k in own else x for k, x in mean.items()
        }
