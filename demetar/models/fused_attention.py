"""Attention with a bias as one kernel for GPUs, and its gradient as another (Pallas, Triton).

Equal to `ops.plain_attend_heads`. Logits and weights never leave the chip, and queries, keys and
values are read where the projections left them: nothing is transposed. A program of the grid holds
all keys of one head, so a row of the softmax is whole, and the gradient needs nothing but the
inputs. No two programs write to one place: results are the same each time. There is no gradient of
the gradient.

Blocks are padded to powers of two, as Triton asks. What lies beyond the arrays is masked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Array = jax.Array

# Bytes of the keys of one head, padded: the gradient holds them several times in the memory of one
# multiprocessor. With more it does not compile for an H100 (jax 0.10.2 and 0.11.2).
_MAX_KEYS_BYTES = 32 * 2**10
# Of GPUs whose multiprocessors have at least 163 KiB: A100, H100, B200.
_CAPABILITIES = ("8.0", "9.0", "10.0")
_ROWS = 16  # queries at once; a product of Triton has at least 16 rows and columns


def is_for(device: jax.Device) -> bool:
    """Whether the kernels are written for this device, or one that is only planned."""
    capability = getattr(device, "compute_capability", "")
    return device.platform in ("gpu", "cuda") and str(capability) in _CAPABILITIES


def fits(q_NxHxd: Array, kv_MxHx2xd: Array, bias: Array) -> bool:
    """Whether the kernels compile for arrays of these sizes and types."""
    blocks = _Blocks.of(q_NxHxd, kv_MxHx2xd, bias)
    size = blocks.padded_keys * blocks.padded_width * kv_MxHx2xd.dtype.itemsize
    is_short = q_NxHxd.dtype.itemsize <= 4 and bias.dtype == jnp.float32
    return is_short and size <= _MAX_KEYS_BYTES


def attend_heads(q_NxHxd: Array, kv_MxHx2xd: Array, bias: Array, divisor: float) -> Array:
    """softmax(Q Kᵀ / divisor + bias) V of each head, `[N, H, d]`.

    Args:
      q_NxHxd: queries.
      kv_MxHx2xd: keys and values, of which `fits` says whether they are too many.
      bias: of the logits, [1 or H, 1 or N, M].
      divisor: of the products.
    """
    return _attend(q_NxHxd, kv_MxHx2xd, bias, divisor, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q_NxHxd, kv_MxHx2xd, bias, divisor: float, interpret: bool) -> Array:
    blocks = _Blocks.of(q_NxHxd, kv_MxHx2xd, bias)
    rows = blocks.queries(_ROWS)
    return pl.pallas_call(
        functools.partial(_forward_kernel, blocks=blocks, divisor=divisor),
        grid=(blocks.heads, pl.cdiv(blocks.num_queries, _ROWS)),
        in_specs=[rows, blocks.part(0), blocks.part(1), blocks.bias(_ROWS)],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(q_NxHxd.shape, q_NxHxd.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="attend",
    )(q_NxHxd, kv_MxHx2xd, kv_MxHx2xd, bias)


def _forward(q, kv, bias, divisor, interpret):
    arguments = (q.value, kv.value, bias.value)
    # A list of one says, in its length, that a gradient of the bias is asked for.
    return _attend(*arguments, divisor, interpret), (*arguments, [()] * bias.perturbed)


def _backward(divisor, interpret, kept, g_NxHxd):
    q_NxHxd, kv_MxHx2xd, bias, is_learned = kept
    blocks = _Blocks.of(q_NxHxd, kv_MxHx2xd, bias)
    whole = blocks.queries(blocks.padded_queries)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    outputs = [(whole, like(q_NxHxd)), (blocks.parts, like(kv_MxHx2xd))]
    if is_learned:
        shape = (blocks.heads, blocks.num_queries, blocks.num_keys)
        outputs.append((blocks.logits, jax.ShapeDtypeStruct(shape, bias.dtype)))
    out_specs, out_shape = zip(*outputs, strict=True)
    dq_NxHxd, dkv_MxHx2xd, *of_logits = pl.pallas_call(
        functools.partial(_backward_kernel, blocks=blocks, divisor=divisor),
        grid=(blocks.heads, 1),
        in_specs=[
            whole, blocks.part(0), blocks.part(1), blocks.bias(blocks.padded_queries), whole,
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=8),
        interpret=interpret,
        name="attend_backward",
    )(q_NxHxd, kv_MxHx2xd, kv_MxHx2xd, bias, g_NxHxd)  # fmt: skip
    if not is_learned:
        return dq_NxHxd, dkv_MxHx2xd, jnp.zeros_like(bias)
    (dlogits_HxNxM,) = of_logits
    repeated = [axis for axis in range(3) if bias.shape[axis] < dlogits_HxNxM.shape[axis]]
    return dq_NxHxd, dkv_MxHx2xd, dlogits_HxNxM.sum(axis=repeated, keepdims=True)


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


# --- kernels -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Sizes, and the blocks of each array that a program (head, rows) sees."""

    heads: int
    num_queries: int
    num_keys: int
    width: int
    bias_heads: int
    bias_rows: int

    @classmethod
    def of(cls, q_NxHxd: Array, kv_MxHx2xd: Array, bias: Array) -> "_Blocks":
        num_queries, heads, width = q_NxHxd.shape
        return cls(heads, num_queries, len(kv_MxHx2xd), width, *bias.shape[:2])

    @property
    def padded_queries(self) -> int:
        return max(_ROWS, pl.next_power_of_2(self.num_queries))

    @property
    def padded_keys(self) -> int:
        return max(16, pl.next_power_of_2(self.num_keys))

    @property
    def padded_width(self) -> int:
        return max(16, pl.next_power_of_2(self.width))

    def queries(self, rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, None, self.padded_width), lambda h, i: (i, h, 0))

    def part(self, which: int) -> pl.BlockSpec:
        """Keys, 0, or values, 1."""
        shape = (self.padded_keys, None, None, self.padded_width)
        return pl.BlockSpec(shape, lambda h, i: (0, h, which, 0))

    @property
    def parts(self) -> pl.BlockSpec:
        shape = (self.padded_keys, None, 2, self.padded_width)
        return pl.BlockSpec(shape, lambda h, i: (0, h, 0, 0))

    def bias(self, rows: int) -> pl.BlockSpec:
        one_row, one_head = self.bias_rows == 1, self.bias_heads == 1
        shape = (None, 1 if one_row else rows, self.padded_keys)
        return pl.BlockSpec(shape, lambda h, i: (0 if one_head else h, 0 if one_row else i, 0))

    @property
    def logits(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.padded_queries, self.padded_keys), lambda h, i: (h, 0, 0))

    def inside_rows(self, first: Array) -> Array:
        """[_ROWS, 1]: whether a row from `first` on is a query."""
        return (first + jnp.arange(_ROWS) < self.num_queries)[:, None]

    @property
    def inside_keys(self) -> Array:
        """[1, M]."""
        return (jnp.arange(self.padded_keys) < self.num_keys)[None]

    @property
    def inside_width(self) -> Array:
        """[1, d]."""
        return (jnp.arange(self.padded_width) < self.width)[None]


