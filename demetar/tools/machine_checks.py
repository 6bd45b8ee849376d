"""What `demetar doctor` looks at before it knows of a run: versions, devices, place, folders."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import platform
import resource
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from data_pipelines.cores import usable_cores
from data_pipelines.errors import UserError
from data_pipelines.prepared import default_cache_dir
from demetar.job import place
from demetar.job.watch import at_work
from demetar.records.log import size_text
from demetar.training import runtime
from demetar.training.provenance import packages

_SCHEDULERS = ("SLURM_", "OMPI_COMM_WORLD_", "JAX_", "JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_")
_SCHEDULERS += ("TPU_", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "NCCL_")
_SHOWN = 12  # variables
_LOOKUP_SECONDS = 60
_RENAMES = 200
_OPEN_FILES = 1024  # of one process: a save and the data open tens, each process of a job a few
_SHARED = 32 << 20  # bytes of /dev/shm that are free: worker processes talk through it
_SHARED_GPU = 1 << 30  # and NCCL, between the GPUs of a machine
_SKEW = 5.0  # seconds


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
      level: `ok`; `warning`: a run works, but not as it should; `problem`: it does not work.
      subject: what was looked at.
      text: what was found.
      remedy: what to do about it; "" if nothing.
    """

    level: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8} {self.subject:10} {self.text}"
        return f"{line}\n{'':20}-> {self.remedy}" if self.remedy else line


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warning(subject: str, text: str, remedy: str) -> Finding:
    return Finding("warning", subject, text, remedy)


def problem(subject: str, text: str, remedy: str = "") -> Finding:
    return Finding("problem", subject, text, remedy)


def first_line(error: BaseException) -> str:
    """Of what an error says; some say nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# --- software, devices, scheduler ----------------------------------------------------------------


def versions() -> Finding:
    found = {"Python": platform.python_version()} | packages()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return ok("versions", f"{text}; {platform.platform()}")


def scheduler(given: tuple, environ: Mapping[str, str] = os.environ) -> tuple[int, list[Finding]]:
    """Where `demetar train` would stand with these options, and the variables that say so.

    Args:
      given: coordinator, number of processes, number of this one; None where no option says it.
      environ: of the process.

    Returns:
      How many processes the job has, 1 where that is not known; what was found.
    """
    seen = [f"{k}={v}" for k, v in sorted(environ.items()) if k.startswith(_SCHEDULERS)]
    more = [f"and {len(seen) - _SHOWN} more"] if len(seen) > _SHOWN else []
    as_seen = f"seen: {', '.join([*seen[:_SHOWN], *more]) or 'no variable of a scheduler'}"
    try:
        here = place.find_place(*given, environ)
    except UserError as error:
        remedy = "Set them right, or unset all of them."
        return 1, [problem("scheduler", f"{error} {as_seen}", remedy)]
    which = "" if here.count is None else f", process {here.process} of {here.count}"
    text = f"{here.source}{which}; {as_seen}"
    findings = [ok("scheduler", text)]
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_NODELIST" not in environ:
        remedy = "Inside of a SLURM job start it with srun, as launch/slurm.sh does."
        findings = [warning("scheduler", text, remedy)]
    if here.coordinator:
        host = here.coordinator.rpartition(":")[0]
        # A pod has a name some seconds after it starts.
        patience = _LOOKUP_SECONDS if "KUBERNETES_SERVICE_HOST" in environ else 0
        if (error := _cannot_find(host, patience)) is not None:
            text = f"the coordinator's host {host!r} cannot be looked up: {error}"
            remedy = "Give a name or an address that this machine knows."
            findings.append(problem("scheduler", text, remedy))
    return here.count or 1, findings


def _cannot_find(host: str, patience: float) -> OSError | None:
    """Why a host has no address, after so many seconds; None if it has one."""
    until = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(host, None)
            return None
        except OSError as error:
            if time.monotonic() > until:
                return error
        time.sleep(1)


def devices(config=None) -> Iterator[Finding]:
    """The devices that JAX finds; with a config, after its settings of JAX are made."""
    try:
        if config is not None:
            runtime.configure(config)
        found = jax.local_devices()
    except Exception as error:  # whatever a plugin raises: a run would end so too
        asked = os.environ.get("JAX_PLATFORMS")
        yield problem(
            "devices",
            f"JAX finds none: {first_line(error)}",
            f"JAX_PLATFORMS is {asked!r}: unset it, or install what it asks for."
            if asked
            else "Look at the driver; JAX_PLATFORMS=cpu trains on the CPU.",
        )
        return
    text = f"{len(found)} x {found[0].device_kind} ({found[0].platform})"
    if found[0].platform == "cpu" and pathlib.Path("/dev/nvidia0").exists():
        yield warning(
            "devices",
            f"{text}, but there is an NVIDIA GPU",
            'pip install -e ".[gpu]"; JAX_PLATFORMS must not be cpu.',
        )
    else:
        cores = len(usable_cores())
        yield ok("devices", f"{text}, {cores} cores, {size_text(host_memory())} of memory free")


def host_memory() -> int:
    """Bytes of memory that a process may still take: of the machine, or of its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) * 1024
    group = pathlib.Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


# --- limits, clock -------------------------------------------------------------------------------


