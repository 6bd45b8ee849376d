"""Throws one fault after another at a run, at random moments, and shows that nothing is lost.

    demetar chaos --faults=30 --cpu=2 --config=qm9:quick [--config.KEY=VALUE ...]

trains `--steps` once without a break; then again in another folder, where at a random moment
(starting, compiling, training, evaluating, saving) one of these is done, `--faults` times:

    kill one, kill all    SIGKILL
    pause, slow           a process is stopped and let go on, once or in bursts: only delay
    stop                  a process is stopped for good: the others name it and end
    full disk             the folder of the run, a small disk in memory, is full for some seconds
    flip a bit            killed; then a byte of the newest whole checkpoint is changed
    delete a file         killed; then a file of the newest whole checkpoint is deleted

Where the job has ended, the same command is given again. Then compares the molecules of every
step and the whole state, bit for bit. Prints JSON. A kind that this machine cannot throw is left
out and named: a small disk takes the right to mount one. Exit code 0 if nothing was lost and each
fault had the end that is promised, 1 if not, 2 if the input is bad; where a run fails by itself,
the run's own.
"""

import pathlib
import shlex
import sys
import tempfile

from data_pipelines.json_text import json_text
from demetar.config import command_line
from demetar.config.command_line import positive
from demetar.exits import EXIT_DONE, EXIT_FAILED, exits_cleanly
from demetar.tools.random_faults import EXACT, chaos
from demetar.tools.resume_check import check_steps, parse_for_runs
from demetar.training.provenance import provenance


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("chaos", __doc__)
    parser.add_argument("--faults", type=positive, default=30, metavar="N", help="how many")
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="of the whole run")
    parser.add_argument("--cpu", type=positive, default=2, metavar="N", help="processes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of kinds and moments")
    options, config, rest = parse_for_runs(parser, arguments)
    check_steps(config, options.steps)
    made_by = {"command": shlex.join(["demetar", "chaos", *arguments]), **provenance()}
    with tempfile.TemporaryDirectory() as folder:
        found = chaos(
            pathlib.Path(folder),
            rest,
            faults=options.faults,
            steps=options.steps,
            count=options.cpu,
            seed=options.seed,
            lost_seconds=config.cluster.lost_seconds,
        )
    print(json_text(found | made_by, indent=1))
    return EXIT_DONE if found["verdict"] == EXACT else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
