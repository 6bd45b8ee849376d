"""Operations written for a compiler, each beside its plain form.

A plain form is what anyone would write; the other computes the same (`tests/test_ops.py`) and is
there because XLA is slow on the plain one, mostly on a CPU. `benchmarks/changes.py` says what each
buys. Both hold on any backend, but for what `fused` allows.
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp

from demetar.models import fused_attention

Array = jax.Array


# --- matrix product of the rows of a batch -------------------------------------------------------


def plain_matmul(x_NxD: Array, kernel_DxF: Array) -> Array:
    """`x @ kernel`, `[N, F]`."""
    return x_NxD @ kernel_DxF


def _matmul(precision: jax.lax.Precision | None):
    """`plain_matmul`, whose batch is one product over all rows.

    vmap of a matrix product keeps [B, N, D], and the gradient of that runs at half the speed on a
    CPU. It asks for `grad(vmap(...))`: a custom rule of batching cannot be differentiated
    outside of one.
    """
    product = functools.partial(jnp.matmul, precision=precision)

    @jax.custom_batching.custom_vmap
    def matmul(x_NxD: Array, kernel_DxF: Array) -> Array:
        return product(x_NxD, kernel_DxF)

    @matmul.def_vmap
    def of_batch(axis_size, in_batched, x_BxNxD, kernel_DxF):
        x_batched, kernel_batched = in_batched
        if x_batched and not kernel_batched:
            flat = product(x_BxNxD.reshape(-1, x_BxNxD.shape[-1]), kernel_DxF)
            return flat.reshape(*x_BxNxD.shape[:-1], kernel_DxF.shape[-1]), True
        axes = tuple(0 if batched else None for batched in in_batched)
        return jax.vmap(product, axes, axis_size=axis_size)(x_BxNxD, kernel_DxF), True

    return matmul


matmul = _matmul(None)
# Accelerators make products of float32 in a shorter type, unless they are told.
_exact_matmul = _matmul(jax.lax.Precision.HIGHEST)


# --- moving rows ---------------------------------------------------------------------------------


def plain_select_rows(index_N: Array, x_MxD: Array) -> Array:
    """`x[index]`, `[N, D]`."""
    return x_MxD[index_N]


@jax.jit
def select_rows(selector_NxM: Array, x_MxD: Array) -> Array:
    """`plain_select_rows`, as a product with ones and zeros.

    For few rows to choose from: then it takes no longer, and its gradient is no scatter-add.
    """
    return _exact_matmul(selector_NxM, x_MxD)


@jax.jit
def select_columns(x_NxM: Array, selector_MxF: Array) -> Array:
    """Columns of `x`, or sums of a few, `[N, F]`: a product with ones and zeros."""
    return _exact_matmul(x_NxM, jnp.asarray(selector_MxF, x_NxM.dtype))


# The names that the traced functions carry: `speed.flops` counts no operations in them. What they
# stand for has none or, for sums of columns, one for each number that is read.
SELECTS = (select_rows.__name__, select_columns.__name__)


# --- attention -----------------------------------------------------------------------------------


def attend_heads(q_NxHxd: Array, kv_MxHx2xd: Array, bias: Array, divisor: float) -> Array:
    """softmax(Q Kᵀ / divisor + bias) V of each head, `[N, H, d]`; bias [1 or H, 1 or N, M].

    Inside `fused()` it is one kernel, where the sizes and types allow.
    """
    if _FUSED.get() and fused_attention.fits(q_NxHxd, kv_MxHx2xd, bias):
        return fused_attention.attend_heads(q_NxHxd, kv_MxHx2xd, bias, divisor)
    return plain_attend_heads(q_NxHxd, kv_MxHx2xd, bias, divisor)


def plain_attend_heads(q_NxHxd: Array, kv_MxHx2xd: Array, bias: Array, divisor: float) -> Array:
    """The same by `attend`, heads first."""
    heads = lambda x_NxHxd: x_NxHxd.swapaxes(0, 1)
    q_HxNxd = heads(q_NxHxd / divisor)
    k_HxMxd, v_HxMxd = (heads(kv_MxHx2xd[:, :, which]) for which in (0, 1))
    bias_HxNxM = jnp.broadcast_to(bias, (*q_HxNxd.shape[:2], bias.shape[-1]))
    return heads(attend(q_HxNxd, k_HxMxd, v_HxMxd, bias_HxNxM))


_FUSED = contextvars.ContextVar("fused", default=False)


@contextlib.contextmanager
def fused(on: bool):
    """What is traced inside may use kernels that are written for GPUs alone."""
    token = _FUSED.set(on)
    try:
        yield
    finally:
        _FUSED.reset(token)


def plain_attend(q_HxNxd: Array, k_HxMxd: Array, v_HxMxd: Array, bias_HxNxM: Array) -> Array:
    """softmax(Q Kᵀ + bias) V of each head, `[H, N, d]`; the softmax in the type of the bias."""
    return _attend_forward(q_HxNxd, k_HxMxd, v_HxMxd, bias_HxNxM)[0]


@jax.custom_vjp
def attend(q_HxNxd: Array, k_HxMxd: Array, v_HxMxd: Array, bias_HxNxM: Array) -> Array:
    """`plain_attend` with its gradient written out.

    The products that autodiff makes of it take transposed operands, for which XLA on a CPU has no
    fast product: 660 instead of 1140 us for 32 graphs of 20 tokens and 16 heads of 4, forward and
    backward, on one core.
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
