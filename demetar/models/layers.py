"""Layers that the models share: dense, attention, transformer block, norms, radial basis.

Written for one graph; the batch is `jax.vmap` around the model. Attention weights, layer
norm statistics and distances are float32 (or wider) whatever the compute dtype.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

# What a model's `symmetries` may name: positions turn, reflect and shift with the input, and
# graph targets stay; nodes may come in any order.
SYMMETRIES = frozenset({"rotation", "reflection", "translation", "permutation"})


@jax.custom_batching.custom_vmap
def _matmul(x_NxD: Array, kernel_DxF: Array) -> Array:
    return x_NxD @ kernel_DxF


@_matmul.def_vmap
def _matmul_of_batch(axis_size, in_batched, x_BxNxD, kernel_DxF):
    # vmap of a matrix product keeps [B, N, D], and the gradient of that runs at half the speed
    # on CPU; one product over flattened rows is the same sum.
    x_batched, kernel_batched = in_batched
    if x_batched and not kernel_batched:
        flat = x_BxNxD.reshape(-1, x_BxNxD.shape[-1]) @ kernel_DxF
        return flat.reshape(*x_BxNxD.shape[:-1], kernel_DxF.shape[-1]), True
    axes = tuple(0 if batched else None for batched in in_batched)
    return jax.vmap(jnp.matmul, axes, axis_size=axis_size)(x_BxNxD, kernel_DxF), True


class Dense(nn.Module):
    """`x @ kernel + bias` over the last axis, `[..., D] -> [..., features]`.

    Differentiate it inside a vmap (`grad(vmap(...))`, as the train step does); for the
    gradient of a single graph use `demetar.models.apply_one`.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = _matmul(rows, kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Embed(nn.Module):
    """A learned vector for each of `num` types, `[...] int -> [..., features]`.

    As a product with one-hot rows: the gradient of a gather is a scatter-add, which runs on
    one thread of a CPU, and types are few.
    """

    num: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, types: Array) -> Array:
        one_hot = jax.nn.one_hot(types, self.num, dtype=self.dtype)
        init = nn.initializers.normal(1.0)
        return Dense(self.features, use_bias=False, dtype=self.dtype, kernel_init=init)(one_hot)


class Mlp(nn.Module):
    """Dense, SiLU, Dense: `[..., D] -> [..., features]`."""

    hidden: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.silu(Dense(self.hidden, dtype=self.dtype)(x))
        return Dense(self.features, dtype=self.dtype)(x)


class Attention(nn.Module):
    """Multi-head attention from N query tokens to M key tokens, `[N, D] -> [N, D]`.

    With `scaling='standard'`, softmax(Q Kᵀ / √d_head + bias) V per head (Vaswani et al. 2017);
    with `'blog'`, softmax(Q Kᵀ + bias) V / √D, as Equations 9 and 10 of the seed print it.

    Attributes:
      num_heads: H; divides the width.
      scaling: `standard` or `blog`.
      dtype: of the matrix products.
    """

    num_heads: int
    scaling: str = "standard"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, query_NxD: Array, key_MxD: Array, bias_HxNxM: Array) -> Array:
        """Args: tokens, and a bias of the logits that may be [1 or H, 1 or N, M]."""
        num_queries, width = query_NxD.shape
        head_width = width // self.num_heads
        # No biases: one on the keys cancels in the softmax, and `out` has its own.
        dense = lambda features, name: Dense(features, use_bias=False, dtype=self.dtype, name=name)
        q_NxHxd = dense(width, "query")(query_NxD).reshape(-1, self.num_heads, head_width)
        # Columns head by head, so that a mesh can divide the heads.
        kv_MxD2 = dense(2 * width, "kv")(key_MxD)
        kv_MxHx2xd = kv_MxD2.reshape(-1, self.num_heads, 2, head_width)
        k_MxHxd, v_MxHxd = kv_MxHx2xd[:, :, 0], kv_MxHx2xd[:, :, 1]
        if self.scaling == "standard":
            q_NxHxd = q_NxHxd / math.sqrt(head_width)
        logits_HxNxM = jnp.einsum("nhd,mhd->hnm", q_NxHxd, k_MxHxd)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        weights_HxNxM = jax.nn.softmax(logits_HxNxM.astype(wide) + bias_HxNxM.astype(wide))
        mixed_NxHxd = jnp.einsum("hnm,mhd->nhd", weights_HxNxM.astype(self.dtype), v_MxHxd)
        mixed_NxD = mixed_NxHxd.reshape(num_queries, width)
        if self.scaling == "blog":
            mixed_NxD = mixed_NxD / math.sqrt(width)
        return Dense(width, dtype=self.dtype, name="out")(mixed_NxD)


def mask_bias(mask: Array) -> Array:
    """The seed's M: 0 where attention is allowed, and so low elsewhere that a weight is 0.

    Not -inf: a query that may attend to nothing would be nan, and so would its gradient. It
    gets a mean over all keys instead, which the caller replaces or never looks at.
    """
    return jnp.where(mask, 0.0, -1e30)


class Block(nn.Module):
    """One pre-LN transformer layer: self-attention and an MLP, both residual, `[N, D]`."""

    num_heads: int
    mlp_ratio: int
    dropout: float = 0.0
    scaling: str = "standard"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_NxD: Array, bias_HxNxN: Array, deterministic: bool = True) -> Array:
        width = x_NxD.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        y_NxD = layer_norm(x_NxD)
        attention = Attention(self.num_heads, self.scaling, self.dtype)
        x_NxD = x_NxD + drop(attention(y_NxD, y_NxD, bias_HxNxN))
        mlp = Mlp(self.mlp_ratio * width, width, self.dtype)
        return x_NxD + drop(mlp(layer_norm(x_NxD)))


def layer_norm(x: Array) -> Array:
    """(x - mean) / std over the last axis, statistics in float32 or wider.

    Without scale and offset: a dense layer always follows, and has both.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def safe_norm(x: Array) -> Array:
    """Euclidean norm over the last axis, with gradient 0 (not nan) where it is 0."""
    square = jnp.sum(x * x, axis=-1)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def gaussian_basis(distance: Array, num_radial: int, cutoff: float) -> Array:
    """Gaussians with centres on [0, cutoff], one spacing wide: `[...] -> [..., K]`, angstrom.

    Past the cutoff all of them fade out, so far pairs are told apart only from near ones.
    """
    centres_K = jnp.linspace(0.0, cutoff, num_radial, dtype=distance.dtype)
    spacing = cutoff / (num_radial - 1)
    return jnp.exp(-0.5 * ((distance[..., None] - centres_K) / spacing) ** 2)
