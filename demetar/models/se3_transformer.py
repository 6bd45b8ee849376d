"""SE(3)-Transformer (Fuchs et al. 2020): attention between features that turn.

As its official code, so that the same weights give the same numbers; K are the kernels of
`equivariant.py`, with weights of their own for keys and values.

    v_ij = sum_l K_V^lk(d_ij) f^l_j,   k_ij = sum_l K_K^lk(d_ij) f^l_j,   q_i = W_Q^k f^k_i
    a_ij = softmax over j of <q_i, k_ij> / sqrt(size)                     Equation 11
    f^k_i <- W^k [sum_j a_ij v_ij, f^k_i]                                 Equation 10

Heads divide the channels of every degree; <q, k> goes over a head's channels of all degrees that
keys have, and `size` counts those of all heads. A non-linearity of lengths follows.

Molecules start from [one-hot element, Z] along their bonds; a last convolution (`tfn.py`) and a
perceptron of pooled scalars give numbers. Particles start from the velocity; x_i - x_j is added
to what neighbours send; in the last layer W itself comes from attention (`AttentiveMix`), and the
vectors that it gives are the prediction. A reflection gives something else.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from data_pipelines.errors import UserError
from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models import equivariant as eq
from demetar.models.layers import Dense
from demetar.models.tfn import Convolution


class Se3Transformer(eq.EquivariantModel):
    """Predicts numbers of a molecule, or positions and velocities of particles.

    Attributes:
      elements: atomic numbers of the data.
      width: channels of each degree.
      num_layers: layers of attention before the last layer.
      num_degrees: degrees 0 .. num_degrees - 1.
      num_heads: of attention; divides `width / division`.
      division: keys and values have `width / division` channels.
      dtype: of features; positions are float32 or wider.
    """

    elements: tuple[int, ...]
    width: int = 32
    num_layers: int = 7
    num_degrees: int = 4
    num_heads: int = 8
    division: int = 2
    dtype: Any = jnp.float32

    def check(self) -> None:
        super().check()
        if self.width % (self.division * self.num_heads):
            raise UserError(
                f"config.model.width ({self.width}) must be a multiple of config.model.division "
                f"times config.model.num_heads ({self.division} x {self.num_heads})."
            )

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        moves = bool(self.vector_targets)
        pairs = eq.pairs_of(graph, self.num_degrees, self.dtype)
        all_degrees = dict.fromkeys(range(self.num_degrees), self.width)
        if moves:
            features = {1: graph.velocity[..., None].astype(self.dtype)}
        else:
            features = eq.atom_features(graph, self.elements, self.dtype)
        for number in range(self.num_layers):
            layer = Attention(
                all_degrees, self.width // self.division, self.num_heads, self.dtype,
                add_relative=moves, name=f"layer_{number}",
            )  # fmt: skip
            norm = eq.NormNonlinearity(moves, self.dtype, name=f"norm_{number}")
            features = norm(layer(features, pairs))
        if moves:
            vectors = len(self.vector_targets)
            last = Attention(
                {1: vectors}, vectors, min(self.num_heads, vectors), self.dtype,
                add_relative=True, attentive=True, name="last",
            )  # fmt: skip
            vector_Nx3xT = last(features, pairs)[1]
            return self.moved(graph, vector_Nx3xT.swapaxes(1, 2).astype(graph.position.dtype))
        scalars = {0: self.width * self.num_degrees}
        features = Convolution(scalars, True, self.dtype, name="last")(features, pairs)
        return self.graph_numbers(graph, features[0][:, 0])


class Attention(nn.Module):
    """One layer, degree -> `[N, 2 k + 1, C]`; see the module's docstring.

    Attributes:
      channels: degree k -> channels.
      inner: channels of each degree of keys and values.
      num_heads: divides `inner`.
      add_relative: see `equivariant.Kernels`.
      attentive: W comes from attention.
    """

    channels: Mapping[int, int]
    inner: int
    num_heads: int
    dtype: Any
    add_relative: bool = False
    attentive: bool = False

    @nn.compact
    def __call__(self, features: eq.Features, pairs: eq.Pairs) -> dict[int, Array]:
        messages, heads = pairs.messages, self.num_heads
        of_value = dict.fromkeys(self.channels, self.inner)
        of_key = {k: c for k, c in of_value.items() if k in features}
        kernels = lambda channels, name: eq.Kernels(
            channels, self.dtype, self.add_relative, name=name
        )(features, pairs)
        value, key = kernels(of_value, "value"), kernels(of_key, "key")
        query = eq.Mix(of_key, self.dtype, name="query")(features)
        by_head = lambda x: x.reshape(*x.shape[:2], heads, -1)
        logits_MxH = sum(
            (by_head(messages.of_receiver(query[k])) * by_head(key[k])).sum(axis=(1, 3))
            for k in of_key
        ) / math.sqrt(sum(c * (2 * k + 1) for k, c in of_key.items()))
        weight_Mx1xHx1 = messages.softmax_at_receiver(logits_MxH)[:, None, :, None]
        joined = {}
        for k, x in value.items():
            weighted = (weight_Mx1xHx1.astype(self.dtype) * by_head(x)).reshape(x.shape)
            mixed = eq.sum_at_receiver(messages, weighted, messages.mask_Mx1.astype(self.dtype))
            joined[k] = jnp.concatenate([mixed, features[k]], -1) if k in features else mixed
        mix = AttentiveMix if self.attentive else eq.Mix
        return mix(self.channels, self.dtype, name="mix")(joined)


class AttentiveMix(nn.Module):
    """`W f` where W is a softmax over the channels of f, from all their dot products.

    s_ab = f_a . f_b;  W = softmax over b of linear(leaky ReLU(layer norm(s))), of each degree.
    """

    channels: Mapping[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, features: eq.Features) -> dict[int, Array]:
        result = {}
        for k, f in sorted(features.items()):
            num_out, num_in = self.channels[k], f.shape[-1]
            products_NxP = jnp.einsum("nma,nmb->nab", f, f).reshape(len(f), -1)
            norm = nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name=f"norm_{k}")
            last = Dense(num_out * num_in, dtype=self.dtype, name=f"degree_{k}")
            logits_NxP = last(nn.leaky_relu(norm(products_NxP)))
            weight_NxOxC = nn.softmax(logits_NxP.reshape(-1, num_out, num_in))
            result[k] = jnp.einsum("noi,nmi->nmo", weight_NxOxC, f)
        return result
