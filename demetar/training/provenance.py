"""Which code, packages and machine made a result: each fact is true or absent."""

import contextlib
import os
import pathlib
import subprocess
from importlib import metadata

from demetar.job.agreement import code_sha256
from demetar.speed.machine import processor

_PACKAGES = ("demetar", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def provenance() -> dict:
    """Commit, hash of the sources, versions of packages and processor of this process, as JSON."""
    return {
        "git_commit": git_commit(),
        "code_sha256": code_sha256(),
        "packages": packages(),
        "processor": processor(),
    }


def git_commit(file: pathlib.Path = pathlib.Path(__file__)) -> str | None:
    """Of the checkout that `file` is part of, with `-dirty` if it was changed; None if of none.

    An installed package may lie inside of a repository that knows nothing of it.
    """
    # A hook of git names its own repository to all that it starts.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    options = {"capture_output": True, "text": True, "timeout": 10, "env": environment}
    git = ["git", "-C", str(file.parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", file.name], **options)
        done = subprocess.run([*git, "describe", "--always", "--dirty"], **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if tracked.returncode == 0 else None


def packages() -> dict[str, str]:
    """Name -> version of what a run depends on, as far as it is installed."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
