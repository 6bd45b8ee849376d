"""Several processes on this one machine: one for each GPU, or any number on its CPU.

    demetar local --gpus=8 --config=qm9 [...]
    demetar local --cpu=2 --config=qm9:quick [...]

Everything else goes to `demetar train`. Prefixes each line with the number of its
process, forwards signals, prints the end of the first failing process's output last, and
exits with the code that matters most. `--restarts=N` starts again after being preempted or
losing a process, N times at most.
"""

import sys

from demetar.config import command_line
from demetar.config.command_line import positive
from demetar.tools import local_job


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("local", __doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    number = {"type": positive, "metavar": "N"}
    kind.add_argument("--gpus", **number, help="one process for each of N GPUs")
    kind.add_argument("--cpu", **number, help="N processes on the CPU")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="start again so often")
    options, rest = parser.parse_known_args(arguments)
    return local_job.run(
        rest, options.gpus or options.cpu, gpus=bool(options.gpus), restarts=options.restarts
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
