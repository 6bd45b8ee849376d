"""Makes 72 faults for real and shows what comes of each: nothing may be lost.

    demetar faults [--only=ID[,ID...]] [--page]

trains a tiny model undisturbed, then makes each fault: signals, full disks, damaged files, other
topologies, bad data, bad numbers. Compares exit codes, times, files, the graphs of every step and
the final state. About half an hour on two cores; as root, because it mounts small disks, and with
strace, which makes system calls fail; what it cannot make, it says. `--page` writes
docs/results/faults.md of a checkout. Prints JSON. Exit code 0 if no row is lost, 1 if one is.
"""

import pathlib
import sys
import tempfile
import time

from data_pipelines.errors import check_known
from data_pipelines.json_text import json_text
from demetar.config import command_line
from demetar.exits import EXIT_DONE, EXIT_FAILED, exits_cleanly
from demetar.records.log import duration, say
from demetar.tools.faults import CASES, page
from demetar.tools.faults.bench import LOST, Bench
from demetar.tools.faults.scene import perform
from demetar.tools.resume_check import configure_like

_STILL = 3.0  # seconds; a process that others wait for is lost after five


def _numbers(text: str) -> list[int]:
    """`1,2` as numbers of cases; an unknown one is refused."""
    words = text.split(",")
    for word in words:
        check_known("fault of --only", word, [str(number) for number in CASES])
    return [int(word) for word in words]


def run(numbers: list[int], folder: pathlib.Path) -> list[dict]:
    """Makes these faults, one after the other; a line for each says what came of it."""
    bench, rows, began = Bench(folder), [], time.monotonic()
    configure_like(bench.undisturbed())
    for done, number in enumerate(numbers, 1):
        while True:
            row = perform(CASES[number], bench)
            silent = bench.clock.stood_still()
            if row["verdict"] != LOST or silent < _STILL:
                break
            say(f"All of this stood still for {silent:.0f} s during fault {number}: made again.")
        rows.append(row)
        left = (time.monotonic() - began) / done * (len(numbers) - done)
        say(
            f"{done}/{len(numbers)}  fault {number}, {row['fault']}: {row['verdict']} "
            f"({row['seconds']} s); {duration(left)} left"
        )
        for line in row["failed"]:
            say(f"  {line}")
    return rows


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("faults", __doc__)
    parser.add_argument("--only", metavar="ID[,ID...]", help="numbers of faults; else all")
    parser.add_argument("--page", action="store_true", help="write docs/results/faults.md")
    options = command_line.parse(parser, arguments)
    numbers = _numbers(options.only) if options.only else list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        found = page.facts(run(numbers, pathlib.Path(folder)), arguments)
    print(json_text(found, indent=1))
    if options.page:
        page.write(found)
    return EXIT_FAILED if any(row["verdict"] == LOST for row in found["rows"]) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
