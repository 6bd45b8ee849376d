"""Initial states of N-body systems: the draws of three official generators, in their order.

One stream of NumPy's legacy generator gives all systems of a task, one after the other, so what a
generator draws and does not use is drawn here too.
"""

import dataclasses

import numpy as np

from data_pipelines.nbody.protocols import SAMPLE_EVERY, Protocol

_SPEED = 0.5  # of every charged particle, or particle on springs, at the start


@dataclasses.dataclass(frozen=True)
class Start:
    """Initial state of one system or, with a leading axis G, of several.

    Attributes:
      position: [N, 3] float64.
      velocity: [N, 3] float64.
      charge: [N] float64, +1 or -1; 1 where springs or gravity act.
      spring: [pairs] bool, whether a spring joins i and j, in the order of
        `np.triu_indices(N, 1)`; None where there are none.
    """

    position: np.ndarray
    velocity: np.ndarray
    charge: np.ndarray
    spring: np.ndarray | None = None

    def __getitem__(self, part: slice) -> "Start":
        """Some of several systems."""
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(Start)}
        return Start(**{k: None if v is None else v[part] for k, v in columns.items()})


def draw_all(protocol: Protocol) -> Start:
    """Initial states of the systems used, drawing also those that are not."""
    rng = np.random.RandomState(protocol.seed)
    kept = []
    for drawn, used in zip(protocol.draws, protocol.uses, strict=True):
        for number in range(drawn):
            system = draw(rng, protocol)
            if number < used:
                kept.append(system)
    return stack(kept)


def stack(systems: list[Start]) -> Start:
    """Several systems as one."""
    columns = {
        field.name: [getattr(system, field.name) for system in systems]
        for field in dataclasses.fields(Start)
    }
    return Start(**{k: None if v[0] is None else np.stack(v) for k, v in columns.items()})


def draw(rng: np.random.RandomState, protocol: Protocol) -> Start:
    """The next system of a stream."""
    return _GENERATORS[protocol.generator](rng, protocol)


def _kipf(rng: np.random.RandomState, protocol: Protocol) -> Start:
    """Kipf et al. (2018), as EGNN (Satorras et al. 2021) and the DEMETAr post use it."""
    n = protocol.num_particles
    if protocol.interaction == "charged":
        charge = rng.choice([-1.0, 0.0, 1.0], size=(n, 1), p=[0.5, 0.0, 0.5])[:, 0]
        spring = None
    else:
        charge = np.ones(n)
        spring = rng.choice([0.0, 1.0], size=n * (n - 1) // 2) > 0
    size = (n / 5.0) ** (1 / 3)  # as dense as five are
    position_3xN = rng.randn(3, n) * size
    velocity_3xN = rng.randn(3, n)
    velocity_3xN = velocity_3xN * _SPEED / np.sqrt((velocity_3xN**2).sum(axis=0))
    # The official generator has walls at 5 for the initial state alone.
    reflect(position_3xN, velocity_3xN, 5.0 * size)
    # Observation noise of strength 0, which the official generator draws all the same.
    frames = protocol.length // SAMPLE_EVERY - 1
    rng.randn(2 * frames * 3 * n)
    return Start(position_3xN.T, velocity_3xN.T, charge, spring)


def _glad(rng: np.random.RandomState, protocol: Protocol) -> Start:
    """GMN (Huang et al. 2022), as HEGNN and FastEGNN use it, isolated particles alone."""
    n = protocol.num_particles
    charge = rng.choice([1.0, -1.0], size=(n, 1))[:, 0]
    position_Nx3 = rng.randn(n, 3) * ((n / 5) ** (1 / 3) + 0.1)
    velocity_Nx3 = rng.randn(n, 3)
    velocity_Nx3 = velocity_Nx3 / np.sqrt((velocity_Nx3**2).sum(axis=-1))[:, None] * _SPEED
    for rest in range(n, 0, -1):  # the official generator numbers its particles one by one
        rng.permutation(rest)
    return Start(position_Nx3, velocity_Nx3, charge)


def _segnn(rng: np.random.RandomState, protocol: Protocol) -> Start:
    """SEGNN's gravity (Brandstetter et al. 2022): the mean velocity is taken away."""
    n = protocol.num_particles
    position_Nx3, velocity_Nx3 = rng.randn(n, 3), rng.randn(n, 3)
    for _ in range(3):  # noise of strength 0 on each frame's positions, velocities and forces
        rng.randn(protocol.length // SAMPLE_EVERY, n, 3)
    return Start(position_Nx3, velocity_Nx3 - velocity_Nx3.mean(axis=0), np.ones(n))


_GENERATORS = {"kipf": _kipf, "glad": _glad, "segnn": _segnn}


def reflect(x: np.ndarray, v: np.ndarray, box: float) -> None:
    """Walls at +-box: what is past one comes back with its velocity turned inwards."""
    over, under = x > box, x < -box
    if over.any() or under.any():
        x[over], v[over] = 2 * box - x[over], -np.abs(v[over])
        x[under], v[under] = -2 * box - x[under], np.abs(v[under])
