"""Trained models as files: what ships, what is in one, whether it is whole.

    demetar models ls                                what ships with this package
    demetar models show MODEL                        what a model is, as JSON
    demetar models verify MODEL                      its hash, and whether it can be built
    demetar models save --workdir=DIR --out=FOLDER   the best weights of a finished run; or a .zip
    demetar models export MODEL --out=FILE           StableHLO, to be used without demetar

MODEL is a name that ships, a folder, or a zip.
"""

import argparse
import functools
import json
import pathlib
import sys

from data_pipelines.errors import UserError
from data_pipelines.json_text import json_text
from demetar.config import command_line
from demetar.exits import EXIT_DONE, exits_cleanly


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    options = command_line.parse(_parser(), arguments)
    options.run(options)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser("models", __doc__)
    commands = parser.add_subparsers(required=True, metavar="ls|show|verify|save|export")
    add = functools.partial(command_line.add_command, commands)
    add("ls", _list, "what ships with this package")
    for name, run, about in (
        ("show", _show, "what a model is, as JSON"),
        ("verify", _verify, "checks the hash of a model, and builds it"),
    ):
        add(name, run, about).add_argument("model", metavar="MODEL", help="name, folder or zip")
    save = add("save", _save, "the best weights of a finished run as a folder or a zip")
    save.add_argument("--workdir", required=True, metavar="DIR", help="of a finished run")
    where = save.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="FOLDER|ZIP", help="what to write")
    where.add_argument("--name", metavar="NAME", help="ship it with this package, by this name")
    save.add_argument("--licence", default="", metavar="TEXT", help="of the weights")
    export = add("export", _export, "StableHLO by jax.export, and a JSON that says how to call it")
    export.add_argument("model", metavar="MODEL", help="name, folder or zip")
    export.add_argument("--out", required=True, metavar="FILE", help="of the program")
    export.add_argument("--platforms", default="cpu,cuda,tpu", metavar="NAME,...")
    export.add_argument("--batch", type=int, metavar="N", help="graphs of a call; default: any")
    export.add_argument("--nodes", type=int, default=0, metavar="N", help="of a padded graph")
    export.add_argument("--edges", type=int, default=0, metavar="N", help="of a padded graph")
    return parser


def _list(options: argparse.Namespace) -> None:
    del options
    from demetar.inference import package
    from demetar.inference.card import CARD

    for name in package.pretrained_names():
        card = json.loads((package.SHIPPED / name / CARD).read_text())
        errors = [_error_text(card, target) for target in card["targets"]]
        print(f"{name:28} {card['items']:10} {'; '.join(errors)}")


def _error_text(card: dict, target: dict) -> str:
    """`homo MAE 37.2 meV (36.4 to 38.1)`, of the published result."""
    row = card["result"].get("targets", {}).get(target["name"])
    if row is None:
        return f"{target['name']} ({target['unit']})"
    low, high = row["interval_95"]
    metric = target["metric"]
    return (
        f"{target['name']} {metric.upper()} {row[metric]:.4g} {target['unit']} "
        f"({low:.4g} to {high:.4g})"
    )


def _show(options: argparse.Namespace) -> None:
    from demetar.inference import package

    print(json_text(package.read(options.model).card, indent=1))


def _verify(options: argparse.Namespace) -> None:
    import jax

    from demetar.inference import package

    model = package.read(options.model)
    model.network()  # what could not be built again says so now
    number = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(
        f"{options.model} is whole: {number:,} parameters, SHA-256 "
        f"{model.card['weights_sha256']}, targets "
        + ", ".join(f"{t.name} ({t.unit})" for t in model.targets)
    )


def _save(options: argparse.Namespace) -> None:
    # Late: who only reads models needs neither Orbax nor data.
    from demetar.inference import package, runs

    destination = pathlib.Path(options.out) if options.out else package.SHIPPED / options.name
    if options.name in package.pretrained_names():
        raise UserError(f"A model {options.name!r} ships already: choose another --name.")
    saved = runs.save(pathlib.Path(options.workdir), destination, options.licence)
    errors = [_error_text(saved.card, target) for target in saved.card["targets"]]
    print(f"{destination}: {'; '.join(errors)}; SHA-256 {saved.card['weights_sha256']}")


def _export(options: argparse.Namespace) -> None:
    from demetar.inference import export, package

    destination = pathlib.Path(options.out)
    card = export.export(
        package.read(options.model),
        destination,
        tuple(options.platforms.split(",")),
        options.batch,
        options.nodes,
        options.edges,
    )
    shapes = ", ".join(f"{name} {row['shape']}" for name, row in card["inputs"].items())
    print(f"{destination} for {', '.join(card['platforms'])}: {shapes}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
