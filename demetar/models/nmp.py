"""NMP, the message passing neural network "enn-s2s" (Gilmer et al. 2017, arXiv:1704.01212).

    m_i = sum_j A(e_ij) h_j              edge network: a matrix of each pair     Section 5.2
    h_i = GRU(m_i, h_i)                  T rounds, the same weights in all       Section 2
    y   = R(set2set({h_i}, {f_i}))       attention over the atoms, M steps       Section 5.3

where f_i are the features of an atom and e_ij is (bond of the pair, one-hot; distance in
angstrom). All pairs that the graph has as edges send messages. Two forms differ:

    `authors`  Their published code. h starts as f_i, filled up with zeros; "no bond" is a fifth
               kind; an atom sends to itself too; m_i = [sum A h_j, sum B h_j] + b; no biases in
               the GRU; the read-out sees [h_i, f_i].
    `pyg`      PyTorch Geometric's example, the form in common use. h starts as relu(linear(f_i));
               m_i = relu(mean_j A h_j + R h_i + b); the GRU and LSTM of PyTorch.

The last layer of the edge network, A(e) = sum_k g_k(e) W_k, with hidden values g, is applied to
h before the sum: A h_j = sum_k g_k(e_ij) (W_k h_j). Products with W are made once for each atom,
and no matrix [D, D] of a pair exists.
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_pipelines.errors import UserError
from data_pipelines.graph import Array, Graph, without_padding_values
from demetar.models import ops
from demetar.models.base import GraphModel
from demetar.models.layers import Dense, messages_of, safe_norm, torch_dense

_NUM_BONDS = 5  # kinds of `BondType`, none included


class Nmp(GraphModel):
    """Predicts graph targets with a learned read-out of the set of atoms.

    Weights start as each form's library has them (Glorot; PyTorch), biases at 0. Defaults are
    those of the authors' code; PyTorch Geometric's example has width 64, 3 rounds, 3 set steps,
    1 edge layer of 128 and 1 output layer of 64.

    Attributes:
      form: `authors` or `pyg`.
      width: D, of an atom's state; at least the number of features for `authors`.
      rounds: T, of messages.
      set_steps: M, of attention over the atoms.
      edge_layers: hidden layers of the edge network.
      edge_width: their width.
      output_layers: hidden layers after the read-out.
      output_width: their width.
      dtype: of states and messages; distances are float32 or wider.
    """

    READOUTS: ClassVar = ("cls",)
    READS: ClassVar = frozenset({"node_feature"})
    CHOICES: ClassVar = {"form": ("authors", "pyg")}
    LEAST: ClassVar = {"edge_layers": 0, "output_layers": 0}

    form: str = "authors"
    width: int = 50
    rounds: int = 6
    set_steps: int = 12
    edge_layers: int = 4
    edge_width: int = 50
    output_layers: int = 1
    output_width: int = 200
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, graph: Graph, deterministic: bool = True) -> dict[str, Array]:
        del deterministic  # there is no dropout
        graph = without_padding_values(graph)
        if graph.node_feature is None:
            raise UserError(
                "Model 'nmp' reads features of atoms, and these data have none: set "
                "config.data.node_features."
            )
        authors, dtype = self.form == "authors", self.dtype
        f_NxF = graph.node_feature.astype(dtype)
        if authors:
            h_NxD = _filled_up(f_NxF, self.width)
        else:
            h_NxD = nn.relu(_torch_linear(self.width, f_NxF, "atom_embedding")(f_NxF))
        edges = lambda name: _EdgeNetwork(
            self.width, self.edge_width, self.edge_layers, authors, dtype, name=name
        )(graph)
        if authors:
            pairs = [edges("edge_in"), edges("edge_out")]
            message, update = _SumMessage(name="message"), _PlainGru(name="update")
            read_out = _TanhSet2Set(self.set_steps, name="set2set")
        else:
            pairs = edges("edge")
            message, update = _MeanMessage(name="message"), _TorchGru(name="update")
            read_out = _TorchSet2Set(self.set_steps, name="set2set")
        for _ in range(self.rounds):
            h_NxD = update(message(h_NxD, pairs), h_NxD)
        read_NxW = jnp.concatenate([h_NxD, f_NxF], axis=-1) if authors else h_NxD
        read_W = read_out(read_NxW, graph.node_mask)
        self.keep_embedding(lambda: read_W)
        linear, y_1xW = _glorot_linear if authors else _torch_linear, read_W[None]
        for number in range(self.output_layers):
            y_1xW = nn.relu(linear(self.output_width, y_1xW, f"output_{number}")(y_1xW))
        y_T = linear(len(self.targets), y_1xW, "output")(y_1xW)[0].astype(graph.position.dtype)
        return {target.name: y_T[number] for number, target in enumerate(self.targets)}


class _EdgeNetwork(nn.Module):
    """The matrices A(e_ij) of all pairs as two factors: `[N, N K]` and `[D, K D]`.

    A product of matrices in place of a sum along edges: row i of the first has the K hidden
    values of each pair (i, j). They are 0 where there is no edge. With K counts the constant 1
    whose W is the bias.
    """

    width: int
    hidden: int
    num_layers: int
    authors: bool
    dtype: Any

    @nn.compact
    def __call__(self, graph: Graph) -> tuple[Array, Array]:
        width, num_nodes = self.width, len(graph.node_mask)
        ends = graph.position[graph.senders], graph.position[graph.receivers]
        distance_Ex1 = safe_norm(ends[0] - ends[1])[:, None].astype(self.dtype)
        kinds = jnp.arange(0 if self.authors else 1, _NUM_BONDS)
        bond = (graph.edge_type[:, None] == kinds).astype(self.dtype)
        e_ExF = jnp.concatenate([bond, distance_Ex1], axis=-1)
        if self.authors:  # the last row is an atom with itself: no bond, no distance
            e_ExF = jnp.concatenate([e_ExF, jnp.eye(1, e_ExF.shape[-1], dtype=self.dtype)])
        linear = _glorot_linear if self.authors else _torch_linear
        g_ExK = e_ExF
        for number in range(self.num_layers):
            g_ExK = nn.relu(linear(self.hidden, g_ExK, f"hidden_{number}")(g_ExK))
        g_ExK = jnp.concatenate([g_ExK, jnp.ones_like(g_ExK[:, :1])], axis=-1)
        num_in = g_ExK.shape[-1] - 1
        bound = math.sqrt(6 / (num_in + width**2)) if self.authors else 1 / math.sqrt(num_in)
        kernel = self.param("kernel", _uniform(bound), (num_in, width, width))
        bias = self.param("bias", nn.initializers.zeros, (width, width))
        w_KxDxD = jnp.concatenate([kernel, bias[None]]).astype(self.dtype)

        messages = messages_of(graph, loops=self.authors)
        loop_K = g_ExK[-1] if self.authors else 0.0
        g_MxK = messages.of_edge(g_ExK[: messages.num_edges], loop_K)
        weight_Mx1 = messages.mask_Mx1
        if not self.authors:  # the mean over senders
            weight_Mx1 /= jnp.maximum(messages.of_receiver(messages.count_Nx1), 1)
        g_NxNxK = jnp.zeros((num_nodes, num_nodes, num_in + 1), self.dtype)
        place = g_NxNxK.at[messages.receiver_M, messages.sender_M]
        g_NxNxK = place.add(g_MxK * weight_Mx1.astype(self.dtype))
        return g_NxNxK.reshape(num_nodes, -1), w_KxDxD.swapaxes(0, 1).reshape(width, -1)


def _sum_of_pairs(pairs: tuple[Array, Array], h_NxD: Array) -> Array:
    """sum_j A_ij h_j, `[N, D]`."""
    g_NxNK, w_DxKD = pairs
    return g_NxNK @ ops.matmul(h_NxD, w_DxKD).reshape(-1, h_NxD.shape[-1])


class _SumMessage(nn.Module):
    """[sum_j A_ij h_j, sum_j B_ij h_j] + b: A of what comes in, B of what goes out."""

    @nn.compact
    def __call__(self, h_NxD: Array, pairs: list) -> Array:
        m_NxD2 = jnp.concatenate([_sum_of_pairs(pair, h_NxD) for pair in pairs], axis=-1)
        bias = self.param("bias", nn.initializers.zeros, m_NxD2.shape[-1:])
        return m_NxD2 + bias.astype(h_NxD.dtype)


class _MeanMessage(nn.Module):
    """relu(mean_j A_ij h_j + R h_i + b)."""

    @nn.compact
    def __call__(self, h_NxD: Array, pairs: tuple) -> Array:
        root_NxD = _torch_linear(h_NxD.shape[-1], h_NxD, "root")(h_NxD)
        return nn.relu(_sum_of_pairs(pairs, h_NxD) + root_NxD)


class _PlainGru(nn.Module):
    """A gated recurrent unit without biases; its reset gate is on the state (Cho et al. 2014)."""

    @nn.compact
    def __call__(self, m_NxM: Array, h_NxD: Array) -> Array:
        width = h_NxD.shape[-1]
        glorot = lambda parts, x, name: _glorot_linear(width, x, name, parts, use_bias=False)(x)
        m_z, m_r, m_n = jnp.split(glorot(3, m_NxM, "input"), 3, axis=-1)
        h_z, h_r = jnp.split(glorot(2, h_NxD, "gates"), 2, axis=-1)
        z_NxD, r_NxD = nn.sigmoid(m_z + h_z), nn.sigmoid(m_r + h_r)
        new_NxD = jnp.tanh(m_n + glorot(1, r_NxD * h_NxD, "state"))
        return (1 - z_NxD) * h_NxD + z_NxD * new_NxD


class _TorchGru(nn.Module):
    """PyTorch's: the reset gate is on the product with the state, and z keeps the state."""

    @nn.compact
    def __call__(self, m_NxM: Array, h_NxD: Array) -> Array:
        width = h_NxD.shape[-1]
        linear = lambda x, name: Dense(
            3 * width, dtype=x.dtype, kernel_init=_uniform(width**-0.5), name=name
        )(x)
        m_r, m_z, m_n = jnp.split(linear(m_NxM, "input"), 3, axis=-1)
        h_r, h_z, h_n = jnp.split(linear(h_NxD, "state"), 3, axis=-1)
        z_NxD = nn.sigmoid(m_z + h_z)
        return (1 - z_NxD) * jnp.tanh(m_n + nn.sigmoid(m_r + h_r) * h_n) + z_NxD * h_NxD


