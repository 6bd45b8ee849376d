"""How long a compiled step would take: kernel after kernel, collectives beside them.

A kernel takes the longest of: its launch, its matrix products, its exponentials and the like, the
bytes that it moves. A collective that was started runs beside what follows, and only what is not
done when its result is waited for counts. Peaks are of data sheets and no program reaches them, so
a prediction is a range: `ASSUMPTIONS` say which share of each is reached.
"""

import collections
import dataclasses
import re

from demetar.speed.kernels import Kernel
from demetar.speed.topology import Accelerator, Collective
from demetar.speed.trace import phase_of

LIMITS = ("launches", "matrix products", "functions", "memory")


@dataclasses.dataclass(frozen=True)
class Assumption:
    """What share of a chip's peaks is reached.

    Attributes:
      product: of the peak of matrix products.
      memory: of the bandwidth.
      link: of the bandwidth between chips.
      launch: of the time that a launch is guessed to take.
      latency: seconds until a collective of nothing is done.
    """

    product: float
    memory: float
    link: float
    launch: float
    latency: float


# Guesses, for no accelerator was at hand: a GPU's launch takes 2 to 4 us from the host and less in
# a CUDA graph; products as small as ours reach a quarter to three quarters of a peak.
ASSUMPTIONS = {
    "best": Assumption(0.75, 0.9, 0.9, 0.5, 1.0e-5),
    "likely": Assumption(0.5, 0.75, 0.7, 1.0, 2.0e-5),
    "worst": Assumption(0.25, 0.5, 0.5, 2.0, 4.0e-5),
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine does, all in seconds: for each operation, function, byte and launch.

    Attributes:
      product: of an operation in a matrix product.
      function: of an exponential.
      byte: of memory.
      launch: of a kernel, at least.
      cache: bytes; a kernel that moves no more finds them in a core's caches.
      cached: what `byte` is multiplied by for such a kernel.
      adds_up: whether a kernel's products, functions and bytes are done one after the other,
        as on a CPU, and not at once.
    """

    product: float
    function: float
    byte: float
    launch: float
    cache: float = 0.0
    cached: float = 1.0
    adds_up: bool = False

    def seconds(self, kernel: Kernel, part: float = 1.0) -> tuple[float, str]:
        """Of one launch, and which of `LIMITS` it is; `part` of its work is done."""
        byte = self.byte * (self.cached if kernel.bytes <= self.cache else 1)
        parts = (
            self.launch,
            part * kernel.product * self.product,
            part * kernel.functions * self.function,
            part * kernel.bytes * byte,
        )
        longest = max(range(4), key=parts.__getitem__)
        total = max(self.launch, sum(parts[1:])) if self.adds_up else parts[longest]
        return total, LIMITS[longest]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A step, predicted.

    Attributes:
      computing: seconds of all kernels.
      waiting: seconds for collectives, beyond what runs beside them.
      communicating: seconds of all collectives, hidden or not.
      by_limit: seconds of the kernels that each of `LIMITS` bounds.
      by_part: part of the model and phase -> (seconds, what bounds most of them).
    """

    computing: float
    waiting: float
    communicating: float
    by_limit: dict[str, float]
    by_part: dict[str, tuple[float, str]]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.computing + self.waiting


def rates_of(chip: Accelerator, dtype: str, assumption: Assumption) -> Rates:
    """Of an accelerator, in a compute type."""
    peak = chip.peak_flops.get(dtype) or chip.peak_flops["float32"] / 16  # float64, about
    return Rates(
        product=1 / (assumption.product * peak),
        function=1 / chip.functions_per_s if chip.functions_per_s else 0.0,
        byte=1 / (assumption.memory * chip.memory_bytes_per_s),
        launch=assumption.launch * chip.launch_seconds,
    )


def predict(
    kernels: list[Kernel], rates: Rates, collective_seconds: dict[str, float], part: float = 1.0
) -> Timeline:
    """Goes through a program's kernels in the order of its schedule.

    Args:
      kernels: of `kernels_of`.
      rates: of the machine.
      collective_seconds: name of a kernel that is, or starts, a collective -> how long it takes.
      part: of the work of each kernel that is done: a smaller batch of the same program. The
        optimizer does all of its own.
    """
    now = waited = talked = link_free = copies_free = 0.0
    ends, by_limit = {}, collections.Counter()
    of_part = collections.defaultdict(collections.Counter)
    for kernel in kernels:
        # The optimizer's work does not depend on the batch.
        own_part = 1.0 if part_of_model(kernel) == "optimizer" else part
        seconds, limit = rates.seconds(kernel, own_part)
        is_start = kernel.operation.endswith("-start")
        if is_start and kernel.name not in collective_seconds:
            # Of a TPU: a copy into its fast memory, beside computing.
            length = own_part * kernel.bytes * rates.byte * kernel.times
            copies_free = max(copies_free, now) + length
            ends[kernel.name] = copies_free
            continue
        if kernel.operation.endswith("-done"):
            seconds, limit = max(0.0, ends.get(kernel.waits_for, 0.0) - now), "memory"
            if kernel.waits_for in collective_seconds:
                waited, now = waited + seconds, now + seconds
                continue
        elif kernel.name in collective_seconds:
            # One after the other on the links; of a loop all turns are alike.
            length = collective_seconds[kernel.name] * kernel.times
            link_free = max(link_free, now) + length
            talked += length
            if is_start:
                ends[kernel.name] = link_free
                seconds, limit = rates.launch, "launches"
            else:
                waited, now, seconds = waited + link_free - now, link_free, 0.0
        now += seconds * kernel.times
        by_limit[limit] += seconds * kernel.times
        of_part[part_of_model(kernel)][limit] += seconds * kernel.times
    by_part = {
        name: (sum(limits.values()), limits.most_common(1)[0][0])
        for name, limits in of_part.items()
    }
    return Timeline(now - waited, waited, talked, dict(by_limit), by_part)


def part_of_model(kernel: Kernel) -> str:
    """Where a kernel comes from, layers of one kind together: `joint_#/mlp, backward`."""
    if not kernel.source:
        return "of no part"
    phase = phase_of(kernel.source, kernel.name)
    if phase in ("optimizer", "all-reduce"):
        return phase
    words = [word for word in kernel.source.split("/")[:-1] if "(" not in word]
    words = [re.sub(r"\d+", "#", word) for word in words if word not in ("shard_map", "while")]
    return f"{'/'.join(words[:2]) or 'model'}, {phase}"


def collective_seconds(
    collectives: dict[str, Collective], chip: Accelerator, assumption: Assumption
) -> dict[str, float]:
    """Of each collective of a program, by its name; one of a single chip takes no time."""
    seconds = lambda x: assumption.latency + x.seconds(chip) / assumption.link
    return {name: seconds(x) if x.group > 1 else 0.0 for name, x in collectives.items()}
