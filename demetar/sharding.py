"""The mesh, and how arrays lie on it: state replicated, batches split over `data`."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from demetar.errors import UserError


def make_mesh(num_data: int) -> Mesh:
    """A mesh with the one axis `data` over `num_data` devices; -1 takes all."""
    devices = jax.devices()
    if num_data == -1:
        num_data = len(devices)
    if not 1 <= num_data <= len(devices):
        raise UserError(
            f"config.mesh.data is {num_data}, but {len(devices)} devices are present. Set it to "
            f"-1 (all) or to at most {len(devices)}; on a CPU, config.mesh.cpu_devices makes more."
        )
    return jax.make_mesh((num_data,), ("data",), (AxisType.Auto,), devices=devices[:num_data])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Splits a leading batch axis over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(name: str, batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """A batch must give every device the same number of graphs in every micro-batch."""
    parts = mesh.shape["data"] * accumulation
    if batch_size < 1 or batch_size % parts:
        below = max(parts, batch_size // parts * parts)
        raise UserError(
            f"{name} ({batch_size}) must be a positive multiple of {parts} = {mesh.shape['data']} "
            f"devices x {accumulation} accumulation steps; the nearest are {below} and "
            f"{math.ceil((batch_size + 1) / parts) * parts}."
        )


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process's devices hold."""
    indices = over_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in indices]
    return slice(min(b[0] for b in bounds), max(b[1] for b in bounds))


def to_devices(tree, mesh: Mesh, batch_size: int):
    """Host arrays of this process's rows -> global arrays split over `data`."""
    sharding = over_batch(mesh)

    def place(x: np.ndarray):
        return jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))

    return jax.tree.map(place, tree)
