"""Proves on your own config that a killed run goes on exactly.

    demetar verify_resume --config=qm9:quick [--steps=20] [--config.KEY=VALUE ...]

trains 2 x steps without a break; then again in another folder, killed with SIGKILL after
`steps`, resumed by the same command; and compares the molecules of every step, the losses and the
whole state. `--cpu=N` uses N processes, `--resume_cpu` and `--resume_mesh=data,fsdp,model`
resume on something else. Exit code 0 if the verdict is good, 1 if it is not, 2 if the input is
bad; where a run fails by itself, the run's own.

Bit for bit where the topology is the same. Elsewhere the data are the same and the order of
sums is not: losses within 1e-10 (float64, up to 40 steps) or 1e-5 (float32, up to 20).
"""

import argparse
import pathlib
import sys
import tempfile

from demetar.config import command_line
from demetar.config.command_line import positive
from demetar.exits import EXIT_DONE, EXIT_FAILED, exits_cleanly
from demetar.tools.resume_check import TOLERANCE, check_steps, parse_for_runs, verify

_AXES = ("data", "fsdp", "model")


def _mesh(text: str) -> list[str]:
    """`1,2,1` as flags of `demetar.main`."""
    sizes = [int(size) for size in text.split(",")]
    if len(sizes) != len(_AXES):
        raise argparse.ArgumentTypeError(f"{text!r} must be three sizes: {','.join(_AXES)}")
    return [f"--config.mesh.{axis}={size}" for axis, size in zip(_AXES, sizes, strict=True)]


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("verify_resume", __doc__)
    number = {"type": positive, "metavar": "N"}
    parser.add_argument("--steps", default=20, **number, help="before the kill, and after")
    parser.add_argument("--cpu", default=1, **number, help="processes")
    parser.add_argument("--resume_cpu", **number, help="processes after the kill")
    parser.add_argument("--resume_mesh", type=_mesh, default=[], metavar="D,F,M", help="after it")
    parser.add_argument("--resume_devices", **number, help="devices of each process after it")
    return parser


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    options, config, rest = parse_for_runs(_parser(), arguments)
    check_steps(config, 2 * options.steps)
    resumed = options.resume_mesh
    if options.resume_devices:
        resumed = [*resumed, f"--config.mesh.cpu_devices={options.resume_devices}"]
    on = options.resume_cpu or options.cpu
    same_topology = not resumed and on == options.cpu
    with tempfile.TemporaryDirectory() as folder:
        found = verify(pathlib.Path(folder), rest, options.steps, options.cpu, resumed, on)
    good = found.is_good(same_topology)
    print("\n".join(found.lines()))
    wanted = "bit for bit" if same_topology else f"within {TOLERANCE.get(found.dtype)}"
    print(f"verdict               {'EXACT' if good else 'NOT EXACT'}: wanted {wanted}")
    return EXIT_DONE if good else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
