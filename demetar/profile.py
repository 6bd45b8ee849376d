"""Where the time of a step goes, as a table, and a trace to look closer.

    demetar profile --config=qm9:quick [--steps=20] [--trace=DIR]

Runs real steps of the config on this machine, under JAX's profiler, and says what each costs:
assembling and placing the batch, forward, backward, sums over devices, optimizer, what the
devices idle, and logging, saving and evaluating spread over the steps between them. The trace
opens in XProf (`pip install xprof; xprof DIR`) or TensorBoard's profile plugin. Nothing is left
in a workdir, no run is touched, and no server hears of it.
"""

import pathlib
import sys
import tempfile

from demetar.config.command_line import make_parser, parse_with_config, positive
from demetar.exits import EXIT_DONE, exits_cleanly
from demetar.job.place import find_place
from demetar.records.log import say
from demetar.tools import profiler
from demetar.training import runtime
from demetar.training.experiment import build_experiment


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = make_parser("profile", __doc__)
    parser.add_argument("--steps", type=positive, default=20, help="under the profiler")
    parser.add_argument("--trace", type=pathlib.Path, metavar="DIR", help="keep the trace there")
    options, config = parse_with_config(parser, arguments)
    config.log.writers = ()
    runtime.configure(config)
    profiler.check_alone(find_place(None, None, None))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        found = profiler.Profiler(build_experiment(config), options.steps, folder)
        rows = found.rows(options.trace or folder / "trace")
    say(found.headline())
    print(f"{'':10} {'ms/step':>9}")
    for name, seconds, remark in rows:
        print(f"{name:10} {1e3 * seconds:9.3f}  {remark}".rstrip())
    if options.trace:
        say(f"The trace is in {options.trace}: xprof {options.trace}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
