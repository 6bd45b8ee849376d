"""Which cores this process may use: a scheduler, a launcher or `taskset` may leave it a few."""

import os


def usable_cores() -> list[int]:
    """Their numbers, ascending; where the system does not say (macOS), those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
