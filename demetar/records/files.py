"""Files that are written whole or not at all, and read as data."""

import json
import os
import pathlib

from data_pipelines.json_text import json_text


def read_json(file: pathlib.Path):
    return json.loads(file.read_text())


def write_json(file: pathlib.Path, content) -> None:
    """Writes a JSON file whole or not at all."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(json_text(content, indent=1) + "\n")
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
