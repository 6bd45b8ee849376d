"""Layers that the models share: dense, attention, transformer block, norms, radial basis.

Written for one graph; the batch is `jax.vmap` around the model. Attention weights, layer
norm statistics and distances are float32 (or wider) whatever the compute dtype.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

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


@jax.jit
def select_rows(selector_NxM: Array, x_MxD: Array) -> Array:
    """`selector @ x` where a row of `selector` holds a few ones (or minus ones): moves rows.

    In the place of a gather or scatter, whose gradient runs on one thread of a CPU. `flops.py`
    knows the name, and counts nothing.
    """
    return _matmul(selector_NxM, x_MxD)


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
    """A learned vector for each of `num` types, `[...] int -> [..., features]`."""

    num: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, types: Array) -> Array:
        table = self.param("table", nn.initializers.normal(1.0), (self.num, self.features))
        one_hot = jax.nn.one_hot(types, self.num, dtype=self.dtype)
        rows = select_rows(one_hot.reshape(-1, self.num), table.astype(self.dtype))
        return rows.reshape(*types.shape, self.features)


class Mlp(nn.Module):
    """Dense, SiLU, Dense: `[..., D] -> [..., features]`."""

    hidden: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.silu(Dense(self.hidden, dtype=self.dtype)(x))
        return Dense(self.features, dtype=self.dtype)(x)


@jax.custom_vjp
def attend(q_HxNxd: Array, k_HxMxd: Array, v_HxMxd: Array, bias_HxNxM: Array) -> Array:
    """softmax(Q Kᵀ + bias) V of each head, `[H, N, d]`; the softmax in the type of the bias.

    Its gradient is written out, because the products that autodiff makes of it take transposed
    operands, for which XLA on a CPU has no fast product: 660 instead of 1140 us for 32 graphs
    of 20 tokens and 16 heads of 4, forward and backward, on one core.
    """
    return _attend_forward(q_HxNxd, k_HxMxd, v_HxMxd, bias_HxNxM)[0]


def _attend_forward(q_HxNxd, k_HxMxd, v_HxMxd, bias_HxNxM):
    logits_HxNxM = jnp.einsum("hnd,hmd->hnm", q_HxNxd, k_HxMxd)
    weights_HxNxM = jax.nn.softmax(logits_HxNxM.astype(bias_HxNxM.dtype) + bias_HxNxM)
    mixed_HxNxd = jnp.einsum("hnm,hmd->hnd", weights_HxNxM.astype(v_HxMxd.dtype), v_HxMxd)
    return mixed_HxNxd, (q_HxNxd, k_HxMxd, v_HxMxd, weights_HxNxM, mixed_HxNxd)


def _attend_backward(kept, g_HxNxd):
    q_HxNxd, k_HxMxd, v_HxMxd, weights_HxNxM, mixed_HxNxd = kept
    dtype, wide = q_HxNxd.dtype, weights_HxNxM.dtype
    # sum_m w_nm (g_n . v_m) = g_n . sum_m w_nm v_m: over d numbers instead of M.
    mean_HxNx1 = (g_HxNxd.astype(wide) * mixed_HxNxd.astype(wide)).sum(axis=-1, keepdims=True)
    of_weights_HxNxM = jnp.einsum("hnd,hmd->hnm", g_HxNxd, v_HxMxd).astype(wide)
    of_logits_HxNxM = weights_HxNxM * (of_weights_HxNxM - mean_HxNx1)
    small_HxNxM = of_logits_HxNxM.astype(dtype)

    def over_queries(x_HxNxd, weights_HxNxM):
        # The small operand is transposed, and apart: merged into the product it is slow again.
        x_HxdxN = jax.lax.optimization_barrier(x_HxNxd.swapaxes(1, 2))
        sum_HxdxM = jnp.einsum("hdn,hnm->hdm", x_HxdxN, weights_HxNxM)
        return jax.lax.optimization_barrier(sum_HxdxM).swapaxes(1, 2)

    return (
        jnp.einsum("hnm,hmd->hnd", small_HxNxM, k_HxMxd),
        over_queries(q_HxNxd, small_HxNxM),
        over_queries(g_HxNxd, weights_HxNxM.astype(dtype)),
        of_logits_HxNxM,
    )


attend.defvjp(_attend_forward, _attend_backward)


@flax.struct.dataclass
class Links:
    """Which query attends to which key, as a list of L pairs, with a bias of each logit.

    In the place of a matrix of biases: memory and time grow with the pairs that are there.

    Attributes:
      query_L: [L] int, receiver of a pair.
      key_L: [L] int.
      bias_LxH: [L, 1 or H].
      mask_L: [L] bool, false for padding.
    """

    query_L: Array
    key_L: Array
    bias_LxH: Array
    mask_L: Array


def attend_along(q_HxNxd: Array, k_HxMxd: Array, v_HxMxd: Array, links: Links) -> Array:
    """As `attend`, each query over the keys it is linked to; 0 where there is none."""
    num_queries, wide = q_HxNxd.shape[1], links.bias_LxH.dtype
    at = lambda x_HxNxd, index_L: x_HxNxd.swapaxes(0, 1)[index_L]
    sums = lambda x: jax.ops.segment_sum(x, links.query_L, num_queries)
    q_LxHxd = at(q_HxNxd, links.query_L)
    logits_LxH = (q_LxHxd * at(k_HxMxd, links.key_L)).sum(axis=-1).astype(wide) + links.bias_LxH
    logits_LxH = jnp.where(links.mask_L[:, None], logits_LxH, -1e30)
    most_NxH = jax.ops.segment_max(logits_LxH, links.query_L, num_queries)
    most_LxH = jax.lax.stop_gradient(jnp.maximum(most_NxH, -1e30))[links.query_L]
    weights_LxH = jnp.where(links.mask_L[:, None], jnp.exp(logits_LxH - most_LxH), 0)
    total_NxH = sums(weights_LxH)
    weights_LxH = weights_LxH / jnp.where(total_NxH > 0, total_NxH, 1)[links.query_L]
    v_LxHxd = at(v_HxMxd, links.key_L)
    mixed_NxHxd = sums(v_LxHxd.astype(wide) * weights_LxH[..., None])
    return mixed_NxHxd.astype(v_HxMxd.dtype).swapaxes(0, 1)


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
    def __call__(self, query_NxD: Array, key_MxD: Array, bias: Array | Links) -> Array:
        """Args: tokens, and `Links` or a bias of the logits that may be [1 or H, 1 or N, M]."""
        num_queries, width = query_NxD.shape
        head_width = width // self.num_heads
        # No biases: one on the keys cancels in the softmax, and `out` has its own.
        dense = lambda features, name: Dense(features, use_bias=False, dtype=self.dtype, name=name)
        heads = lambda x_NxHxd: x_NxHxd.swapaxes(0, 1)
        q_HxNxd = heads(dense(width, "query")(query_NxD).reshape(-1, self.num_heads, head_width))
        # Columns head by head, so that a mesh can divide the heads.
        kv_MxD2 = dense(2 * width, "kv")(key_MxD)
        kv_MxHx2xd = kv_MxD2.reshape(-1, self.num_heads, 2, head_width)
        k_HxMxd, v_HxMxd = heads(kv_MxHx2xd[:, :, 0]), heads(kv_MxHx2xd[:, :, 1])
        if self.scaling == "standard":
            q_HxNxd = q_HxNxd / math.sqrt(head_width)
        if isinstance(bias, Links):
            mixed_HxNxd = attend_along(q_HxNxd, k_HxMxd, v_HxMxd, bias)
        else:
            wide = jnp.promote_types(self.dtype, jnp.float32)
            shape = (self.num_heads, num_queries, len(key_MxD))
            bias_HxNxM = jnp.broadcast_to(bias.astype(wide), shape)
            mixed_HxNxd = attend(q_HxNxd, k_HxMxd, v_HxMxd, bias_HxNxM)
        mixed_NxD = heads(mixed_HxNxd).reshape(num_queries, width)
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
    """One pre-LN transformer layer: self-attention and an MLP, both residual, `[N, D]`.

    Without a bias (None) there is no attention: the MLP alone.
    """

    num_heads: int
    mlp_ratio: int
    dropout: float = 0.0
    scaling: str = "standard"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_NxD: Array, bias: Array | Links | None, deterministic=True) -> Array:
        width = x_NxD.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        if bias is not None:
            y_NxD = layer_norm(x_NxD)
            attention = Attention(self.num_heads, self.scaling, self.dtype)
            x_NxD = x_NxD + drop(attention(y_NxD, y_NxD, bias))
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
    # Constants of NumPy: jnp.linspace would be computed anew, inside the loop, for each distance.
    centres_K = np.linspace(0.0, cutoff, num_radial)
    scale = math.sqrt(0.5) * (num_radial - 1) / cutoff
    scaled = distance[..., None] * scale - jnp.asarray(centres_K * scale, distance.dtype)
    return jnp.exp(-jnp.square(scaled))
