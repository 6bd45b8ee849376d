"""What this machine can do at best: its matrix-product peak and its memory bandwidth.

Measured once, on the devices of this process together, and kept in the cache folder: what a run
reaches is then told as a share of it. No data sheet is asked; a GPU's or a TPU's number is
measured in the same way (never tried there).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_SIZES = {"cpu": (1024, 2048)}  # rows = columns of the products that are tried
_SIZES_ELSEWHERE = (4096, 8192)
_SECONDS = 0.4  # for each measurement


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peaks of all devices of this process together.

    Attributes:
      flops: operations/s of the fastest matrix product, in `dtype`.
      bytes_per_s: read and written by adding 1 to an array that no cache holds.
      dtype: of the product.
      description: what was measured, and with what.
    """

    flops: float
    bytes_per_s: float
    dtype: str
    description: str


def measured_machine(cache_dir: str | pathlib.Path, dtype) -> Machine:
    """The peaks of this machine, from `cache_dir` where they were measured before.

    Args:
      cache_dir: folder for `machine-<hash>.json`.
      dtype: of the matrix products.
    """
    description = (
        f"{jax.local_device_count()} x {jax.devices()[0].device_kind}, {processor()}, "
        f"{_cores()} cores, jaxlib {jax.lib.__version__}"
    )
    name = hashlib.sha256(f"{description} {jnp.dtype(dtype).name}".encode()).hexdigest()[:12]
    file = pathlib.Path(cache_dir) / f"machine-{name}.json"
    try:
        return Machine(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        machine = _measure(dtype, description)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataclasses.asdict(machine)) + "\n")
    except OSError:
        pass  # a folder that cannot be written: measured again next time
    return machine


def _cores() -> int:
    """How many this process may use: a launcher may have given each process its own."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """The CPU's name, where Linux says it; several kinds may share one cache folder."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        pairs = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
        fields = dict(reversed(pairs))  # of the first core
        return "{model name}, family {cpu family}, model {model}".format_map(fields)
    except (OSError, KeyError):
        return platform.machine()


def _measure(dtype, description: str) -> Machine:
    mesh = Mesh(np.array(jax.local_devices()), ("device",))
    split, everywhere = NamedSharding(mesh, P("device")), NamedSharding(mesh, P())
    place = lambda sharding, shape, dtype: jax.jit(
        lambda: jnp.ones(shape, dtype), out_shardings=sharding
    )()
    on_each = lambda function, specs: jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("device"), check_vma=False)
    )
    devices, kind = mesh.size, jax.devices()[0].platform
    flops = []
    for size in _SIZES.get(kind, _SIZES_ELSEWHERE):
        rows = -(-size // devices) * devices
        left, right = place(split, (rows, size), dtype), place(everywhere, (size, size), dtype)
        product = on_each(lambda a, b: a @ b, (P("device"), P()))
        flops.append(2 * rows * size**2 / _median(product, left, right))
    length = devices * 2**24  # 64 MB a device
    array = place(split, (length,), jnp.float32)
    seconds = _median(on_each(lambda x: x + 1, P("device")), array)
    return Machine(max(flops), 8 * length / seconds, jnp.dtype(dtype).name, description)


def _median(function, *args) -> float:
    """Median seconds of a call, over about `_SECONDS`, after one that compiles."""
    jax.block_until_ready(function(*args))
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < _SECONDS or len(times) < 3:
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))
