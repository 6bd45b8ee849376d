"""Is this machine ready for a run? Looks at everything that a run needs, before it starts.

    demetar doctor                                  the machine and the folder that you are in
    demetar doctor --config=qm9:quick [--workdir=DIR]    and the data, a compiled step, its cost

Devices and versions; what a scheduler has set; whether the workdir can be written, renames are
whole, locks hold, the disk has space; limits and the clock; the data against their hashes (which
prepares them where they are not yet); the step compiled, run, and its memory and time predicted.
Each line is `ok`, a `warning` that a run survives, or a `problem`; the last two say what to do.
Takes the options of `demetar train`, trains nothing, and leaves nothing in the workdir.

Exits 0, or 2 if there is a problem.
"""

import collections
import pathlib
import sys
from collections.abc import Iterator

import jax

from demetar.config import command_line
from demetar.exits import EXIT_DONE, EXIT_USER_ERROR, exits_cleanly
from demetar.job import place
from demetar.tools import machine_checks as checks
from demetar.tools import run_checks
from demetar.tools.machine_checks import Finding


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("doctor", __doc__)
    parser.add_argument("--workdir", metavar="DIR", help="of the run; else as train chooses it")
    place.add_options(parser)
    options, config = command_line.parse_with_config(parser, arguments, required=False)
    workdir = options.workdir or "."
    if config is not None and options.workdir is None:
        workdir = f"runs/{command_line.run_name(options.config)}"
    given = (options.coordinator_address, options.num_processes, options.process_id)
    levels = collections.Counter()
    for finding in _examine(pathlib.Path(workdir), given, config):
        print(finding, flush=True)
        levels[finding.level] += 1
    print(f"{levels['problem']} problem(s), {levels['warning']} warning(s).")
    return EXIT_USER_ERROR if levels["problem"] else EXIT_DONE


def _examine(workdir: pathlib.Path, given: tuple, config) -> Iterator[Finding]:
    """All findings, in the order in which a run would meet them."""
    yield checks.versions()
    processes, findings = checks.scheduler(given)
    yield from findings
    cache = list(checks.cache(config))
    yield from cache
    homeless = any(finding.level == "problem" for finding in cache)
    devices = list(checks.devices(None if homeless else config))
    yield from devices
    broken = any(finding.level == "problem" for finding in devices)
    yield from checks.limits(on_gpu=not broken and jax.default_backend() == "gpu")
    held = list(checks.holder(workdir))
    yield from held or checks.folder("workdir", workdir, "Choose another --workdir", checks.problem)
    yield checks.clock(workdir)
    if config is None:
        yield checks.ok("config", "none: --config=... looks at data, disk, memory and time too")
    elif not (homeless or broken):
        yield from run_checks.examine(config, workdir, processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
