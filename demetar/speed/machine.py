"""What this machine can do at best: its matrix-product peak and its memory bandwidth.

Measured on the devices of this process together, and kept in the cache folder: what a run reaches
is told as a share of it. No data sheet is asked; a GPU's or a TPU's number is measured in the same
way (never tried there).

A measurement can be too low, because other programs ran at that moment. It is then made again at
a later start, as it is after a run that was faster, and the best of all is kept. Until then a share
of it is told as "at most".
"""

import dataclasses
import datetime
import hashlib
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.cores import usable_cores
from data_pipelines.json_text import json_text
from demetar.records.files import read_json, write_json

_SIZES = {"cpu": (1024, 2048)}  # rows = columns of the products that are tried
_SIZES_ELSEWHERE = (4096, 8192)
_LENGTH = 2**24  # numbers on each device, 64 MB: no cache holds them
_SECONDS = 0.4  # for each measurement
_CALM = 0.05  # at most this share of the cores was taken by other programs
_PATIENCE = 600.0  # seconds until a machine that was busy is measured again


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peaks of all devices of this process together.

    Attributes:
      flops: operations/s of the fastest matrix product, in `dtype`.
      bytes_per_s: read and written by adding 1 to an array that no cache holds.
      dtype: of the product.
      description: of the devices, the processor and the software.
      source: how and when `flops` was found, for a person.
      settled: whether it was calm; False: `flops` may be too low, and is to be measured again.
    """

    flops: float
    bytes_per_s: float
    dtype: str
    description: str
    source: str
    settled: bool


class Peak:
    """The peak that a run is compared with: that of the devices of all its processes.

    Args:
      cache_dir: folder for `machine-<hash>.json`, see `measured_machine`.
      dtype: of the matrix products.
      processes: of the job, on machines like this one.
    """

    def __init__(self, cache_dir: str | pathlib.Path, dtype, processes: int = 1):
        self._file = _file(cache_dir, dtype)
        self._processes = processes
        self.machine = measured_machine(cache_dir, dtype)

    @property
    def flops(self) -> float:
        return self._processes * self.machine.flops

    def __str__(self) -> str:
        machine = self.machine
        return (
            f"{self.flops / 1e9:.0f} GFLOP/s, {machine.dtype} matrix products on "
            f"{machine.description}; {machine.source}"
        )

    def share(self, flops: float) -> float:
        """What part of the peak `flops`, operations/s, are; at most 1.

        A run that is faster shows that the peak is higher: it becomes the peak, also of later runs.
        """
        if flops > self.flops:
            source = f"reached by a run, {_now()}; {self.flops / 1e9:.0f} were measured before"
            each = flops / self._processes
            self.machine = dataclasses.replace(
                self.machine, flops=each, source=source, settled=False
            )
            _keep(self._file, self.machine)
        return min(1.0, flops / self.flops)

    def text(self, share: float) -> str:
        """`34.4% of float32 peak`; little is not said as 0."""
        digits = 1 if share >= 1e-3 else 5
        bound = "" if self.machine.settled else "at most "
        return f"{bound}{share:.{digits}%} of {self.machine.dtype} peak"


def measured_machine(cache_dir: str | pathlib.Path, dtype) -> Machine:
    """The peaks of this machine, from `cache_dir` where a calm measurement is kept there.

    Args:
      cache_dir: folder for `machine-<hash>.json`, a file for each kind of machine and type.
      dtype: of the matrix products.
    """
    file = _file(cache_dir, dtype)
    try:
        known, age = Machine(**read_json(file)), time.time() - file.stat().st_mtime
    except (OSError, ValueError, TypeError):  # none; cut off; of another version
        known, age = None, 0.0
    if known is not None and (known.settled or age < _PATIENCE):
        return known
    found = _measure(dtype)
    if known is not None:
        found = dataclasses.replace(
            found,
            flops=max(found.flops, known.flops),
            bytes_per_s=max(found.bytes_per_s, known.bytes_per_s),
            source=max(found, known, key=lambda machine: machine.flops).source,
        )
    _keep(file, found)
    return found


def processor() -> str:
    """The CPU's name, where Linux says it; several kinds may share one cache folder."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        pairs = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
        fields = dict(reversed(pairs))  # of the first core
        return "{model name}, family {cpu family}, model {model}".format_map(fields)
    except (OSError, KeyError):
        return platform.machine()


