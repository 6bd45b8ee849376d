"""Gradients: of one device's graphs, and added up over the devices.

What all devices hold whole is joined, so that one collective does for many leaves. It can be joined
in a few groups, in the order in which the backward pass ends: the collective of what is ready
then runs while the rest is computed. The norm is that of the joined arrays, for the same reason:
on a GPU each leaf would be a kernel or two.
"""

from collections.abc import Callable

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.graph import Graph
from demetar.models import predict
from demetar.models.base import GraphModel
from demetar.training.objective import Objective, TargetErrors
from demetar.training.sharding import BATCH_AXES, sum_over

_GROUPS_OF_ACCELERATORS = 8


def make_gradient(model: GraphModel, objective: Objective, accumulation: int) -> Callable:
    """`(params, batch, keys_B) -> (gradient of the summed loss, sums, loss of each graph [B])`.

    Over `accumulation` micro-batches, one after the other.
    """
    has_dropout = getattr(model, "dropout", 0.0) > 0

    def gradient(params, batch: Graph, keys_B):
        def summed_loss(params):
            predictions = predict(model, params, batch, keys_B if has_dropout else None)
            loss_B = jnp.where(batch.graph_mask, objective.loss_B(predictions, batch), 0.0)
            errors = TargetErrors.from_model_output(*objective.errors_BxT(predictions, batch))
            return loss_B.sum(), (loss_B, errors)

        (total, (loss_B, errors)), grad = jax.value_and_grad(summed_loss, has_aux=True)(params)
        graphs = batch.graph_mask.sum(dtype=loss_B.dtype)
        return grad, (total, graphs, errors), loss_B

    def accumulated(params, batch: Graph, keys_B):
        split = lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        micro_batches = jax.tree.map(split, (batch, keys_B))

        def body(so_far, micro_batch):
            grad, sums, loss_B = gradient(params, *micro_batch)
            return jax.tree.map(jnp.add, so_far, (grad, sums)), loss_B

        one = jax.tree.map(lambda x: x[0], micro_batches)
        grad, sums, _ = jax.eval_shape(gradient, params, *one)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grad, sums))
        (grad, sums), loss_AxB = jax.lax.scan(body, zeros, micro_batches)
        return grad, sums, loss_AxB.swapaxes(0, 1).reshape(-1)

    return gradient if accumulation == 1 else accumulated


def default_groups(mesh: Mesh, accumulation: int) -> int:
    """In how many groups gradients are added up, if the config does not say.

    On accelerators a collective runs beside the backward pass. Between CPUs it is the same cores
    that compute and send, and each collective costs a wait: one. So it is where gradients are
    accumulated, for then all of them are ready at once.
    """
    if mesh.devices.flat[0].platform == "cpu" or mesh.size == 1 or accumulation > 1:
        return 1
    return _GROUPS_OF_ACCELERATORS


def order_of_backward(gradient: Callable, *args) -> list[int]:
    """When each leaf of the gradient is ready, as its place in the traced function.

    Args:
      gradient: its first result is the gradient.
      args: of it; shapes will do.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(gradient(*args)[0]))(*shapes).jaxpr
    made = {id(var): k for k, equation in enumerate(jaxpr.eqns) for var in equation.outvars}
    return [made.get(id(var), -1) for var in jaxpr.outvars]


def sum_gradients(gradients, sums, specs, ready: list[int] | None, num_groups: int):
    """Inside `shard_map`: all added up over the batch axes, gradients in the parts of `specs`.

    One all-reduce of one array for each group: one for each leaf, even as a single combined
    operation, takes 2 ms a leaf between two processes on a CPU. What is divided over `fsdp` is
    reduced and scattered before, leaf by leaf; its copies are joined by themselves.

    Args:
      gradients: of this device's graphs.
      sums: other numbers to add up; they go with the group that is ready last.
      specs: how each leaf of the gradients lies.
      ready: of `order_of_backward`; None: in any order.
      num_groups: each smaller than the one before, for behind the last nothing is hidden.

    Returns:
      gradients, sums, and the sum of squares of the leaves that are whole on every device.
    """
    leaves, treedef = jax.tree.flatten(gradients)
    specs = treedef.flatten_up_to(specs)
    groups = _groups_of([x.size for x in leaves], ready or [0] * len(leaves), num_groups)
    square = 0.0
    for number, group in enumerate(groups):
        for k in group:
            if "fsdp" in specs[k]:
                axis = specs[k].index("fsdp")
                leaves[k] = jax.lax.psum_scatter(
                    leaves[k], "fsdp", scatter_dimension=axis, tiled=True
                )
            if "model" in specs[k]:
                # The compiler's own division must not be undone by joining arrays.
                leaves[k] = sum_over(leaves[k], ("data",) if "fsdp" in specs[k] else BATCH_AXES)
        rest = [k for k in group if "model" not in specs[k]]
        scattered = [k for k in rest if "fsdp" in specs[k]]
        joined, split = jax.flatten_util.ravel_pytree([leaves[k] for k in scattered])
        for k, x in zip(scattered, split(sum_over(joined, ("data",))), strict=True):
            leaves[k] = x
        whole = [k for k in rest if "fsdp" not in specs[k]]
        more = sums if number == len(groups) - 1 else ()
        joined, split = jax.flatten_util.ravel_pytree(([leaves[k] for k in whole], more))
        # Without a collective the barrier keeps it one array, for the norm.
        joined = jax.lax.optimization_barrier(sum_over(joined, BATCH_AXES))
        square += jnp.square(joined[: sum(leaves[k].size for k in whole)]).sum()
        found, more = split(joined)
        for k, x in zip(whole, found, strict=True):
            leaves[k] = x
    return treedef.unflatten(leaves), more, square


def global_norm(gradients, specs, square_of_whole):
    """Of a gradient as `sum_gradients` gives it, outside of `shard_map`."""
    leaves, treedef = jax.tree.flatten(gradients)
    squares = [
        jnp.square(x).sum()
        for x, spec in zip(leaves, treedef.flatten_up_to(specs), strict=True)
        if "fsdp" in spec or "model" in spec
    ]
    return jnp.sqrt(sum(squares, square_of_whole))


def _groups_of(sizes: list[int], ready: list[int], num_groups: int) -> list[list[int]]:
    """Numbers of the leaves of each group, first what is ready first; none is empty.

    Sizes fall about linearly.
    """
    order = np.argsort(ready, kind="stable")
    sizes_in_order = np.asarray(sizes, float)[order]
    # The middle of a leaf says where in the whole it lies.
    middles = (np.cumsum(sizes_in_order) - sizes_in_order / 2) / sizes_in_order.sum()
    parts = np.floor(num_groups * (1 - np.sqrt(1 - middles)))
    return [order[parts == part].tolist() for part in np.unique(parts)]
