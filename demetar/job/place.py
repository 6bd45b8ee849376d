"""Where a process of a job stands: its number, how many there are, and how to find process 0."""

import argparse
import dataclasses
import glob
import importlib.util
import os
from collections.abc import Mapping

import jax

from data_pipelines.errors import UserError

_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FLAGS = ("--coordinator_address", "--num_processes", "--process_id")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
      source: what said so, for a person.
      process: its number; None where only JAX can tell (TPU).
      count: of all processes; None likewise.
      coordinator: `host:port`; None where JAX finds it.
      method: name of JAX's cluster detection, or `deactivate`.
    """

    source: str
    process: int | None = 0
    count: int | None = 1
    coordinator: str | None = None
    method: str | None = "deactivate"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options by which a person says where a process stands."""
    parser.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--num_processes", type=int, metavar="N", help="of the job")
    parser.add_argument("--process_id", type=int, metavar="N", help="of this one, from 0")


def find_place(coordinator, count, process, environ: Mapping[str, str] = os.environ) -> Place:
    """The flags, else the environment of that name, else what a cluster manager set, else alone."""
    for names, values in (
        (_FLAGS, (coordinator, count, process)),
        (_ENVIRONMENT, [environ.get(name) or None for name in _ENVIRONMENT]),
    ):
        given = [name for name, value in zip(names, values, strict=True) if value is not None]
        if len(given) == 3:
            return _explicit(names, *values)
        # JAX's own variable for the address alone is meant for detection: not an error.
        if given and given != ["JAX_COORDINATOR_ADDRESS"]:
            missing = [name for name in names if name not in given]
            raise UserError(
                f"{', '.join(given)} without {', '.join(missing)}: give all three, or none to "
                "detect the cluster."
            )
    if {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"} <= environ.keys():
        process, count = _numbers(environ, "SLURM_PROCID", "SLURM_NTASKS")
        return _managed(f"SLURM job {environ['SLURM_JOB_ID']}", process, count, "slurm")
    if {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"} <= environ.keys():
        process, count = _numbers(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
        return _managed("Open MPI", process, count, "ompi")
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "This is a pod of an Indexed Job, but the others cannot be looked up: install "
                f"jax[k8s], or set {', '.join(_ENVIRONMENT)} as launch/jobset.yaml does."
            )
        return Place("Kubernetes", None, None, method="k8s")
    hosts = environ.get("TPU_WORKER_HOSTNAMES") or environ.get("TPU_PROCESS_ADDRESSES") or ""
    on_tpu = importlib.util.find_spec("libtpu") and (
        glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    )
    if "," in hosts or (on_tpu and "TPU_SKIP_MDS_QUERY" not in environ):
        return Place("TPU", None, None, method=None)
    return Place("one process")


def numbered(here: Place) -> Place:
    """The same with number and count, also where only JAX can tell; for what needs no others."""
    if here.count is not None:
        return here
    if here.method == "k8s":
        raise UserError(
            "A pod of an Indexed Job is not told how many there are: set "
            f"{', '.join(_ENVIRONMENT)} as launch/jobset.yaml does."
        )
    return dataclasses.replace(here, process=jax.process_index(), count=jax.process_count())


def _numbers(texts: Mapping[str, object], process_name: str, count_name: str) -> tuple[int, int]:
    """(number of this process, of all), under these two names."""
    try:
        process, count = int(texts[process_name]), int(texts[count_name])
    except ValueError as error:
        raise UserError(
            f"{process_name} and {count_name} must be whole numbers: {error}."
        ) from error
    if not 0 <= process < count:
        raise UserError(
            f"{process_name} is {process}, but {count_name} is {count}: the processes are numbered "
            f"0 to {count - 1}."
        )
    return process, count


def _explicit(names, coordinator, count, process) -> Place:
    process, count = _numbers({names[2]: process, names[1]: count}, names[2], names[1])
    host, _, port = str(coordinator).rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"{names[0]} is {coordinator!r}; it must be host:port, as node1:29400.")
    source = "flags" if names is _FLAGS else "environment"
    return Place(source, process, count, coordinator if count > 1 else None)


def _managed(name: str, process: int, count: int, method: str) -> Place:
    return Place(name, process, count, method=method) if count > 1 else Place(f"{name}, one task")
