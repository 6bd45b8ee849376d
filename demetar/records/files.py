"""Files that are written whole or not at all, and read as data."""

import json
import math
import os
import pathlib
from collections.abc import Mapping


def read_json(file: pathlib.Path):
    return json.loads(file.read_text())


def finite(content):
    """What JSON can hold: null in the place of a number that is not finite, however deep."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def write_json(file: pathlib.Path, content) -> None:
    """Writes a JSON file whole or not at all."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(json.dumps(finite(content), indent=1) + "\n")
    os.replace(unfinished, file)


def read_jsonl(file: pathlib.Path) -> list[dict]:
    """The lines of a file of JSON lines; a line cut off by a kill is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
