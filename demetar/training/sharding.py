"""The mesh, and how arrays lie on it: three axes and the rules of the model.

    data    each part computes other graphs; the state is repeated
    fsdp    each part computes other graphs, and holds a part of parameters, optimizer state and
            average; parameters are gathered for a step, gradients scattered after it
    model   all parts compute the same graphs; attention heads and the MLPs are divided

Batches are split over `data` and `fsdp` together. Only the model's rules (`SHARDING_RULES`: path of
a parameter, and of its moments and average -> how its dimensions are divided) decide what of the
state is divided; a leaf that no rule names is repeated.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.errors import UserError
from demetar.models.base import GraphModel

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices=None) -> Mesh:
    """The mesh `data` x `fsdp` x `model`; `data=-1` takes the devices that the others leave.

    Args:
      data: parts with a copy of the state each.
      fsdp: parts that share one state.
      model: parts of each layer.
      devices: of a machine that is only planned; None: those of this one.
    """
    planned = devices is not None
    devices = list(devices) if planned else jax.devices()
    sizes = (data, fsdp, model)
    remedy = (
        f"{len(devices)} devices are present; nearest meshes that fit: "
        f"{_nearest_meshes(sizes, len(devices))}. On a CPU, config.mesh.cpu_devices makes more."
    )
    if fsdp < 1 or model < 1 or (data < 1 and data != -1):
        raise UserError(f"config.mesh {_name(sizes)} has a size below 1. {remedy}")
    if data == -1:
        if len(devices) % (fsdp * model):
            raise UserError(
                f"config.mesh.fsdp x model ({fsdp} x {model} = {fsdp * model}) does not divide "
                f"the {len(devices)} devices. {remedy}"
            )
        data = len(devices) // (fsdp * model)
    wanted = data * fsdp * model
    # A part of the devices of one process is a choice; processes without devices are a mistake.
    if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        raise UserError(
            f"config.mesh {_name((data, fsdp, model))} takes {wanted} devices. {remedy}"
        )
    shape = (data, fsdp, model)
    if planned:
        return Mesh(np.array(devices[:wanted]).reshape(shape), AXES, (AxisType.Auto,) * 3)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=devices[:wanted])


def _name(sizes) -> str:
    return "data x fsdp x model = " + " x ".join(map(str, sizes))


def _nearest_meshes(sizes, num_devices: int) -> str:
    """The two meshes over all devices whose sizes differ least, by ratio, from `sizes`."""
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    shapes = [
        (num_devices // (f * m), f, m)
        for f, m in itertools.product(divisors, divisors)
        if num_devices % (f * m) == 0
    ]
    wanted = [max(1, size) for size in sizes]
    wanted[0] = wanted[0] if sizes[0] > 0 else max(1, num_devices // (wanted[1] * wanted[2]))
    distance = lambda shape: sum(abs(math.log(a / b)) for a, b in zip(shape, wanted, strict=True))
    return " or ".join("x".join(map(str, s)) for s in sorted(shapes, key=distance)[:2])


def check_model_axis(mesh: Mesh, model: GraphModel, abstract_params) -> None:
    """Refuses an axis `model` that does not divide the heads and hidden units, or nothing."""
    size = mesh.shape["model"]
    if size == 1:
        return
    model.check_model_axis(size)
    divided = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params):
        spec = _rule(model.SHARDING_RULES, _path(path))
        for dimension, axis in enumerate(spec):
            if axis == "model":
                divided += 1
                if leaf.shape[dimension] % size:
                    raise UserError(
                        f"config.mesh.model ({size}) must divide dimension {dimension} of "
                        f"{_path(path)} {leaf.shape}; set config.model.mlp_ratio or width so."
                    )
    if not divided:
        raise UserError(
            f"config.mesh.model is {size}, but this model has nothing to divide over it: set it "
            "to 1, and use data or fsdp."
        )


def _path(path) -> str:
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")


def _rule(rules, path: str) -> P:
    return next((spec for pattern, spec in rules if re.search(pattern, path)), P())


def state_specs(mesh: Mesh, rules, abstract_state):
    """A model's rules applied to a state (or to parameters alone): a `PartitionSpec` for each leaf.

    A dimension that `fsdp` does not divide stays whole; so does all of an axis of size 1.
    """

    def spec(path, leaf) -> P:
        axes = _rule(rules, _path(path))
        if len(axes) > leaf.ndim:
            return P()
        keep = [
            axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=False)
        ]
        return P(*keep)

    return jax.tree_util.tree_map_with_path(spec, abstract_state)


def named(mesh: Mesh, specs):
    """`PartitionSpec`s -> shardings on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Splits a leading batch axis over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def over_all(mesh: Mesh) -> NamedSharding:
    """Splits a leading axis over every device."""
    return NamedSharding(mesh, P(AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def sum_over(tree, axes):
    """`jax.lax.psum` over those of the axes that are longer than one.

    A sum over one would stay in the program and, beside a divided axis `model`, not compile.
    """
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    return jax.lax.psum(tree, axes) if axes else tree


def gather_rows(tree):
    """Inside `shard_map`: rows of this device -> rows of the whole batch."""
    axes = tuple(axis for axis in BATCH_AXES if jax.lax.axis_size(axis) > 1)
    if not axes:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), tree)


