"""Kills a run again and again, at random moments, and shows that nothing is lost.

    demetar chaos --kills=30 --cpu=2 --config=qm9:quick [--config.KEY=VALUE ...]

trains `--steps` once without a break; then again in another folder, where one process or all
are killed with SIGKILL at a random moment (starting, compiling, training, evaluating, saving)
and the same command is given again, `--kills` times. Then compares the molecules of every step
and the whole state, bit for bit. Prints JSON. Exit code 0 if nothing was lost, 1 if something
was, 2 if the input is bad; where a run fails by itself, the run's own.
"""

import json
import pathlib
import sys
import tempfile

from demetar.config import command_line
from demetar.exits import EXIT_DONE, EXIT_FAILED, exits_cleanly
from demetar.tools.local_job import positive
from demetar.tools.random_kills import EXACT, chaos
from demetar.tools.resume_check import check_steps, parse_for_runs


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("chaos", __doc__)
    parser.add_argument("--kills", type=positive, default=30, metavar="N", help="how many")
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="of the whole run")
    parser.add_argument("--cpu", type=positive, default=2, metavar="N", help="processes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of moments and victims")
    options, config, rest = parse_for_runs(parser, arguments)
    check_steps(config, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        found = chaos(
            pathlib.Path(folder), rest, options.kills, options.steps, options.cpu, options.seed
        )
    print(json.dumps(found, indent=1))
    return EXIT_DONE if found["verdict"] == EXACT else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
