"""Reads what JAX's profiler wrote: which operation of a compiled step took how long, for what."""

import collections
import gzip
import json
import pathlib
import re

PHASES = ("forward", "backward", "all-reduce", "optimizer")


def phase_of(op_name: str, instruction: str) -> str:
    """Which part of the step an operation belongs to, by the name that JAX gave it.

    Differentiation leaves `jvp(...)` in the name of what the forward pass computes, and
    `transpose(jvp(...))` in that of the backward pass.
    """
    if re.match(r"all-|psum|reduce-scatter|collective", instruction) or "psum" in op_name:
        return "all-reduce"
    if "transpose(" in op_name or "rematted" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "optimizer"


def self_times(events) -> collections.Counter:
    """Microseconds of each operation alone: without those that ran inside it on its thread."""
    total = collections.Counter()
    threads = collections.defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for own in threads.values():
        open_events = []
        for event in sorted(own, key=lambda e: (e["ts"], -e["dur"])):
            while open_events and event["ts"] >= open_events[-1]["ts"] + open_events[-1]["dur"]:
                open_events.pop()
            if open_events:  # a loop and its body
                total[open_events[-1]["args"]["hlo_op"]] -= event["dur"]
            total[event["args"]["hlo_op"]] += event["dur"]
            open_events.append(event)
    return total


def read_trace(folder: pathlib.Path) -> list[dict]:
    """The operations of the devices in the newest trace of a folder."""
    file = max(folder.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [e for e in events if e.get("ph") == "X" and "hlo_op" in e.get("args", {})]
