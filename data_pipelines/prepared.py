"""Data prepared once: a folder of arrays that is whole or absent, and its passport.

    <cache>/<data set>/<name>/arrays/*.npy + passport.json

A folder appears under its final name only when it is complete (built beside it, then
renamed), so a killed preparation leaves nothing that looks finished, and of two jobs that
start together one prepares while the other waits. Every start checks the arrays against the
sizes and SHA-256 in the passport: small files whole, of large ones a few blocks, each time others.
`demetar doctor` reads all.
"""

import contextlib
import contextvars
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.errors import UserError, machine_fault
from data_pipelines.json_text import json_text


def default_cache_dir() -> pathlib.Path:
    """`$XDG_CACHE_HOME/demetar`, or `~/.cache/demetar`."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError(
            f"User {os.getuid()} has no home folder for prepared data and compiled programs: set "
            "HOME or XDG_CACHE_HOME to a folder that can be written, or config.data.cache_dir."
        ) from error
    return pathlib.Path(base) / "demetar"


def prepare(
    folder: pathlib.Path, build: Callable[[pathlib.Path], None], space: str
) -> tuple[dict[str, np.ndarray], dict]:
    """The (memory-mapped) arrays and the passport in `folder`, building it first if absent.

    Args:
      folder: final place, named after everything that decides the content.
      build: writes into the folder it is given, last of all with `write`.
      space: what a person must have free, e.g. "500 MB"; for the message when that fails.
    """
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent / f"{folder.name}.lock") as locked:
                if not folder.exists():  # else another job has prepared it while we waited
                    _build(folder, build, locked)
        except UserError:
            raise
        except Exception as error:
            if not isinstance(error, OSError) and machine_fault(error) is None:
                raise
            raise UserError(
                f"Cannot prepare the data in {folder}: {error}. Set config.data.cache_dir to a "
                f"writable folder with {space} of space."
            ) from error
    return _open(folder)


def write(folder: pathlib.Path, arrays: dict[str, np.ndarray], passport: dict) -> None:
    """Writes arrays and passport into a folder that is being built."""
    (folder / "arrays").mkdir()
    files = {}
    for name, array in arrays.items():
        file = folder / "arrays" / f"{name}.npy"
        np.save(file, array, allow_pickle=False)
        files[name] = _file_facts(file)
    (folder / "passport.json").write_text(json_text(passport | {"files": files}, indent=1))


def write_parts(
    parts: pathlib.Path,
    make: Callable[[int], Iterator],
    size: int,
    pack: Callable[[int, list], dict[str, np.ndarray]],
    progress: Mapping[str, Any],
) -> list[pathlib.Path]:
    """Makes many items in parts of `size`; a killed preparation goes on after its last whole part.

    Args:
      parts: folder of its own, beside the final one, so that it outlives the building.
      make: number of items that are done -> the others, in order.
      size: items of a part; it must not change while `parts` is there.
      pack: position of a part's first item, its items -> the arrays to keep.
      progress: what tqdm says: `desc`, `unit`, `total`.

    Returns:
      The files of all parts, in order; the caller deletes the folder when it has joined them.
    """
    parts.mkdir(exist_ok=True)
    done = len(list(parts.glob("[0-9]*.npz")))  # written in order, each whole or absent
    # An iterator: a bar that is iterated anew each time is empty from the third time on.
    made = iter(tqdm(make(done * size), initial=done * size, mininterval=1.0, **progress))
    for number in itertools.count(done):
        if not (items := list(itertools.islice(made, size))):
            return sorted(parts.glob("[0-9]*.npz"))
        building = parts / f"building-{own_name()}.npz"
        np.savez(building, **pack(number * size, items))
        building.rename(parts / f"{number:06}.npz")


def _build(folder: pathlib.Path, build: Callable[[pathlib.Path], None], locked: bool) -> None:
    # Of a killed preparation; without the lock they may be those of a living one.
    for leftover in folder.parent.glob(f".{folder.name}.*") if locked else ():
        shutil.rmtree(leftover, ignore_errors=True)
    building = folder.parent / f".{folder.name}.{own_name()}"
    building.mkdir()
    try:
        build(building)
        building.rename(folder)
    except OSError:
        if not folder.exists():  # else another job, which no lock has kept out, was first
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def own_name() -> str:
    """Of a file or folder that no other process writes; in containers hosts and ids repeat."""
    return f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"


@contextlib.contextmanager
def _lock(file: pathlib.Path):
    """Held by one process of this host at a time; the kernel frees it when a holder dies.

    Gives whether it is held: some network filesystems have no locks. Then two jobs may prepare the
    same data at once, each in a folder of its own, and the first to end gives it the final name.
    """
    with file.open("w") as handle:
        locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process is preparing the data; waiting for it.", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            locked = False
            print(
                f"{file.parent} has no file locks ({error.strerror}): preparing without one.",
                file=sys.stderr,
            )
        yield locked


_BLOCK = 64 * 2**20  # bytes of a large file that have a hash of their own
_LARGE = 512 * 2**20
_SAMPLED = 4  # blocks of a large file that a start reads
_WHOLE = contextvars.ContextVar("whole", default=False)


@contextlib.contextmanager
def checked_whole():
    """Inside, large files are read and checked whole, too."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def _file_facts(file: pathlib.Path) -> dict:
    """Size and SHA-256 of a file, of a large one those of its blocks."""
    size = file.stat().st_size
    if size < _LARGE:
        return {"bytes": size, "sha256": _hash(file, 0, size)}
    starts = range(0, size, _BLOCK)
    return {"bytes": size, "sha256_of_blocks": [_hash(file, start, _BLOCK) for start in starts]}


def _hash(file: pathlib.Path, start: int, length: int) -> str:
    """SHA-256 of so many bytes of a file, or of what there is of them."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        while length and (part := stream.read(min(length, 2**20))):
            digest.update(part)
            length -= len(part)
    return digest.hexdigest()


def _check_file(file: pathlib.Path, expected: dict, remedy: str) -> None:
    """A `UserError` if size or a hash is another; of a large file a few blocks are read."""
    size = file.stat().st_size
    if "sha256" in expected:
        hashes = {(0, size): expected["sha256"]}
    else:
        blocks = list(enumerate(expected["sha256_of_blocks"]))
        if not _WHOLE.get():
            blocks = random.SystemRandom().sample(blocks, min(_SAMPLED, len(blocks)))
        hashes = {(k * _BLOCK, _BLOCK): digest for k, digest in blocks}
    for place, digest in hashes.items():
        found = _hash(file, *place)
        if size != expected["bytes"] or found != digest:
            raise UserError(
                f"{file} is damaged: {size} bytes with SHA-256 {found[:12]}…, but its passport "
                f"says {expected['bytes']} bytes with {digest[:12]}…. {remedy}"
            )


def _open(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    remedy = f"Delete {folder} to prepare it again."
    try:
        passport = json.loads((folder / "passport.json").read_text())
        arrays = {}
        for name, expected in passport.pop("files").items():
            file = folder / "arrays" / f"{name}.npy"
            _check_file(file, expected, remedy)
            # Views as plain arrays: indexing np.memmap itself costs more than the gather.
            arrays[name] = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"Prepared data in {folder} cannot be read: {error}. {remedy}") from error
    return arrays, passport