def gather_params(params, specs):
    """Inside `shard_map`: this device's part of the parameters -> whole over `fsdp`."""

    def whole(x, spec):
        if "fsdp" not in spec:
            return x
        return jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True)

    return jax.tree.map(whole, params, specs)


def check_graphs(graphs: int, items: str, mesh: Mesh) -> None:
    """Refuses a mesh in which some devices could never have a graph to train on."""
    if graphs < (parts := batch_parts(mesh)):
        raise UserError(
            f"config.mesh divides a batch over {parts} devices (data x fsdp), but the training "
            f"part has only {graphs} {items}: use at most so many, or give it more {items}."
        )


def check_batch_size(name: str, batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """A batch must give every part of the mesh the same number of graphs in every micro-batch."""
    devices = batch_parts(mesh)
    parts = devices * accumulation
    if batch_size < 1 or batch_size % parts:
        below = max(parts, batch_size // parts * parts)
        raise UserError(
            f"{name} ({batch_size}) must be a positive multiple of {parts} = {devices} "
            f"(data x fsdp) x {accumulation} accumulation steps; the nearest are {below} and "
            f"{below + parts}."
        )


@functools.lru_cache
def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending.

    Not index / count of the processes: with an axis `model` that spans processes several of
    them hold the same rows, and a mesh may order devices by their network.
    """
    indices = over_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_devices(tree, mesh: Mesh, batch_size: int):
    """Host arrays [rows, ...] of this process's rows -> global arrays split over the batch axes."""
    sharding = over_batch(mesh)
    rows = process_rows(mesh, batch_size)

    def place(x: np.ndarray):
        def local(index):
            wanted = np.arange(batch_size)[index[0]]
            start = np.searchsorted(rows, wanted[0])
            return x[start : start + len(wanted)]  # contiguous: one device's rows

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, local)

    return jax.tree.map(place, tree)


@functools.lru_cache(maxsize=4)
def stop_flags(mesh: Mesh, raised: bool) -> jax.Array:
    """One number for each device, 1 where its process raises its flag.

    A step adds them up, so that all processes learn in the same step that one was asked to
    stop, at no collective of its own. Over all three axes: processes that share the graphs of
    a batch, where `model` spans processes, may not be asked at the same moment.
    """
    value = np.full(mesh.size, raised, np.float32)
    return jax.make_array_from_callback((mesh.size,), over_all(mesh), lambda index: value[index])


def abstract_stop_flags(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape, type and sharding of `stop_flags`."""
    return jax.ShapeDtypeStruct((mesh.size,), np.float32, sharding=over_all(mesh))


def to_host(tree):
    """Global arrays -> NumPy, whole, on every process. All processes must call it together."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x):
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return np.asarray(_replicate(x.sharding.mesh)(x).addressable_data(0))

    return jax.tree.map(whole, tree)


@functools.lru_cache
def _replicate(mesh: Mesh):
    return jax.jit(jnp.copy, out_shardings=replicated(mesh))
