"""The 72 faults of `demetar faults`, by number."""

from demetar.tools.faults import data, numerics, processes, storage, topology

CASES = {
    case.number: case
    for group in (processes, storage, topology, data, numerics)
    for case in group.CASES
}
