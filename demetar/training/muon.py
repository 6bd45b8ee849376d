"""Muon: momentum whose matrices are made orthogonal, with the work divided over the devices.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. A matrix is made orthogonal by a few
steps of Newton-Schulz, products of small matrices. One by one and repeated on every device they
take a quarter of a step of `qm9:quick` on a CPU. Here matrices of one shape are stacked, each
device computes its part of every stack, and one collective gives all of them to all.
"""

import math
from collections import defaultdict

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

# Scaled first (Boissin et al. 2025, https://arxiv.org/abs/2512.04632), which saves one step of the
# usual five. Without momentum: all that is left is Newton-Schulz.
_NEWTON_SCHULZ = optax.contrib.scale_by_muon(
    ns_steps=4,
    preconditioning="aol",
    beta=0.0,
    nesterov=False,
    weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
)


def scale_by_muon(
    momentum: float, consistent_rms: float, mesh: Mesh | None
) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal; for parameters that are all matrices.

    Args:
      momentum: decay rate of the sum of gradients.
      consistent_rms: root mean square of an update, whatever its shape (Liu et al. 2025,
        https://arxiv.org/abs/2502.16982).
      mesh: the work is divided over its devices; None: it is not divided.
    """

    def update(momenta, params=None):
        matrices, treedef = jax.tree.flatten(momenta)
        scale = lambda x: consistent_rms * math.sqrt(max(x.shape)) * x
        return treedef.unflatten(map(scale, orthogonal(matrices, mesh)))

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(update))


def orthogonal(matrices: list[jax.Array], mesh: Mesh | None) -> list[jax.Array]:
    """Each matrix with its singular values near 1, but for those that were tiny.

    Four steps make a small one larger by about 140 times. Rows are scaled first, so directions
    change a little.

    Args:
      matrices: of any shapes.
      mesh: see `scale_by_muon`; what comes out lies whole on every device.
    """
    # A matrix and its transpose are the same work: the shorter side first.
    is_tall = [x.shape[0] > x.shape[1] for x in matrices]
    of_shape = defaultdict(list)
    for k, (x, tall) in enumerate(zip(matrices, is_tall, strict=True)):
        of_shape[x.shape[::-1] if tall else x.shape].append(k)
    lying = lambda k, x: x.T if is_tall[k] else x
    stacks = [jnp.stack([lying(k, matrices[k]) for k in ks]) for ks in of_shape.values()]
    done = [None] * len(matrices)
    for ks, stack in zip(of_shape.values(), _divided(stacks, mesh), strict=True):
        for k, x in zip(ks, stack, strict=False):  # a stack may end in padding
            done[k] = lying(k, x)
    return done


def _divided(stacks: list[jax.Array], mesh: Mesh | None) -> list[jax.Array]:
    """`_of_stack` of each, every device doing its part; stacks may become longer, by zeros."""
    if mesh is None or mesh.size == 1:
        return list(map(_of_stack, stacks))
    axes = tuple(axis for axis, size in mesh.shape.items() if size > 1)

    def part(stacks):
        """On one device: all stacks, whole, of its own share and of the others'."""
        done = []
        for stack in stacks:
            share = -(-len(stack) // mesh.size)
            padding = share * mesh.size - len(stack)
            padded = jnp.pad(stack, ((0, padding), (0, 0), (0, 0)))
            start = jax.lax.axis_index(axes) * share
            done.append(_of_stack(jax.lax.dynamic_slice_in_dim(padded, start, share)))
        # One array, one collective: see `gradients.sum_gradients`.
        joined, split = jax.flatten_util.ravel_pytree(done)
        of_devices = jax.vmap(split)(jax.lax.all_gather(joined, axes))
        return [x.reshape(-1, *x.shape[2:]) for x in of_devices]

    return jax.shard_map(part, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(stacks)


def _of_stack(stack_LxMxN: jax.Array) -> jax.Array:
    return _NEWTON_SCHULZ.update(stack_LxMxN, _NEWTON_SCHULZ.init(stack_LxMxN))[0]
