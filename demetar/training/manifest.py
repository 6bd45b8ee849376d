"""`manifest.json` of a checkpoint: size and SHA-256 of each of its files."""

import hashlib
import json
import os
import pathlib

from data_pipelines.json_text import json_text

MANIFEST = "manifest.json"


def _files(folder: pathlib.Path) -> dict[str, dict]:
    facts = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and MANIFEST not in file.name:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            facts[str(file.relative_to(folder))] = {
                "bytes": file.stat().st_size,
                "sha256": digest,
            }
    return facts


def write_manifest(folder: pathlib.Path) -> None:
    """Says that `folder` is whole: the last thing that is written of a checkpoint."""
    files = _files(folder)  # before the manifest's own file exists
    unfinished = folder / f".{MANIFEST}.tmp"
    with unfinished.open("w") as stream:
        stream.write(json_text({"files": files}, indent=1))
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(folder / MANIFEST)


def what_is_wrong(folder: pathlib.Path) -> str | None:
    """Why a checkpoint is not whole, for a person; None if it is as its manifest says."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())["files"]
        told = {name: (facts["bytes"], facts["sha256"][:12]) for name, facts in expected.items()}
    except FileNotFoundError:
        return "it has no manifest: the save was cut off"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        return f"its manifest cannot be read: {error!r}"
    for file in folder.rglob("*"):
        if file.is_symlink():  # what it points to may change after it was looked at
            return f"{file.relative_to(folder)} is a link"
    found = _files(folder)
    for name, facts in expected.items():
        if name not in found:
            return f"missing file {name}"
        if found[name] != facts:
            return (
                f"{name} has {found[name]['bytes']} bytes with SHA-256 "
                f"{found[name]['sha256'][:12]}…, its manifest says {told[name][0]} bytes with "
                f"{told[name][1]}…"
            )
    return None
