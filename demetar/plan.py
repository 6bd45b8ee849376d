"""A plan before you pay: what a config would need and cost on a machine you do not have.

    demetar plan --config=qm9 --topology=h100:4x8 [--batch=N] [--html=FILE] [--json=FILE]
    demetar plan --compare ONE.json OTHER.json

Compiles the real, sharded train step for that topology, without an accelerator, and prints
parameters, memory of each chip, kernels and collectives of a step, and what follows from them: time
of a step and what bounds it, molecules a second, weak scaling to 1024 chips, hours and chip-hours
of the config's training. `h100:4x8` is 4 nodes of 8 GPUs, `v5e:16x16` a TPU slice; another GPU is
described by a file like those in demetar/speed/accelerators: `my.json:2x8`.

Needs an extra: `pip install -e ".[plan-gpu]"` or `".[plan-tpu]"`. Everything predicted is marked
so, and is a range: nobody knows which share of a data sheet's peaks a step will reach.
"""

import os
import pathlib
import sys

# Before jax: it must not look for the accelerator that it is to compile for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

from data_pipelines.errors import UserError
from demetar.config.command_line import make_parser, parse_with_config
from demetar.exits import EXIT_DONE, exits_cleanly
from demetar.records.files import read_json, write_json
from demetar.speed.topology import planned_devices
from demetar.tools import plan_page
from demetar.tools.planner import plan_that_fits
from demetar.training import runtime


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = make_parser("plan", __doc__)
    parser.add_argument("--topology", help="as h100:4x8 or v5e:16x16")
    parser.add_argument("--batch", type=int, metavar="N", help="instead of config.data.batch_size")
    parser.add_argument("--html", type=pathlib.Path, metavar="FILE", help="page with the table")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="the plan as numbers")
    parser.add_argument(
        "--compare",
        type=pathlib.Path,
        nargs=2,
        metavar=("ONE", "OTHER"),
        help="two files of --json side by side; nothing is compiled",
    )
    options, config = parse_with_config(parser, arguments, required=False)
    if options.compare:
        plans = [_read_plan(file) for file in options.compare]
        print(plan_page.comparison([file.stem for file in options.compare], plans))
        return EXIT_DONE
    if config is None or not options.topology:
        raise UserError("demetar plan needs --config and --topology, or --compare and two files.")
    config.mesh.cpu_devices = 0
    if options.batch is not None:
        config.data.batch_size = options.batch
    chip, devices = planned_devices(options.topology)
    runtime.configure(config)
    # What is compiled for another machine cannot be read back on this one.
    jax.config.update("jax_enable_compilation_cache", False)
    plan = plan_that_fits(config, options.topology, chip, devices)
    rows = plan_page.rows_of(plan)
    print(plan_page.as_text(rows))
    if options.html:
        plan_page.write_html(options.html, plan, rows)
    if options.json:
        write_json(options.json, plan_page.numbers_of(plan))
    return EXIT_DONE


def _read_plan(file: pathlib.Path) -> dict:
    try:
        plan = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--compare: {file} cannot be read: {error}") from error
    if not isinstance(plan, dict) or "predicted_scaling" not in plan:
        raise UserError(f"--compare: {file} is not a file of `demetar plan --json`.")
    return plan


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