def _description() -> str:
    return (
        f"{jax.local_device_count()} x {jax.devices()[0].device_kind}, {processor()}, "
        f"{len(usable_cores())} cores, jaxlib {jax.lib.__version__}"
    )


def _file(cache_dir: str | pathlib.Path, dtype) -> pathlib.Path:
    """Its name is made from all that the numbers depend on."""
    facts = json_text([_description(), jnp.dtype(dtype).name])
    return (
        pathlib.Path(cache_dir) / f"machine-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.json"
    )


def _keep(file: pathlib.Path, machine: Machine) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dataclasses.asdict(machine))
    except OSError:
        pass  # a folder that cannot be written: measured again next time


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"


# --- measuring -----------------------------------------------------------------------------------


def _measure(dtype) -> Machine:
    mesh = Mesh(np.array(jax.local_devices()), ("device",))
    split, everywhere = NamedSharding(mesh, P("device")), NamedSharding(mesh, P())
    place = lambda sharding, shape, dtype: jax.jit(
        lambda: jnp.ones(shape, dtype), out_shardings=sharding
    )()
    on_each = lambda function, specs: jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("device"), check_vma=False)
    )
    devices, kind = mesh.size, jax.devices()[0].platform
    load = _Load()
    flops = []
    for size in _SIZES.get(kind, _SIZES_ELSEWHERE):
        rows = -(-size // devices) * devices
        left, right = place(split, (rows, size), dtype), place(everywhere, (size, size), dtype)
        product = on_each(lambda a, b: a @ b, (P("device"), P()))
        flops.append(2 * rows * size**2 / _fastest(load, product, left, right))
    length = devices * _LENGTH
    array = place(split, (length,), jnp.float32)
    seconds = _fastest(load, on_each(lambda x: x + 1, P("device")), array)
    others = load.share_of_others
    return Machine(
        flops=max(flops),
        bytes_per_s=8 * length / seconds,
        dtype=jnp.dtype(dtype).name,
        description=_description(),
        source=f"measured {_now()}, other programs took {others:.0%} of the cores",
        settled=others <= _CALM,
    )


def _fastest(load: "_Load", function, *args) -> float:
    """Seconds of the fastest call, over about `_SECONDS`, after one that compiles."""
    jax.block_until_ready(function(*args))
    times, start = [], time.perf_counter()
    with load:
        while time.perf_counter() - start < _SECONDS or len(times) < 3:
            begin = time.perf_counter()
            jax.block_until_ready(function(*args))
            times.append(time.perf_counter() - begin)
    return min(times)


class _Load:
    """How busy other programs keep the cores of this process, while the context is entered.

    Where the system is not Linux nobody is known to be there.
    """

    def __init__(self):
        self._others = self._all = 0.0

    def __enter__(self):
        self._before = self._clocks()

    def __exit__(self, *error):
        seconds, busy, own = (b - a for a, b in zip(self._before, self._clocks(), strict=True))
        self._others += max(0.0, busy - own)
        self._all += seconds * len(usable_cores())

    @property
    def share_of_others(self) -> float:
        return self._others / self._all

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        """Seconds: of the wall clock; of work on our cores, by anybody; by this process."""
        return time.perf_counter(), _busy_seconds(), time.process_time()


def _busy_seconds() -> float:
    """Seconds that the cores of this process have worked since the start, for anybody."""
    try:
        lines = pathlib.Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0.0
    ours = {f"cpu{core}" for core in usable_cores()}
    ticks = 0
    for name, *times in map(str.split, lines):
        if name in ours:
            user, nice, system, _idle, _wait, *interrupts_and_stolen = map(int, times[:8])
            ticks += user + nice + system + sum(interrupts_and_stolen)
    return ticks / os.sysconf("SC_CLK_TCK")
