"""Ships the best weights of a finished run with the package.

    demetar pretrained --workdir=DIR --name=NAME      makes one
    demetar evaluate --pretrained=NAME                repeats its published number

In Python, `demetar.load_pretrained(NAME)` gives the model as a function.
"""

import pathlib
import sys

from data_pipelines.errors import UserError
from demetar.config import command_line
from demetar.exits import EXIT_DONE, exits_cleanly
from demetar.tools.shipped import export, load_pretrained, pretrained_names


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = command_line.make_parser("pretrained", __doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a finished run")
    parser.add_argument("--name", required=True, metavar="NAME", help="what to call the model")
    options = command_line.parse(parser, arguments)
    if options.name in pretrained_names():
        raise UserError(f"A model {options.name!r} ships already: choose another --name.")
    folder = export(pathlib.Path(options.workdir), options.name)
    load_pretrained(options.name)  # what could not be built again says so now
    print(f"{folder}: {options.name} ships now.")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
