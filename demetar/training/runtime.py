"""Process-wide settings of JAX and of the allocator, made once, before any device is used."""

import ctypes
import os
import pathlib

import jax
import ml_collections
import numpy as np

from data_pipelines.cores import usable_cores
from data_pipelines.errors import UserError
from data_pipelines.prepared import default_cache_dir
from demetar.config.stored import real_dtype

# What XLA is told, by a run and by whoever compiles for a machine elsewhere; TPUs need nothing.
COMPILER_FLAGS = {
    # Scatter-adds and autotuned kernels may otherwise differ from run to run.
    "xla_gpu_deterministic_ops": "true",
    # Without autotuning, Triton finds no tiles for some products (jax 0.10.2, float32, and
    # those divided over `model`): cuBLAS makes them all.
    "xla_gpu_enable_triton_gemm": "false",
    # The groups of `gradients.sum_gradients` stay apart, so that they run beside the backward pass.
    "xla_gpu_all_reduce_combine_threshold_bytes": str(2**20),
    # As many may be under way; with one, computing would wait before the next is started.
    "xla_gpu_experimental_parallel_collective_overlap_limit": "8",
}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def configure(config: ml_collections.ConfigDict) -> None:
    """Precision, virtual CPU devices, compilation cache, settings of the compiler."""
    jax.config.update("jax_enable_x64", real_dtype(config) == np.float64)
    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    _keep_programs(cache_dir(config))
    # Whatever the devices: the flags are read once, when JAX looks for them.
    said = os.environ.get("XLA_FLAGS", "")
    flags = [f"--{key}={value}" for key, value in COMPILER_FLAGS.items() if key not in said]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [said, *flags]))
    if _backend() == "cpu":
        keep_freed_memory()
        if jax.process_count() > 1:
            _let_gloo_yield()


def configure_for_prediction() -> None:
    """One virtual CPU device for each core, and the compilation cache."""
    jax.config.update("jax_num_cpu_devices", len(usable_cores()))
    _keep_programs(default_cache_dir())
    if _backend() == "cpu":
        keep_freed_memory()


def _backend() -> str:
    """The kind of the devices: `cpu`, `gpu` or `tpu`."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        # Which JAX raises without a word where a platform is asked for that has no device.
        reason = str(error).partition("\n")[0] or "there is no such device"
        raise UserError(
            f"JAX cannot use the devices of JAX_PLATFORMS={asked!r}: {reason}. Unset it to take "
            "what is there, or install demetar[gpu] or demetar[tpu] and look at the drivers."
        ) from error


def _keep_programs(folder: pathlib.Path) -> None:
    """Compiled programs are kept in this folder, unless the environment names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's is a second; a prediction has several programs of less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def cache_dir(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Folder of prepared data, compiled programs and what was measured of the machine."""
    return pathlib.Path(config.data.cache_dir or default_cache_dir())


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, instead of giving it back to the system every step.

    XLA allocates the temporaries of a step anew each time. Above 32 MB glibc maps and unmaps
    them, and the page faults (27,000 a step at batch 128) cost a third of the time.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**28)


def _let_gloo_yield() -> None:
    """Runs gloo's network thread only where the core has nothing else to do.

    While data of another process wait for this one to ask for them, that thread polls without
    pause, and takes the core from computing until the scheduler's next tick: 4 ms for each
    all-reduce, of any size, against 0.2 ms so. It is found by where it waits; the other
    threads that wait there, of JAX's coordinator, have names of their own.
    """
    if not hasattr(os, "SCHED_IDLE"):
        return  # not Linux
    threads = pathlib.Path("/proc/self/task")
    own_name = pathlib.Path("/proc/self/comm").read_text()
    for thread in threads.iterdir():
        try:
            waits_in = (thread / "wchan").read_text()
            if "epoll" in waits_in and (thread / "comm").read_text() == own_name:
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            continue  # it has ended, or may not be looked at: slower, not wrong
