"""Trains what is missing of the twelve targets of QM9, and writes the table of all.

    demetar qm9-table --budget=quick [--targets=homo,mu] [--seed=0] [--runs=FOLDER] [--page]

Targets that share what they depend on are learned together, by one network of several outputs:
the three orbital energies; energies, polarizability and heat capacity; the dipole moment alone,
and the extent of the electrons alone, which have read-outs of their own. Runs lie in `--runs`, one
folder each: what is finished is skipped, what was stopped goes on, and test is evaluated once, at
the end of a run. `--page` writes benchmarks/results/qm9.json and docs/results/qm9.md of a checkout.
Prints the table. The exit code is 0, or that of a training that did not end.
"""

import pathlib
import sys

from data_pipelines.errors import check_known
from demetar.config import command_line
from demetar.exits import EXIT_DONE, exits_cleanly
from demetar.records.log import say
from demetar.tools import local_job, qm9_page
from demetar.tools.qm9_page import BUDGETS, GROUPS


def _groups(text: str) -> list[str]:
    """The groups that hold the targets of a comma-separated list, in the order of `GROUPS`."""
    wanted = set(text.split(","))
    of_target = {target: name for name, targets in GROUPS.items() for target in targets}
    for target in wanted:
        check_known("target of --targets", target, of_target)
    return [name for name, targets in GROUPS.items() if wanted.intersection(targets)]


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("qm9-table", __doc__)
    parser.add_argument("--budget", required=True, metavar="|".join(BUDGETS))
    parser.add_argument("--targets", default=",".join(sum(GROUPS.values(), ())))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/qm9"))
    parser.add_argument("--page", action="store_true", help="write docs/results/qm9.md")
    options = command_line.parse(parser, arguments)
    check_known("--budget", options.budget, BUDGETS)
    if options.page:
        qm9_page.check_checkout()
    found = []
    for group in _groups(options.targets):
        workdir = options.runs / f"{options.budget}-{group}-{options.seed}"
        config = f"qm9:{','.join((options.budget, *GROUPS[group]))}"
        command = [f"--config={config}", f"--config.seed={options.seed}", f"--workdir={workdir}"]
        if not (workdir / "result.json").exists():
            say(f"Training {', '.join(GROUPS[group])}: python -m demetar.main {' '.join(command)}")
            if code := local_job.run(command, count=1):
                return code
        found.append(qm9_page.facts(workdir, options.budget, command))
        if options.page:
            qm9_page.keep(found)
    print(qm9_page.table(found))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
