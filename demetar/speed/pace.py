"""How fast a run goes: graphs a second, operations a second, time to the end."""

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Lap:
    """What was done since the line before.

    Attributes:
      rate: graphs a second.
      flops: operations/s that the model asks for, real nodes and edges alone; None: not counted.
      fill: share of node slots that hold nodes.
      wait: share of the time in which the devices had nothing to do, for want of a batch.
      left: seconds to the end, at the average so far.
    """

    rate: float
    flops: float | None
    fill: float
    wait: float
    left: float


class Pace:
    """Counts the work of steps and the time it takes.

    Args:
      step: from which the run goes on.
      num_steps: of the run.
      work: numbers of steps -> (graphs, operations or None, nodes, slots for nodes) of them all.
    """

    def __init__(self, step: int, num_steps: int, work: Callable[[list[int]], tuple]):
        self._num_steps, self._work = num_steps, work
        self._first_step, self._start = step, time.perf_counter()
        self._steps, self._wait, self._since = [], 0.0, self._start

    def add(self, step: int) -> None:
        """A step whose sums have arrived; they count from 1."""
        self._steps.append(step)

    def waited(self, seconds: float) -> None:
        """The devices had nothing to do, for want of a batch, for so long."""
        self._wait += seconds

    def lap(self, step: int) -> Lap:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        graphs, flops, nodes, slots = self._work(self._steps)
        left = (now - self._start) / max(1, step - self._first_step) * (self._num_steps - step)
        lap = Lap(
            rate=graphs / seconds,
            flops=None if flops is None else flops / seconds,
            fill=nodes / max(slots, 1),
            wait=self._wait / seconds,
            left=left,
        )
        self._steps, self._wait, self._since = [], 0.0, now
        return lap
