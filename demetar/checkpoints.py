"""The checkpoints of a run: what is there, whether it is whole, what differs, what can go.

    demetar checkpoints ls DIR              steps, sizes, what is damaged and why, latest and best
    demetar checkpoints verify DIR          the same, and each whole one is read; 2 if one is not
    demetar checkpoints diff DIR DIR        config and data of two runs, or of two checkpoints
    demetar checkpoints prune DIR           deletes all but the newest and the best; asks first

DIR is the workdir of a run; for `diff` also the folder of one checkpoint. All but `prune` only
read, also while the run is under way. `prune` refuses such a run.
"""

import argparse
import pathlib
import sys

from data_pipelines.errors import UserError
from demetar.config import command_line
from demetar.config.command_line import positive
from demetar.exits import EXIT_DONE, exits_cleanly
from demetar.tools import checkpoint_files


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    options = command_line.parse(_parser(), arguments)
    options.run(options)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("checkpoints", __doc__)
    commands = parser.add_subparsers(required=True, metavar="ls|verify|diff|prune")

    def add(name: str, run, about: str, *folders: str) -> argparse.ArgumentParser:
        command = command_line.add_command(commands, name, run, about)
        for folder in folders:
            command.add_argument(
                folder, type=pathlib.Path, metavar="DIR", help="workdir of a run, or a checkpoint"
            )
        return command

    add("ls", _list, "steps, sizes, what is damaged and why, latest and best", "workdir")
    add("verify", _verify, "checks every hash, and reads each whole checkpoint", "workdir")
    add("diff", _diff, "what differs in config and data of two", "first", "second")
    prune = add("prune", _prune, "deletes all but the newest and the best", "workdir")
    prune.add_argument(
        "--keep", type=positive, metavar="N", help="of the newest; else config.checkpoint.keep_last"
    )
    prune.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _list(options: argparse.Namespace) -> None:
    print("\n".join(checkpoint_files.table(options.workdir)))


def _verify(options: argparse.Namespace) -> None:
    for line in checkpoint_files.verify(options.workdir):
        print(line, flush=True)


def _diff(options: argparse.Namespace) -> None:
    print("\n".join(checkpoint_files.compare(options.first, options.second)))


def _prune(options: argparse.Namespace) -> None:
    pruning = checkpoint_files.plan_pruning(options.workdir, options.keep)
    print("\n".join(pruning.lines()), flush=True)
    if not pruning.remove:
        return
    if not options.yes:
        if not sys.stdin.isatty():
            raise UserError("Nothing is deleted: say --yes where nobody can be asked.")
        if input("Delete this? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing is deleted.")
            return
    pruning.delete()
    print(f"{len(pruning.remove)} deleted.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
