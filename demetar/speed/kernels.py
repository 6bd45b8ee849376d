"""A program compiled for a GPU, read: what it launches, and what could differ between two runs."""

import collections
import re

# Of the compiled text: `%name = shape operation(...)`.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|select|scatter|comparator)=%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# What the host or another instruction does, or nobody.
_NO_LAUNCH = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "opt-barrier all-reduce-done all-gather-done reduce-scatter-done copy-done async-done "
    "async-update partition-id replica-id".split()
)
# Libraries whose results, with `xla_gpu_deterministic_ops`, are the same each time.
_DETERMINISTIC_CALLS = ("__cublas$gemm", "__cublas$lt$matmul", "__cub$DeviceRadixSort")


def launches(text: str) -> collections.Counter:
    """How many instructions of each kind the host starts, those of a loop's body once."""
    computations = _computations(text)
    parts = {
        name
        for lines in computations.values()
        for line in lines
        if _operation(line) != "call"  # whose computation the host goes through
        for name in _CALLED.findall(line)
    }
    return collections.Counter(
        operation
        for name, lines in computations.items()
        if name not in parts  # else inside one kernel
        for line in lines
        if (operation := _operation(line)) not in _NO_LAUNCH
    )


def may_differ(text: str) -> list[str]:
    """Instructions whose result could depend on which thread comes first; none is expected.

    A scatter that adds to one place twice does, and so does what selects and scatters; the largest
    or least of some numbers is the same in any order. A call of a library is trusted if its name is
    known here. Autotuning leaves no trace: the flags of a run forbid it.
    """
    computations, found = _computations(text), []
    for line in (line for lines in computations.values() for line in lines):
        operation = _operation(line)
        if operation == "custom-call":
            fine = _TARGET.search(line)[1] in _DETERMINISTIC_CALLS
        elif operation == "scatter":
            applied = computations[re.search(r"to_apply=%?([\w.\-]+)", line)[1]][-1]
            fine = "unique_indices=true" in line or _operation(applied) in ("maximum", "minimum")
        else:
            fine = operation not in ("select-and-scatter", "rng")
        if not fine:
            found.append(line.strip()[:200])
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """Name of each computation -> its instructions, the root last."""
    found, inside = {}, []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            inside = found[start[1]] = []
        elif _INSTRUCTION.match(line):
            inside.append(line)
    return found


def _operation(line: str) -> str:
    return _INSTRUCTION.match(line)[1]