class _TanhSet2Set(nn.Module):
    """The authors' read-out: `[N, W]` -> `[2W]`, logits v . tanh(q W_2 + s_i), s = x W_1.

    Its LSTM reads nothing but [query, what was attended to], and its candidate has a sigmoid
    inside the tanh, as their code has.
    """

    steps: int

    @nn.compact
    def __call__(self, x_NxW: Array, mask_N: Array) -> Array:
        width, dtype = x_NxW.shape[-1], x_NxW.dtype
        s_NxW = _glorot_linear(width, x_NxW, "to_keys", use_bias=False)(x_NxW)
        state_1xW2, cell_1xW = _zeros(2 * width, mask_N, dtype), 0.0
        gates = _glorot_linear(width, state_1xW2, "gates", parts=4)
        query = _glorot_linear(width, x_NxW, "to_query", use_bias=False)
        logit = _glorot_linear(1, x_NxW, "to_logit", use_bias=False)
        for _ in range(self.steps):
            i, f, o, g = jnp.split(nn.sigmoid(gates(state_1xW2)), 4, axis=-1)
            cell_1xW = f * cell_1xW + i * jnp.tanh(g)
            q_1xW = o * jnp.tanh(cell_1xW)
            logit_N = logit(jnp.tanh(query(q_1xW) + s_NxW))[:, 0]
            read_1xW = _attended(logit_N, s_NxW, mask_N)
            state_1xW2 = jnp.concatenate([q_1xW, read_1xW], axis=-1)
        return state_1xW2[0]


