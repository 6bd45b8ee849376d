"""Trains a model, or goes on with a run that was stopped: the same command does both.

    demetar train --config=FILE[:VARIANT,...] [--workdir=DIR] [--config.KEY=VALUE ...]

A config file is Python and is executed; `qm9:quick` names one that comes with the package. On a
cluster the same command runs once for each process. SLURM, Open MPI, Kubernetes and TPUs are
recognised; three options (or `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`) say
it where nothing else does. Exit codes: demetar/exits.py.
"""

import faulthandler
import pathlib
import sys

from demetar.config import command_line
from demetar.exits import EXIT_DONE, exits_cleanly
from demetar.job import place
from demetar.job.job import join_job
from demetar.records.writers import check_writers
from demetar.train import train_and_evaluate
from demetar.training import runtime


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("train", __doc__)
    parser.add_argument("--workdir", metavar="DIR", help="of the run; else runs/CONFIG-VARIANT")
    place.add_options(parser)
    options, config = command_line.parse_with_config(parser, arguments)
    check_writers(config.log.writers)
    faulthandler.enable()  # a crash inside of XLA says where Python was
    workdir = options.workdir or f"runs/{command_line.run_name(options.config)}"
    here = place.find_place(options.coordinator_address, options.num_processes, options.process_id)
    with join_job(here, pathlib.Path(workdir), config.cluster) as job:
        runtime.configure(config)
        train_and_evaluate(config, pathlib.Path(workdir), job)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