def limits(on_gpu: bool, shared: pathlib.Path = pathlib.Path("/dev/shm")) -> Iterator[Finding]:
    """Open files, the size of a file, shared memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _OPEN_FILES:
        yield warning(
            "limits", f"{files} open files", f"ulimit -n {_OPEN_FILES}, before the command."
        )
    else:
        yield ok("limits", f"{files} open files")
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest != resource.RLIM_INFINITY:
        yield warning(
            "limits", f"a file may have {size_text(largest)}", "ulimit -f unlimited, if you may."
        )
    wanted = _SHARED_GPU if on_gpu else _SHARED
    try:
        free = shutil.disk_usage(shared).free
    except OSError:
        free = 0
    if free < wanted:
        yield warning(
            "limits",
            f"{size_text(free)} of shared memory ({shared}) free, {size_text(wanted)} wanted",
            "docker run --shm-size=1g; in a pod an emptyDir in Memory, as launch/jobset.yaml has.",
        )
    else:
        yield ok("limits", f"{size_text(free)} of shared memory free")


def clock(folder: pathlib.Path) -> Finding:
    """Against the time that the filesystem gives a new file, and that of our own code."""
    try:
        with tempfile.NamedTemporaryFile(dir=existing(folder), prefix=".demetar-doctor-") as file:
            skew = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError:
        skew = 0.0  # the check of the workdir tells
    code = pathlib.Path(__file__).stat().st_mtime - time.time()
    if abs(skew) > _SKEW or code > _SKEW:
        what = f"{skew:+.0f} s beside the filesystem's" if abs(skew) > _SKEW else ""
        what = what or f"it is {code:.0f} s before the files of demetar were written"
        return warning(
            "clock", what, "Set it (NTP): times in logs are wrong. No result hangs on it."
        )
    return ok("clock", f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, as the filesystem says")


# --- folders -------------------------------------------------------------------------------------


def existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder itself, or the nearest above it that exists."""
    folder = folder.absolute()
    while not os.path.exists(folder) and folder != folder.parent:  # also where we may not look
        folder = folder.parent
    return folder


def cache(config=None) -> Iterator[Finding]:
    """Whether the folder of prepared data and compiled programs can be used.

    One that cannot be written is enough where all is prepared; if not, the data say so.
    """
    other = "Set config.data.cache_dir or XDG_CACHE_HOME"
    try:
        path = default_cache_dir() if config is None else runtime.cache_dir(config)
    except (UserError, RuntimeError) as error:
        yield problem("cache", f"there is no folder for it: {error}", f"{other}.")
        return
    yield from folder("cache", path, other, warning)
    for file in sorted(path.glob("*/*.lock")):
        with contextlib.suppress(OSError), file.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield warning(
                    "cache",
                    f"another process prepares {file.with_suffix('')}",
                    f"Wait for it; fuser -v {file} says which it is.",
                )


def folder(
    subject: str, path: pathlib.Path, other: str, if_not: Callable[..., Finding]
) -> Iterator[Finding]:
    """Whether a folder can be written, renames in it are whole, and locks hold.

    Everything is tried in a folder of its own, which is deleted: in `path`, or where that is not
    there yet, in the nearest above it.

    Args:
      subject: of the findings.
      path: of the folder.
      other: how to choose another one.
      if_not: `warning` or `problem`, where it cannot be written.
    """
    path = path.absolute()
    place_for_it = existing(path)
    try:
        if not place_for_it.is_dir():
            raise NotADirectoryError(f"{place_for_it} is no folder")
        with tempfile.TemporaryDirectory(dir=place_for_it, prefix=".demetar-doctor-") as inside:
            inside = pathlib.Path(inside)
            (inside / "file").write_bytes(b"x" * 4096)
            with (inside / "file").open("rb") as file:
                os.fsync(file.fileno())
            yield ok(subject, f"{path} can be written")
            yield _renames(subject, inside, other)
            yield _locks(subject, inside, other)
    except OSError as error:
        yield if_not(
            subject, f"{path} cannot be written: {error}", f"{other}, or mend its permissions."
        )


def _renames(subject: str, inside: pathlib.Path, other: str) -> Finding:
    """One thread replaces a file again and again; what another reads must always be whole."""
    target, contents = inside / "target", (b"a" * 4096, b"b" * 4096)
    target.write_bytes(contents[0])
    torn: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                if target.read_bytes() not in contents:
                    torn.append("half a file was read")
            except OSError as error:
                torn.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(_RENAMES):
            new = inside / "new"
            new.write_bytes(contents[number % 2])
            new.replace(target)
        (inside / "a folder").mkdir()
        (inside / "a folder").rename(inside / "renamed")
    finally:
        done.set()
        reader.join()
    if torn:
        return problem(
            subject,
            f"a rename is not atomic here ({torn[0]}): a checkpoint or a result may be half",
            f"{other}: a filesystem such as ext4, xfs, NFS or Lustre.",
        )
    return ok(subject, f"renames are atomic ({_RENAMES} tried)")


def _locks(subject: str, inside: pathlib.Path, other: str) -> Finding:
    try:
        with (inside / "lock").open("w") as first, (inside / "lock").open("w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                reason = "two have the same lock"
            except BlockingIOError:
                return ok(subject, "locks hold")
    except OSError as error:
        reason = str(error)
    return warning(
        subject,
        f"no locks here ({reason}): two jobs that share this folder are not kept apart",
        f"Start only one job in it, or: {other}.",
    )


def holder(workdir: pathlib.Path) -> Iterator[Finding]:
    """Whether another job works in the workdir, or a lock outlives its process."""
    facts = at_work(workdir)
    if not facts:
        return
    pid, host = facts.get("pid"), facts.get("host")
    who = f"process {pid} on host {host} holds {workdir}"
    gone = host == socket.gethostname() and not pathlib.Path(f"/proc/{pid}").exists()
    if gone or "ended" in facts:
        yield problem(
            "workdir",
            f"a stale lock: {who}, but has ended; something that it started still has its file",
            f"fuser -v {workdir}/processes/*.json says what that is: end it.",
        )
    else:
        yield problem("workdir", who, "Wait for it, stop it, or choose another --workdir.")
