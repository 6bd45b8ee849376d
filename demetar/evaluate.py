"""Repeats the evaluation of a run or of a model that ships, or scores a model on a file.

    demetar evaluate --workdir=DIR [--split=test] [--out=FILE.csv]
    demetar evaluate --pretrained=NAME [--split=test] [--out=FILE.csv]
    demetar evaluate FILE --model=MODEL --target=homo:eV [--target=...]

Reads the saved config and the best weights, as data: no config file is executed. Prints JSON; of
the first two with the same keys as `result.json`. `--out` takes a line for each graph of the part:
its number, the labels and the predictions. FILE is one that `demetar predict` takes; the
truth is in its column that is called as the target.
"""

import csv
import pathlib
import sys

import numpy as np

from data_pipelines.dataset import PARTS
from data_pipelines.elements import composition
from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from data_pipelines.molecules import references
from demetar.config import command_line, stored
from demetar.exits import EXIT_DONE, exits_cleanly
from demetar.inference import package
from demetar.training import runtime
from demetar.training.checkpoints import read_best
from demetar.training.evaluator import Evaluator, Outcome
from demetar.training.experiment import Experiment, build_experiment
from demetar.training.result import result_of


def evaluate_run(workdir: pathlib.Path, split: str, out: str = "") -> dict:
    """Errors of the best weights of the run in `workdir` on `split`; `out`: see `_evaluated`."""
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{workdir} is not the folder of a run: it has no config.json.")
    saved = stored.read_identity(file)
    config = stored.on_one_device(stored.from_json(saved["config"]))
    runtime.configure(config)
    experiment = build_experiment(config)
    stored.check_same_run(saved, experiment.identity, workdir)
    step, params, _ = read_best(workdir)  # reads only: the run may be under way
    return result_of(_evaluated(experiment, params, split, out), split, step, saved)


def evaluate_pretrained(name: str, split: str, out: str = "") -> dict:
    """Errors of a model that ships, on data prepared here; with what was published beside.

    `same_data` says whether the numbers are the published ones too: chaotic systems differ
    between machines whose arithmetic differs in the last bit.
    """
    model = package.read(name)
    config = stored.on_one_device(model.config)
    runtime.configure(config)
    experiment = build_experiment(config)
    today, published = experiment.dataset.passport, model.card["passport"]
    changed = stored.differences(published, today)
    same_data = changed.pop("content_sha256", None) is None
    if changed:
        raise UserError(
            f"{name} was trained on other data than demetar prepares here:\n"
            + "\n".join(changed.values())
            + "\nUse the version of demetar that it came with."
        )
    outcome = _evaluated(experiment, model.params, split, out)
    result = result_of(outcome, split, model.card["result"]["step"], experiment.identity)
    return result | {
        "pretrained": name,
        "published": model.card["result"],
        "same_data": same_data,
    }


def _evaluated(experiment: Experiment, params, split: str, out: str) -> Outcome:
    """The outcome on a part; its table in the file `out`, if that is not ""."""
    of_nodes = [target.name for target in experiment.objective.targets if target.per_node]
    if out and of_nodes:
        raise UserError(f"--out: {of_nodes[0]} has values of each node, and lines are of graphs.")
    outcome = Evaluator(experiment).run(params, split)
    if out:
        _write_table(outcome, out)
    return outcome


def _write_table(outcome: Outcome, out: str) -> None:
    """CSV: of each graph `index`, and of each target label and `NAME_pred`, as the source has them.

    Args:
      outcome: of targets of graphs.
      out: the file.
    """
    dataset, graphs = outcome.dataset, outcome.graphs
    columns = {"index": dataset.arrays.index[graphs]}
    for target in outcome.targets:
        added = 0.0
        if reference := dataset.references.get(target.name):
            elements = tuple(reference)
            counts = composition(dataset.arrays.atomic_number, dataset.arrays.node_offset, elements)
            added = references.total(reference, counts, elements)[graphs]
        columns[target.name] = outcome.labels(target) + added
        columns[f"{target.name}_pred"] = outcome.predictions[target.name] + added
    with open(out, "w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(columns)
        blank = lambda value: "" if np.isnan(value) else value
        table.writerows(map(blank, row) for row in zip(*columns.values(), strict=True))


def _score(options) -> dict:
    from demetar.inference.model import load_model
    from demetar.inference.scoring import score_file

    if not options.target:
        raise UserError("--target is missing: name a column of FILE and its unit, as homo:eV.")
    runtime.configure_for_prediction()
    file = pathlib.Path(options.file)
    return score_file(load_model(options.model), file, tuple(options.target), options.smiles)


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("evaluate", __doc__)
    parser.add_argument("file", nargs="?", metavar="FILE", help="of molecules, with --model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="of a run")
    source.add_argument("--pretrained", metavar="NAME", help="of a model that ships")
    source.add_argument("--model", metavar="MODEL", help="name, run or saved model, for FILE")
    parser.add_argument(
        "--target", action="append", default=[], metavar="NAME:UNIT", help="column of FILE"
    )
    parser.add_argument("--smiles", default="", metavar="COLUMN", help="of FILE, of the SMILES")
    parser.add_argument("--out", default="", metavar="FILE", help="CSV of labels and predictions")
    parser.add_argument("--split", choices=PARTS, help="the part of the data; default: test")
    options = command_line.parse(parser, arguments)
    if bool(options.file) != bool(options.model):
        raise UserError("A FILE is scored with --model=MODEL: give both, or neither.")
    if options.model and options.split:
        raise UserError("--split is of a run's data, and a FILE is scored whole: leave it out.")
    if options.model and options.out:
        raise UserError("--out is of a run's data: `demetar predict` writes the rows of a FILE.")
    if not options.model and (options.target or options.smiles):
        raise UserError("--target and --smiles are columns of a FILE: give it, with --model.")
    split = options.split or "test"
    if options.model:
        found = _score(options)
    elif options.pretrained:
        found = evaluate_pretrained(options.pretrained, split, options.out)
    else:
        found = evaluate_run(pathlib.Path(options.workdir), split, options.out)
    print(json_text(found, indent=1))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