def _product(a: Array, b: Array, of_a: int, of_b: int, wide) -> Array:
    """`a` and `b` multiplied and added up over one axis of each."""
    axes = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=wide)


def _load(ref, mask):
    return triton.load(ref, mask=mask, other=0)


def _load_keys(blocks: _Blocks, *refs):
    mask = blocks.inside_keys.T & blocks.inside_width
    return (_load(ref, mask) for ref in refs)


def _load_bias(blocks: _Blocks, ref, first: Array):
    """The rows from `first` on of the block, or the only one."""
    if blocks.bias_rows == 1:
        return _load(ref, blocks.inside_keys)
    return _load(ref, blocks.inside_rows(first) & blocks.inside_keys)


def _weights(blocks: _Blocks, q, k, bias, divisor: float):
    """Softmax of a few rows; keys of padding have weight 0."""
    logits = _product(q, k, 1, 1, bias.dtype) / divisor + bias
    logits = jnp.where(blocks.inside_keys, logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, out_ref, *, blocks: _Blocks, divisor: float):
    first = pl.program_id(1) * _ROWS
    mask = blocks.inside_rows(first) & blocks.inside_width
    q, bias = _load(q_ref, mask), _load_bias(blocks, bias_ref, first)
    k, v = _load_keys(blocks, k_ref, v_ref)
    weights = _weights(blocks, q, k, bias, divisor)
    mixed = _product(weights.astype(v.dtype), v, 1, 0, bias.dtype)
    triton.store(out_ref, mixed.astype(out_ref.dtype), mask=mask)


def _backward_kernel(
    q_ref, k_ref, v_ref, bias_ref, g_ref, dq_ref, dkv_ref, *of_logits, blocks: _Blocks, divisor
):
    """All queries of a head, a few rows at a time; weights are computed again."""
    k, v = _load_keys(blocks, k_ref, v_ref)
    wide = bias_ref.dtype

    def add_rows(number, so_far):
        first = number * _ROWS
        rows = pl.ds(first, _ROWS)
        mask = blocks.inside_rows(first) & blocks.inside_width
        q, g = (_load(ref.at[rows], mask) for ref in (q_ref, g_ref))
        bias = _load_bias(blocks, bias_ref if blocks.bias_rows == 1 else bias_ref.at[rows], first)
        weights = _weights(blocks, q, k, bias, divisor)
        of_weights = _product(g, v, 1, 1, wide)
        mean = (weights * of_weights).sum(axis=1, keepdims=True)
        dlogits = weights * (of_weights - mean)
        for ref in of_logits:
            inside = blocks.inside_rows(first) & blocks.inside_keys
            triton.store(ref.at[rows], dlogits.astype(ref.dtype), mask=inside)
        small = (dlogits / divisor).astype(k.dtype)
        dq = _product(small, k, 1, 0, wide)
        triton.store(dq_ref.at[rows], dq.astype(dq_ref.dtype), mask=mask)
        dk, dv = so_far
        dk += _product(small, q, 0, 0, wide)
        dv += _product(weights.astype(g.dtype), g, 0, 0, wide)
        return dk, dv

    zeros = jnp.zeros((blocks.padded_keys, blocks.padded_width), wide)
    found = jax.lax.fori_loop(0, pl.cdiv(blocks.num_queries, _ROWS), add_rows, (zeros, zeros))
    mask = (blocks.inside_keys.T & blocks.inside_width)[:, None]
    for which, x in enumerate(found):
        ref = dkv_ref.at[:, pl.ds(which, 1)]
        triton.store(ref, x[:, None].astype(dkv_ref.dtype), mask=mask)
