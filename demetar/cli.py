"""`demetar <command>`: starts the module of the command.

`demetar train ...` is `python -m demetar.main ...`, every other one has the name of its module. A
command is imported only when it is asked for, so `demetar --help` takes no time.
"""

import importlib
import sys

from data_pipelines.errors import check_known
from demetar.exits import EXIT_DONE, EXIT_USER_ERROR, exits_cleanly

# Command -> module, what it does.
COMMANDS = {
    "train": ("main", "train a model, or go on with a run that was stopped"),
    "check": ("check", "what is in a file of molecules, and what is wrong with it"),
    "predict": ("predict", "predict molecules with a trained model"),
    "fingerprint": ("fingerprint", "the vectors that a trained model makes of molecules"),
    "evaluate": ("evaluate", "errors of a run, of a model that ships, or on a file of your own"),
    "models": ("model_files", "list, show, verify, save and export trained models"),
    "checkpoints": ("checkpoints", "list, verify, compare and delete the checkpoints of a run"),
    "local": ("local", "train with several processes on this machine"),
    "doctor": ("doctor", "is this machine ready for a run, and what to do if it is not"),
    "verify_resume": ("verify_resume", "kill and resume your own config, and compare bit for bit"),
    "chaos": ("chaos", "kills, pauses, a full disk, damage at random moments; nothing is lost"),
    "faults": ("faults", "make 72 faults for real, and show that nothing is lost"),
    "qm9-table": ("qm9_table", "train the twelve targets of QM9, and write the table of all"),
    "plan": ("plan", "memory, collectives and cost on a machine that you do not have"),
    "profile": ("profile", "where the time of a step goes on this machine"),
}


def usage() -> str:
    """What `demetar --help` prints."""
    rows = [f"  {name:14} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: demetar COMMAND [options]",
            "",
            "Trains DEMETAr, a double-encoder equivariant graph transformer, in JAX.",
            "",
            *rows,
            "",
            "demetar COMMAND --help says more; demetar --version says which version this is.",
            "Begin with: demetar train --config=qm9:quick",
        ]
    )


@exits_cleanly
def main(arguments: list[str]) -> int:
    """Runs the command that `arguments` begin with; returns its exit code."""
    if not arguments:
        print(usage(), file=sys.stderr)
        return EXIT_USER_ERROR
    command, *rest = arguments
    if command in ("--help", "-h", "help"):
        print(usage())
        return EXIT_DONE
    if command == "--version":
        from importlib import metadata  # takes longer than all the rest

        print(f"demetar {metadata.version('demetar')}")
        return EXIT_DONE
    check_known("command", command, COMMANDS)
    return importlib.import_module(f"demetar.{COMMANDS[command][0]}").main(rest)


def console() -> int:
    """What the script `demetar` of an installed package calls."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(console())
