"""What a trained model knows of molecules before its last layers: one vector each.

    demetar fingerprint FILE --model=MODEL --out=OUT
    demetar fingerprint CCO c1ccccc1O --model=MODEL

OUT gets a column `embedding`, and the other columns that `demetar predict` writes; in NPZ it is one
array. Molecules that the model takes for alike are near each other.
"""

import sys

from demetar.config import command_line
from demetar.exits import exits_cleanly
from demetar.predict import make_parser, run


@exits_cleanly
def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = make_parser("fingerprint", __doc__)
    return run(command_line.parse(parser, arguments), embeddings=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
