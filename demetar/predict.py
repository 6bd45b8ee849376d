"""Predicts molecules with a trained model.

    demetar predict FILE --model=MODEL --out=OUT     every row of FILE, in its order
    demetar predict CCO c1ccccc1O --model=MODEL      SMILES; a CSV to the terminal, or to --out

MODEL is a name that ships (`demetar models ls`), the folder of a run, or a saved model. FILE is
CSV, Parquet, SDF, xyz, extxyz, an ASE database, NPZ or HDF5; OUT is CSV, Parquet, SDF, extxyz or
NPZ. OUT has the columns of FILE as they were, and `<target>_pred`, `ood` (percentile of the
distance to the training molecules), `geometry`, `status` and `message`. A row without a prediction
says why in `status`, and changes nothing about the others.

The same command goes on after a kill, with the same output. As several tasks of a SLURM or MPI job
it divides the rows. Exit code 3: no row has a prediction.
"""

import argparse
import contextlib
import csv
import gc
import pathlib
import sys
import tempfile
from collections import Counter

from data_pipelines.errors import UserError
from data_pipelines.molecules.making.geometry import GEOMETRIES
from data_pipelines.molecules.readers import FORMATS
from demetar.config import command_line
from demetar.exits import EXIT_DONE, EXIT_NOTHING, exits_cleanly

# Of what is meant as a file, though none of these is read.
_OTHER_FILES = (".smi", ".smiles", ".mol", ".mol2", ".pdb", ".txt", ".xlsx", ".json")


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = make_parser("predict", __doc__)
    parser.add_argument(
        "--on-error",
        default="skip",
        choices=("skip", "stop"),
        help="what a row without a prediction does: gets a status, or ends the command",
    )
    return run(command_line.parse(parser, arguments), embeddings=False)


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The options that `predict` and `fingerprint` share."""
    parser = command_line.make_parser(command, description)
    parser.add_argument("molecules", nargs="+", metavar="FILE|SMILES", help="what to predict")
    parser.add_argument("--model", required=True, metavar="MODEL", help="name, run or saved model")
    parser.add_argument("--out", default="", metavar="OUT", help="file to write")
    parser.add_argument("--smiles", default="", metavar="COLUMN", help="of FILE, of the SMILES")
    parser.add_argument(
        "--geometry",
        default="",
        choices=("", *GEOMETRIES),
        help="how positions are made; without it as for the training of the model",
    )
    parser.add_argument(
        "--batch-size", type=int, default=0, metavar="N", help="molecules; 0: as suits the device"
    )
    return parser


@contextlib.contextmanager
def _few_searches_for_cycles():
    """Python looks for cycles among objects less often: molecules are many, and have none."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def run(options: argparse.Namespace, embeddings: bool) -> int:
    """What both commands do; the exit code."""
    from demetar.inference.model import load_model
    from demetar.inference.prediction import Prediction, predict_file
    from demetar.job.place import Place, find_place, numbered
    from demetar.training import runtime

    if options.batch_size < 0:
        raise UserError(f"--batch-size ({options.batch_size}) must be 0 or more.")
    with tempfile.TemporaryDirectory() as folder:
        path, out = _input_and_output(options, pathlib.Path(folder))
        runtime.configure_for_prediction()
        request = Prediction(
            model=load_model(options.model),
            path=path,
            out=out,
            smiles=options.smiles,
            geometry=options.geometry,
            batch_size=options.batch_size,
            stop=not embeddings and options.on_error == "stop",
            embeddings=embeddings,
        )
        with _few_searches_for_cycles():
            here = numbered(find_place(None, None, None))
            if not options.out:  # a few SMILES, for the screen: nothing to share
                if here.process:
                    return EXIT_DONE
                here = Place("one process")
            counts = predict_file(request, here)
        if not options.out:
            sys.stdout.write(out.read_text())
    print(_summary(counts, options.out), file=sys.stderr)
    # Only process 0, which writes the output, has seen all rows.
    return EXIT_NOTHING if here.process == 0 and not counts["ok"] else EXIT_DONE


def _input_and_output(options, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The file to read, made of the SMILES if such were given, and the file to write."""
    first = options.molecules[0]
    if first.lower().endswith(_OTHER_FILES) and not _exists(first):
        raise UserError(f"{first} is no SMILES, and there is no such file.")
    if not (first.lower().endswith(tuple(FORMATS)) or _exists(first)):
        path = folder / "smiles.csv"
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([["smiles"], *([text] for text in options.molecules)])
        return path, pathlib.Path(options.out or folder / "out.csv")
    if len(options.molecules) > 1:
        raise UserError(f"{len(options.molecules)} inputs were given: give one file, or SMILES.")
    if not options.out:
        raise UserError("--out is missing: name a file to write, e.g. --out=predicted.csv.")
    return pathlib.Path(first), pathlib.Path(options.out)


def _exists(name: str) -> bool:
    """Whether there is such a file; a long SMILES is the name of none."""
    try:
        return pathlib.Path(name).exists()
    except OSError:
        return False


def _summary(counts: Counter, out: str) -> str:
    total = sum(counts.values())
    others = ", ".join(f"{n} {status}" for status, n in counts.most_common() if status != "ok")
    return f"{counts['ok']} of {total} rows predicted{f' ({others})' if others else ''}" + (
        f"; see {out}" if out else ""
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
