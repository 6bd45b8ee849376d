"""Trains a model.

    python -m demetar.main --config=configs/qm9.py[:variant] [--workdir=DIR] [--config.key=value]

The config file is Python and is executed. The same command goes on with a run that was
stopped. Exit codes: see `demetar.exits`. On a cluster the same command runs once for each
process; SLURM, Open MPI, Kubernetes and TPUs are recognised, and three flags (or
`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`) say it where nothing else does.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from demetar.exits import EXIT_USER_ERROR, exits_cleanly
from demetar.job import place
from demetar.job.job import join_job
from demetar.train import train_and_evaluate
from demetar.training import runtime

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config>.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes the job has.")
_PROCESS = flags.DEFINE_integer("process_id", None, "The number of this one, from 0.")


def _default_workdir() -> pathlib.Path:
    """`runs/qm9-quick` for `--config=configs/qm9.py:quick`."""
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = pathlib.Path(file).stem
    return pathlib.Path("runs") / (f"{name}-{variant.replace(',', '-')}" if variant else name)


def _parse_flags(argv) -> list[str]:
    """Flags of the command; a wrong one is a line and exit code 2, not a traceback."""
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.keys()  # a config file that cannot be loaded says so here
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = str(error.args[0] if error.args else error).replace("\\n", " ").strip()
        if "Traceback" in message:  # of a config file: its last line says what is wrong
            message = message.splitlines()[-1]
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


@exits_cleanly
def _main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # what a person should see is said by writers.say
    config = _CONFIG.value
    workdir = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else _default_workdir()
    here = place.find_place(_COORDINATOR.value, _COUNT.value, _PROCESS.value)
    with join_job(here, workdir, config.cluster) as job:
        runtime.configure(config)
        train_and_evaluate(config, workdir, job)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(_main, flags_parser=_parse_flags)
