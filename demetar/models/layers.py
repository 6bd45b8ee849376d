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

from data_pipelines.graph import Graph
from demetar.models import ops

Array = jax.Array


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
        y = ops.matmul(rows, kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


def torch_dense(features: int, fan_in: int, dtype, name: str, use_bias: bool = True) -> Dense:
    """With PyTorch's initial weights, uniform within 1 / sqrt(fan_in); biases start at 0."""
    bound = 1 / math.sqrt(fan_in)
    draw = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    return Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=draw, name=name)


class Embed(nn.Module):
    """A learned vector for each of `num` types, `[...] int -> [..., features]`."""

    num: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, types: Array) -> Array:
        table = self.param("table", nn.initializers.normal(1.0), (self.num, self.features))
        one_hot = jax.nn.one_hot(types, self.num, dtype=self.dtype)
        rows = ops.select_rows(one_hot.reshape(-1, self.num), table.astype(self.dtype))
        return rows.reshape(*types.shape, self.features)


class Mlp(nn.Module):
    """Dense, SiLU, Dense: `[..., D] -> [..., features]`."""

    hidden: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.silu(Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        return Dense(self.features, dtype=self.dtype, name="out")(x)


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


def softmax_at(index_L: Array, logits_LxH: Array, mask_Lx1: Array, number: int) -> Array:
    """Softmax over the rows that have the same of `number` indices, `[L, H]`; 0 where masked."""
    logits_LxH = jnp.where(mask_Lx1, logits_LxH, -1e30)
    most_NxH = jax.ops.segment_max(logits_LxH, index_L, number)
    most_LxH = jax.lax.stop_gradient(jnp.maximum(most_NxH, -1e30))[index_L]
    weights_LxH = jnp.where(mask_Lx1, jnp.exp(logits_LxH - most_LxH), 0)
    total_NxH = jax.ops.segment_sum(weights_LxH, index_L, number)
    return weights_LxH / jnp.where(total_NxH > 0, total_NxH, 1)[index_L]


def incident_links(graph: Graph, first: int = 0) -> Links:
    """Each node to the edges that it ends; token `first` is node 0."""
    edge_E = jnp.arange(len(graph.edge_mask))
    both = lambda a, b: jnp.concatenate([a, b])
    return Links(
        query_L=both(graph.receivers, graph.senders) + first,
        key_L=both(edge_E, edge_E),
        bias_LxH=jnp.zeros((2 * len(edge_E), 1), graph.position.dtype),
        mask_L=both(graph.edge_mask, graph.edge_mask),
    )


def attend_along(q_NxD: Array, k_MxD: Array, v_MxD: Array, links: Links, num_heads: int) -> Array:
    """As `ops.attend`, each query over the keys it is linked to; 0 where there is none.

    Columns head by head. Numbers of a head are summed and spread by products with ones and zeros:
    sums over an axis as short as a head are slow on a CPU.
    """
    num_queries, width = q_NxD.shape
    wide = links.bias_LxH.dtype
    of_head_DxH = np.kron(np.eye(num_heads), np.ones((width // num_heads, 1)))
    over_head = lambda x_LxD: ops.select_columns(x_LxD.astype(wide), of_head_DxH)
    products_LxD = q_NxD[links.query_L] * k_MxD[links.key_L]
    logits_LxH = over_head(products_LxD) + links.bias_LxH
    weights_LxH = softmax_at(links.query_L, logits_LxH, links.mask_L[:, None], num_queries)
    weights_LxD = ops.select_columns(weights_LxH, of_head_DxH.T)
    mixed_LxD = v_MxD[links.key_L].astype(wide) * weights_LxD
    mixed_NxD = jax.ops.segment_sum(mixed_LxD, links.query_L, num_queries)
    return mixed_NxD.astype(v_MxD.dtype)


class Attention(nn.Module):
    """Multi-head attention from N query tokens to M key tokens, `[N, D] -> [N, D]`.

    With `scaling='standard'`, softmax(Q Kᵀ / √d_head + bias) V per head (Vaswani et al. 2017);
    with `'blog'`, softmax(Q Kᵀ + bias) V / √D, as Equations 9 and 10 of the DEMETAr post print it.

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
        q_NxD = dense(width, "query")(query_NxD)
        divisor = math.sqrt(head_width) if self.scaling == "standard" else 1.0
        # Columns head by head, so that a mesh can divide the heads.
        kv_MxD2 = dense(2 * width, "kv")(key_MxD)
        kv_MxHx2xd = kv_MxD2.reshape(-1, self.num_heads, 2, head_width)
        if isinstance(bias, Links):
            k_MxD, v_MxD = (kv_MxHx2xd[:, :, which].reshape(-1, width) for which in (0, 1))
            mixed_NxD = attend_along(q_NxD / divisor, k_MxD, v_MxD, bias, self.num_heads)
        else:
            q_NxHxd = q_NxD.reshape(-1, self.num_heads, head_width)
            bias = bias.astype(jnp.promote_types(self.dtype, jnp.float32))
            bias = bias.reshape((1,) * (3 - bias.ndim) + bias.shape)
            mixed_NxHxd = ops.attend_heads(q_NxHxd, kv_MxHx2xd, bias, divisor)
            mixed_NxD = mixed_NxHxd.reshape(num_queries, width)
        if self.scaling == "blog":
            mixed_NxD = mixed_NxD / math.sqrt(width)
        return Dense(width, dtype=self.dtype, name="out")(mixed_NxD)


def mask_bias(mask: Array) -> Array:
    """The post's M: 0 where attention is allowed, and so low elsewhere that a weight is 0.

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
            attention = Attention(self.num_heads, self.scaling, self.dtype, name="attention")
            x_NxD = x_NxD + drop(attention(y_NxD, y_NxD, bias))
        mlp = Mlp(self.mlp_ratio * width, width, self.dtype, name="mlp")
        return x_NxD + drop(mlp(layer_norm(x_NxD)))


def layer_norm(x: Array) -> Array:
    """(x - mean) / std over the last axis, statistics in float32 or wider.

    Without scale and offset: a dense layer always follows, and has both.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def mean_of_nodes(graph: Graph, x_NxD: Array) -> Array:
    """`[D]` mean over the nodes of a graph, without padding."""
    sum_D = jnp.where(graph.node_mask[:, None], x_NxD, 0).sum(axis=0)
    return sum_D / jnp.maximum(graph.node_mask.sum(), 1)


def safe_norm(x: Array) -> Array:
    """Euclidean norm over the last axis, with gradient 0 (not nan) where it is 0."""
    square = jnp.sum(x * x, axis=-1)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def atom_features(atomic_number_N: Array, elements: tuple[int, ...], dtype) -> Array:
    """[N, 3 x elements]: one-hot element, times (Z / largest Z) to the powers 0, 1 and 2."""
    one_hot = (atomic_number_N[:, None] == jnp.asarray(elements)).astype(dtype)
    scaled_N = atomic_number_N.astype(dtype) / max(elements)
    powers_Nx3 = jnp.stack([jnp.ones_like(scaled_N), scaled_N, scaled_N**2], axis=-1)
    return (one_hot[..., None] * powers_Nx3[:, None]).reshape(len(atomic_number_N), -1)


def gaussian_basis(distance: Array, num_radial: int, cutoff: float) -> Array:
    """Gaussians with centres on [0, cutoff], one spacing wide: `[...] -> [..., K]`, angstrom.

    Past the cutoff all of them fade out, so far pairs are told apart only from near ones.
    """
    # Constants of NumPy: jnp.linspace would be computed anew, inside the loop, for each distance.
    centres_K = np.linspace(0.0, cutoff, num_radial)
    scale = math.sqrt(0.5) * (num_radial - 1) / cutoff
    scaled = distance[..., None] * scale - jnp.asarray(centres_K * scale, distance.dtype)
    return jnp.exp(-jnp.square(scaled))


def cosine_cutoff(distance: Array, cutoff: float) -> Array:
    """(1 + cos(pi d / cutoff)) / 2 below the cutoff, 0 past it (Behler and Parrinello 2007).

    Multiplied to what a pair contributes, it lets that fade with a continuous slope: a pair that
    crosses the cutoff changes nothing at once.
    """
    inside = distance < cutoff
    angle = jnp.where(inside, distance, cutoff) * (math.pi / cutoff)
    return jnp.where(inside, (1 + jnp.cos(angle)) / 2, 0.0)


@flax.struct.dataclass
class Messages:
    """M messages: both directions of each edge, one half after the other; with `loops`, then each
    node's to itself.

    A gather and a sum by receiver: time and memory grow with the edges, however many nodes
    there are. (A matrix [N, N, D] of all pairs, without either, was no faster on a CPU, on
    complete graphs too.)

    Attributes:
      mask_Mx1: float, 0 for padding.
      receiver_M, sender_M: nodes.
      num_nodes: N.
      num_edges: E.
    """

    mask_Mx1: Array
    receiver_M: Array
    sender_M: Array
    num_nodes: int = flax.struct.field(pytree_node=False)
    num_edges: int = flax.struct.field(pytree_node=False)

    @property
    def count_Nx1(self) -> Array:
        """How many each node receives."""
        return self.sum_at_receiver(jnp.ones_like(self.mask_Mx1), self.mask_Mx1)

    def of_receiver(self, x_NxD: Array) -> Array:
        """Of each message, the row of its receiver."""
        return x_NxD[self.receiver_M]

    def of_sender(self, x_NxD: Array) -> Array:
        """Of each message, the row of its sender."""
        return x_NxD[self.sender_M]

    def of_edge(self, x_ExD: Array, loop_D: Array | float = 0.0) -> Array:
        """Of each message, the row of its edge, the same in both directions; `loop_D` of loops."""
        rows = [x_ExD, x_ExD]
        if num_loops := len(self.receiver_M) - 2 * self.num_edges:
            shape = (num_loops, *x_ExD.shape[1:])
            rows.append(jnp.broadcast_to(jnp.asarray(loop_D, x_ExD.dtype), shape))
        return jnp.concatenate(rows)

    def sum_at_receiver(self, x_MxD: Array, weight_Mx1: Array) -> Array:
        """`sum over messages to i of weight x`, `[N, D]`."""
        wide = jnp.promote_types(x_MxD.dtype, jnp.float32)  # sums of many small numbers
        weighted_MxD = x_MxD.astype(wide) * weight_Mx1.astype(wide)
        sum_NxD = jax.ops.segment_sum(weighted_MxD, self.receiver_M, self.num_nodes)
        return sum_NxD.astype(jnp.promote_types(x_MxD.dtype, weight_Mx1.dtype))

    def softmax_at_receiver(self, logits_MxH: Array) -> Array:
        """Softmax over the messages to each node, `[M, H]`; 0 for padding."""
        wide = logits_MxH.astype(jnp.promote_types(logits_MxH.dtype, jnp.float32))
        return softmax_at(self.receiver_M, wide, self.mask_Mx1 > 0, self.num_nodes)


def messages_of(graph: Graph, loops: bool = False) -> Messages:
    """The messages of one graph without padding values."""
    receivers, senders = [graph.receivers, graph.senders], [graph.senders, graph.receivers]
    masks = [graph.edge_mask, graph.edge_mask]
    if loops:
        nodes = jnp.arange(len(graph.node_mask), dtype=graph.senders.dtype)
        receivers, senders = [*receivers, nodes], [*senders, nodes]
        masks = [*masks, graph.node_mask]
    return Messages(
        jnp.concatenate(masks)[:, None].astype(graph.position.dtype),
        jnp.concatenate(receivers),
        jnp.concatenate(senders),
        len(graph.node_mask),
        len(graph.edge_mask),
    )