class _TorchSet2Set(nn.Module):
    """Set2set (Vinyals et al. 2016) with PyTorch's LSTM: `[N, D]` -> `[2D]`, logits q . x_i."""

    steps: int

    @nn.compact
    def __call__(self, x_NxD: Array, mask_N: Array) -> Array:
        width, dtype = x_NxD.shape[-1], x_NxD.dtype
        linear = lambda name: Dense(4 * width, True, dtype, _uniform(width**-0.5), name=name)
        of_input, of_state = linear("input"), linear("state")
        zeros = lambda parts: _zeros(parts * width, mask_N, dtype)
        read_1xD2, q_1xD, cell_1xD = zeros(2), zeros(1), 0.0
        for _ in range(self.steps):
            gates = of_input(read_1xD2) + of_state(q_1xD)
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            cell_1xD = nn.sigmoid(f) * cell_1xD + nn.sigmoid(i) * jnp.tanh(g)
            q_1xD = nn.sigmoid(o) * jnp.tanh(cell_1xD)
            attended_1xD = _attended((x_NxD * q_1xD).sum(axis=-1), x_NxD, mask_N)
            read_1xD2 = jnp.concatenate([q_1xD, attended_1xD], axis=-1)
        return read_1xD2[0]


def _zeros(width: int, mask_N: Array, dtype) -> Array:
    """`[1, width]`, of each graph its own: `ops.matmul` cannot differentiate a shared constant."""
    zero = jnp.zeros((1, width), dtype)
    return jnp.where(mask_N[:1, None], zero, zero)


def _attended(logit_N: Array, x_NxD: Array, mask_N: Array) -> Array:
    """sum_i softmax_i(logit) x_i over real atoms, `[1, D]`."""
    wide = logit_N.astype(jnp.promote_types(logit_N.dtype, jnp.float32))
    weight_N = nn.softmax(jnp.where(mask_N, wide, -1e30)).astype(x_NxD.dtype)
    return (weight_N[:, None] * x_NxD).sum(axis=0, keepdims=True)


def _filled_up(f_NxF: Array, width: int) -> Array:
    """Features with zeros up to the width."""
    missing = width - f_NxF.shape[-1]
    if missing < 0:
        raise UserError(
            f"config.model.width ({width}) of model 'nmp' must be at least the number of "
            f"features of an atom ({f_NxF.shape[-1]})."
        )
    return jnp.pad(f_NxF, ((0, 0), (0, missing)))


def _uniform(bound: float):
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _glorot_linear(features: int, x: Array, name: str, parts=1, use_bias=True) -> Dense:
    """A layer for x with Glorot's uniform weights; `parts` matrices side by side."""
    draw = _uniform(math.sqrt(6 / (x.shape[-1] + features)))
    return Dense(parts * features, use_bias, x.dtype, draw, name=name)


def _torch_linear(features: int, x: Array, name: str) -> Dense:
    """A layer for x with PyTorch's weights."""
    return torch_dense(features, x.shape[-1], x.dtype, name)
