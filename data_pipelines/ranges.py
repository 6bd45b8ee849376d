"""What a number of a config may be: in words, and as a test that nan fails."""

import math
import numbers
from collections.abc import Callable
from typing import Any

from data_pipelines.errors import UserError

Range = tuple[str, Callable[[Any], bool]]


def whole_from(least: int) -> Range:
    """Whole numbers, none smaller."""
    return (
        f"a whole number from {least}",
        lambda x: isinstance(x, numbers.Integral) and x >= least,
    )


COUNT = whole_from(1)
NOT_NEGATIVE: Range = ("at least 0", lambda x: x >= 0)
FINITE: Range = ("a finite number", math.isfinite)
POSITIVE: Range = ("a finite number above 0", lambda x: 0 < x < math.inf)
PART: Range = ("at least 0 and at most 1", lambda x: 0 <= x <= 1)
BELOW_ONE: Range = ("at least 0 and less than 1", lambda x: 0 <= x < 1)
SEED: Range = ("from 0 to 4294967295", lambda x: 0 <= x < 2**32)  # NumPy takes no other


def check_range(what: str, value: Any, allowed: Range) -> None:
    """Refuses a value out of its range; `what` names it."""
    words, fits = allowed
    if not fits(value):
        raise UserError(f"{what} is {value}, but must be {words}.")
