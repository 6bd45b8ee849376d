"""What steers a run and is neither data position nor arrays: saved with every checkpoint."""

import dataclasses
import math
from typing import Any

import numpy as np

from data_pipelines.json_text import finite
from demetar.training.optim import Plateau


@dataclasses.dataclass
class Window:
    """Sums over the steps since the last progress line; divided once, on the host, in float64.

    Attributes:
      loss: sum over graphs.
      graphs: how many.
      errors: sum of the reported measure of each target, standardised.
      labels: how many graphs had a label, of each target.
      grad_norm: of the last step.
    """

    loss: float
    graphs: float
    errors: list[float]
    labels: list[float]
    grad_norm: float = 0.0

    @classmethod
    def empty(cls, num_targets: int) -> "Window":
        return cls(0.0, 0.0, [0.0] * num_targets, [0.0] * num_targets)

    def add(self, loss: float, graphs: float, errors, labels, grad_norm: float) -> None:
        """One step more."""
        self.loss += loss
        self.graphs += graphs
        self.errors = [a + b for a, b in zip(self.errors, map(float, errors), strict=True)]
        self.labels = [a + b for a, b in zip(self.labels, map(float, labels), strict=True)]
        self.grad_norm = grad_norm

    def mean_loss(self) -> float:
        return self.loss / max(self.graphs, 1.0)

    def mean_errors(self) -> np.ndarray:
        """[T] standardised; NaN where there was no label."""
        labels = np.array(self.labels)
        return np.divide(self.errors, labels, out=np.full(len(labels), np.nan), where=labels > 0)


@dataclasses.dataclass
class Progress:
    """How far a run is, and what its next decisions depend on.

    Attributes:
      window: sums since the last progress line.
      best_score: lowest validation score so far.
      best_step: the step of it; 0 before the first evaluation.
      last_eval_step: the last step that was evaluated.
      validation: text of the last evaluation, for progress lines.
      plateau: state of the schedule `plateau`.
      train_seconds: spent in the loop, over all starts.
    """

    window: Window
    best_score: float = math.inf
    best_step: int = 0
    last_eval_step: int = 0
    validation: str = ""
    plateau: Plateau = Plateau()
    train_seconds: float = 0.0

    @classmethod
    def new(cls, num_targets: int) -> "Progress":
        return cls(Window.empty(num_targets))

    def next_window(self) -> None:
        """Forgets the sums once they are written."""
        self.window = Window.empty(len(self.window.errors))

    def record_evaluation(self, step: int, score: float, text: str) -> bool:
        """Takes note of a validation score; returns whether it is the best so far."""
        self.last_eval_step, self.validation = step, text
        best = score < self.best_score
        if best:
            self.best_score, self.best_step = score, step
        return best

    def forget_best(self, step: int) -> None:
        """Its weights are lost: the next evaluation is the best, of `step` itself if it had one."""
        self.best_score, self.best_step = math.inf, 0
        self.last_eval_step = min(self.last_eval_step, step - 1)

    def to_json(self) -> dict[str, Any]:
        """A score that there is not yet is null."""
        return finite(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Progress":
        with_score = lambda group, key: group | ({key: math.inf} if group[key] is None else {})
        nested = {
            "window": Window(**fields["window"]),
            "plateau": Plateau(**with_score(fields["plateau"], "best")),
        }
        return cls(**with_score(fields, "best_score") | nested)
