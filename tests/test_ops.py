"""Operations and layers that the models share: each fast form equals its plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_graph

from demetar.models import fused_attention, ops
from demetar.models.layers import cosine_cutoff, messages_of

pytestmark = pytest.mark.usefixtures("float64")


def same_value_and_gradients(fast, plain, *arguments):
    """Under grad(vmap(...)), as a train step takes them."""
    rng = np.random.default_rng(9)
    shape = jax.eval_shape(fast, *(a[0] for a in arguments)).shape
    weigh = rng.normal(size=(len(arguments[0]), *shape))
    found, expected = (
        jax.jit(
            jax.value_and_grad(
                lambda *a: (jax.vmap(f)(*a) * weigh).sum(),  # noqa: B023
                argnums=tuple(range(len(arguments))),
            )
        )(*arguments)
        for f in (fast, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_attention_whose_gradient_is_written_out():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 3, n, 4)) for n in (5, 7, 7))
    bias = rng.normal(size=(2, 3, 5, 7))
    bias[..., 5:] = -1e30
    bias[:, :, 2] = -1e30  # a query that may attend to nothing
    same_value_and_gradients(ops.attend, ops.plain_attend, q, k, v, bias)


@pytest.mark.parametrize("bias_shape", [(3, 21, 37), (3, 1, 37), (1, 21, 37), (1, 1, 37)])
def test_attention_as_one_kernel(bias_shape):
    """In Pallas's interpreter: no GPU has run it. Sizes that no block divides."""
    rng = np.random.default_rng(0)
    q, kv = rng.normal(size=(2, 21, 3, 12)), rng.normal(size=(2, 37, 3, 2, 12))
    bias = rng.normal(size=(2, *bias_shape))
    bias[..., 30:] = -1e30
    bias[:, :, :1, :] = -1e30 if bias_shape[1] > 1 else bias[:, :, :1, :]
    fused = lambda *arguments: fused_attention._attend(*arguments, 3.0, True)
    plain = lambda *arguments: ops.plain_attend_heads(*arguments, 3.0)
    same_value_and_gradients(fused, plain, q, kv, bias)


def test_one_kernel_only_where_it_is_allowed_and_fits():
    def is_fused(tokens=8, dtype=np.float32, on=True):
        q, kv = np.ones((tokens, 2, 4), dtype), np.ones((tokens, 2, 2, 4), dtype)
        with ops.fused(on):
            attend = lambda *arguments: ops.attend_heads(*arguments, 2.0)  # traced anew each time
            traced = jax.make_jaxpr(attend)(q, kv, np.ones((1, 1, tokens), dtype))
        return "pallas_call" in str(traced)

    assert is_fused()
    assert not is_fused(on=False)
    assert not is_fused(dtype=np.float64)
    assert is_fused(tokens=512) and not is_fused(tokens=513)  # 16 floats a head at least


def test_matrix_product_over_all_rows_of_a_batch():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(3, 5, 4)), rng.normal(size=(4, 6))
    fast, plain = (
        jax.jit(
            jax.value_and_grad(
                lambda x, w: (jax.vmap(f, (0, None))(x, w) ** 2).sum(),  # noqa: B023
                argnums=(0, 1),
            )
        )(x, kernel)
        for f in (ops.matmul, ops.plain_matmul)
    )
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_rows_moved_by_ones_and_zeros():
    rng = np.random.default_rng(2)
    index, x = rng.integers(0, 6, (3, 4)), rng.normal(size=(3, 6, 5))
    one_hot = jax.nn.one_hot(index, 6, dtype=x.dtype)
    fast = lambda x: jax.vmap(ops.select_rows)(one_hot, x)
    plain = lambda x: jax.vmap(ops.plain_select_rows)(index, x)
    np.testing.assert_array_equal(fast(x), plain(x))
    gradients = [jax.grad(lambda x: (f(x) ** 2).sum())(x) for f in (fast, plain)]  # noqa: B023
    np.testing.assert_allclose(*gradients, rtol=1e-12)


def test_messages_are_sums_over_both_directions_of_each_edge():
    graph = random_graph(np.random.default_rng(3))
    messages = messages_of(graph)
    n = len(graph.node_mask)
    matrix = np.zeros((n, n))
    real = graph.edge_mask
    matrix[graph.receivers[real], graph.senders[real]] = 1
    matrix += matrix.T
    h = np.random.default_rng(4).normal(size=(n, 5))
    found = messages.sum_at_receiver(messages.of_sender(h), messages.mask_Mx1)
    np.testing.assert_allclose(found, matrix @ h, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(messages.count_Nx1[:, 0], matrix.sum(axis=1))


def test_a_pair_fades_smoothly_at_the_cutoff():
    """Value and slope are 0 from the cutoff on, and it starts at 1 with slope 0."""
    weight = lambda d: cosine_cutoff(d, 5.0)
    at = jnp.array([0.0, 2.5, 5.0, 5.5, 1e6])
    np.testing.assert_allclose(weight(at), [1, 0.5, 0, 0, 0], atol=1e-12)
    slope = jax.vmap(jax.grad(weight))(jnp.array([1e-9, 4.999999, 5.0, 6.0]))
    np.testing.assert_allclose(slope, 0, atol=1e-6)
