"""The simulators, in float64: charges, springs and gravity, as the official generators run them.

    charged:  F_i = sum_j q_i q_j (x_i - x_j) / |x_i - x_j|^3
    springs:  F_i = -0.1 sum_j s_ij (x_i - x_j)
    gravity:  F_i = -sum_j (x_i - x_j) / (|x_i - x_j|^2 + 0.1^2)^(3/2)

with unit masses. Charges and springs: semi-implicit Euler with dt = 0.001 and each component of F
clipped at 100 (Kipf et al. 2018; EGNN's, GLAD's and the DEMETAr post's systems). A saved velocity
is the one that led to the saved position, half a step behind it. Gravity: kick, drift, kick with
the same dt, nothing clipped (SEGNN's systems). Units are the simulator's own.
"""

import concurrent.futures
import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipelines.cores import usable_cores
from data_pipelines.nbody.draws import Start, reflect
from data_pipelines.nbody.protocols import DT, Protocol

_MAX_FORCE = 0.1 / DT
_SPRING_STRENGTH = 0.1
_GRAVITY_SOFTENING = 0.1
_CHUNK = 2_500  # pairs computed at once: their arrays stay in a core's cache


@dataclasses.dataclass(frozen=True)
class State:
    """Positions and velocities, [G, N, 3] each, at one step."""

    position: np.ndarray
    velocity: np.ndarray


def simulate(start: Start, protocol: Protocol) -> tuple[State, ...]:
    """Runs all systems: their states at the input and at each target."""
    steps = zip(*simulate_in_parts(start, protocol), strict=True)
    join = lambda states, name: np.concatenate([getattr(state, name) for state in states])
    return tuple(State(join(states, "position"), join(states, "velocity")) for states in steps)


def simulate_in_parts(start: Start, protocol: Protocol) -> Iterator[tuple[State, ...]]:
    """`simulate`, a few systems at a time, in order, on all cores.

    NumPy's loops over a part run without the interpreter's lock.
    """
    pairs = protocol.num_particles * (protocol.num_particles - 1) // 2
    size = max(1, _CHUNK // pairs)
    parts = [slice(a, a + size) for a in range(0, len(start.charge), size)]
    save_at = [protocol.input_step + steps for steps in (0, *protocol.horizon_steps)]
    run = _kick_drift_kick if protocol.interaction == "gravity" else _euler

    def states(part: slice) -> tuple[State, ...]:
        return tuple(run(start[part], save_at, protocol.box))

    with concurrent.futures.ThreadPoolExecutor(len(usable_cores())) as pool:
        yield from pool.map(states, parts)


def _euler(start: Start, save_at: list[int], box: float) -> list[State]:
    """The states at the steps `save_at` (ascending) of a few systems, charged or on springs.

    In some systems close encounters amplify the last bit of a sum to 1e-2 and more. So every
    sum here has the operands, the order and the routine of the official generators (squared
    distances by |a|^2 + |b|^2 - 2 a.b through BLAS, forces summed over the last axis):
    systems come out equal to the official ones, bit for bit, on the same machine.
    """
    n = start.charge.shape[1]
    i, j = np.triu_indices(n, 1)
    # Which pair (i, j) is. On the diagonal any: the vector from a particle to itself is zero.
    pair_NxN = np.zeros((n, n), np.int64)
    pair_NxN[i, j] = pair_NxN[j, i] = np.arange(len(i))
    upper_P = n * i + j  # (i, j) in a matrix whose rows are joined
    x, v = (a.transpose(0, 2, 1).copy("C") for a in (start.position, start.velocity))  # [g, 3, N]
    charge_gxP = start.charge[:, i] * start.charge[:, j]
    # Kept: to get as much memory anew in each step takes longer than to compute.
    force_gx3xNxN = np.empty((*x.shape, n))

    def strength():
        """Of each pair's force along its vector, [g, P]."""
        if start.spring is not None:
            return -_SPRING_STRENGTH * start.spring
        square = x * x
        square_gxN = (square[:, 0] + square[:, 1]) + square[:, 2]
        dot_gxNN = np.matmul(x.transpose(0, 2, 1), x).reshape(len(x), n * n)
        sum_gxP = square_gxN.take(i, axis=-1) + square_gxN.take(j, axis=-1)
        distance2_gxP = sum_gxP - 2 * dot_gxNN.take(upper_P, axis=-1)
        return charge_gxP / np.power(distance2_gxP, 3.0 / 2.0)

    def acceleration():
        np.subtract(x[..., None], x[..., None, :], out=force_gx3xNxN)
        np.multiply(force_gx3xNxN, strength().take(pair_NxN, axis=-1)[:, None], out=force_gx3xNxN)
        return np.clip(force_gx3xNxN.sum(axis=-1), -_MAX_FORCE, _MAX_FORCE)

    saved = []
    for step in range(1, save_at[-1] + 1):
        v += DT * acceleration()
        x += DT * v
        if box:
            reflect(x, v, box)
        if step in save_at:
            saved.append(State(x.transpose(0, 2, 1).copy(), v.transpose(0, 2, 1).copy()))
    return saved


def _kick_drift_kick(start: Start, save_at: list[int], box: float) -> list[State]:
    """The same of a few systems under gravity, which are not chaotic: sums in any order."""
    x, v = start.position.copy(), start.velocity.copy()  # [g, N, 3]

    def acceleration():
        square_gxN = (x * x).sum(axis=-1)
        distance2_gxNxN = square_gxN[:, :, None] + square_gxN[:, None] - 2 * (x @ x.mT)
        distance2_gxNxN += _GRAVITY_SOFTENING**2
        strength_gxNxN = 1 / (distance2_gxNxN * np.sqrt(distance2_gxNxN))
        return strength_gxNxN @ x - strength_gxNxN.sum(axis=-1, keepdims=True) * x

    saved, a = [], acceleration()
    for step in range(1, save_at[-1] + 1):
        v += DT / 2 * a
        x += DT * v
        if box:
            reflect(x, v, box)
        a = acceleration()
        v += DT / 2 * a
        if step in save_at:
            saved.append(State(x.copy(), v.copy()))
    return saved
