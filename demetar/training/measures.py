"""The one table of measures: what a loss may be, and what an error is reported as."""

import dataclasses
import math
from collections.abc import Callable

from data_pipelines.errors import UserError, check_known
from data_pipelines.graph import Array
from data_pipelines.targets import Target


@dataclasses.dataclass(frozen=True)
class Measure:
    """A mean over labels of a function of the error, and what is made of that mean.

    Attributes:
      of_error: prediction minus label -> a number >= 0, elementwise; NumPy or jax.
      power: the unit of that number is the target's to this power.
      finish: (mean, variance of the labels), floats in reported units -> the reported value.
      unit: of the reported value, from the target's.
      of_variance: whether `finish` looks at the variance.
      is_loss: whether it may be differentiated and added over targets.
    """

    of_error: Callable[[Array], Array]
    power: int
    finish: Callable[[float, float], float] = lambda mean, variance: mean
    unit: Callable[[str], str] = lambda unit: unit
    of_variance: bool = False
    is_loss: bool = True


def _huber(error: Array) -> Array:
    """e^2 / 2 below 1, |e| - 1/2 above (Huber 1964), in standardised units."""
    size = abs(error)
    near = size.clip(max=1.0)
    return near * (size - near / 2)


_squared = lambda unit: f"{unit}^2"
_none = lambda unit: ""

MEASURES = {
    "mae": Measure(abs, 1),
    "mse": Measure(lambda error: error * error, 2, unit=_squared),
    "rmse": Measure(
        lambda error: error * error, 2, lambda mean, variance: math.sqrt(mean), is_loss=False
    ),
    "r2": Measure(
        lambda error: error * error,
        2,
        # Of equal labels no share of the variance can be explained.
        lambda mean, variance: 1 - mean / variance if variance > 0 else float("nan"),
        unit=_none,
        of_variance=True,
        is_loss=False,
    ),
    "huber": Measure(_huber, 0, unit=_none),
}


def value_text(target: Target, value: float) -> str:
    """`homo 103.8 meV`, for a person."""
    unit = "" if target.unit == "1" else MEASURES[target.metric].unit(target.unit)
    return f"{target.name} {value:.4g} {unit}".rstrip()


def check_measure(key: str, name: str, as_loss: bool = False) -> None:
    """Refuses an unknown measure, and one that is no loss where a loss is asked for."""
    known = [n for n, measure in MEASURES.items() if measure.is_loss or not as_loss]
    if as_loss and name in MEASURES and name not in known:
        raise UserError(f"{key} is {name!r}, which is no loss. Known: {', '.join(known)}.")
    check_known(key, name, known)
