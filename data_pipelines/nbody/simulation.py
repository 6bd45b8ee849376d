"""The simulator: charged particles and springs, in float64, as the official generator runs it.

That of Kipf et al. (2018), as EGNN (Satorras et al. 2021) and the DEMETAr post use it:
semi-implicit Euler with dt = 0.001, unit masses and unit interaction strength,

    charged:  F_i = sum_j q_i q_j (x_i - x_j) / |x_i - x_j|^3
    springs:  F_i = -0.1 sum_j s_ij (x_i - x_j)

each component of F clipped at 100. A saved velocity is the one that led to the saved
position, half a step behind it. Units are the simulator's own.
"""

import concurrent.futures

import numpy as np
from tqdm import tqdm

from data_pipelines.nbody.protocols import DT, SAMPLE_EVERY, Protocol

_MAX_FORCE = 0.1 / DT
_SPEED = 0.5  # of every particle at the start
_SPRING_STRENGTH = 0.1


def draw_all(protocol: Protocol) -> dict[str, np.ndarray]:
    """Initial states of the systems used, drawing also those that are not."""
    rng = np.random.RandomState(protocol.seed)
    kept = []
    for drawn, used in zip(protocol.draws, protocol.uses, strict=True):
        for number in range(drawn):
            system = draw(rng, protocol)
            if number < used:
                kept.append(system)
    names = ("charge", "position", "velocity", "coupling")
    return {
        name: np.stack(column) for name, column in zip(names, zip(*kept, strict=True), strict=True)
    }


def draw(rng: np.random.RandomState, protocol: Protocol) -> tuple[np.ndarray, ...]:
    """One system, with the draws of the official generator in its order."""
    n = protocol.num_particles
    i, j = np.triu_indices(n, 1)
    if protocol.interaction == "charged":
        charge = rng.choice([-1.0, 0.0, 1.0], size=(n, 1), p=[0.5, 0.0, 0.5])[:, 0]
        coupling = charge[i] * charge[j]
    else:
        charge = np.ones(n)
        coupling = rng.choice([0.0, 1.0], size=len(i))
    size = (n / 5.0) ** (1 / 3)  # as dense as five are
    position_3xN = rng.randn(3, n) * size
    velocity_3xN = rng.randn(3, n)
    velocity_3xN = velocity_3xN * _SPEED / np.sqrt((velocity_3xN**2).sum(axis=0))
    # The official generator has walls at 5 for the initial state alone.
    _reflect(position_3xN, velocity_3xN, 5.0 * size)
    # Observation noise of strength 0, which the official generator draws all the same.
    frames = protocol.length // SAMPLE_EVERY - 1
    rng.randn(2 * frames * 3 * n)
    return charge, position_3xN.T, velocity_3xN.T, coupling


def simulate(*arguments, **options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`simulate_all` without the last: position and velocity at the input, and position then."""
    return simulate_all(*arguments, **options)[:3]


def simulate_all(
    position_GxNx3: np.ndarray,
    velocity_GxNx3: np.ndarray,
    coupling_GxP: np.ndarray,
    input_step: int,
    horizon_steps: int,
    interaction: str = "charged",
    box: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs all systems: position and velocity at the input, then both at the target.

    Args:
      position_GxNx3: initial.
      velocity_GxNx3: initial.
      coupling_GxP: q_i q_j or s_ij of each pair i < j.
      input_step: steps to the input.
      horizon_steps: from there to the target.
      interaction: `charged` or `springs`.
      box: half the side of the reflecting cube; 0: no walls.
    """
    save_at = (input_step, input_step + horizon_steps)
    # So many systems at once that the arrays of a step stay in a core's cache; NumPy's loops
    # over them run without the interpreter's lock.
    chunk = max(1, 2_500 // coupling_GxP.shape[1])
    parts = [slice(a, a + chunk) for a in range(0, len(position_GxNx3), chunk)]

    def run(part):
        arrays = (position_GxNx3[part], velocity_GxNx3[part], coupling_GxP[part])
        return _run(*arrays, save_at, interaction, box)

    results = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with tqdm(total=len(position_GxNx3), desc="Simulating", unit=" systems") as progress:
            for states in pool.map(run, parts):
                results.append((*states[0], *states[1]))
                progress.update(len(states[0][0]))
    return tuple(np.concatenate(column) for column in zip(*results, strict=True))


def _run(position, velocity, coupling, save_at, interaction, box):
    """(position, velocity) [g, N, 3] at the steps `save_at` (ascending) of a few systems.

    In some systems close encounters amplify the last bit of a sum to 1e-2 and more. So every
    sum here has the operands, the order and the routine of the official generator (squared
    distances by |a|^2 + |b|^2 - 2 a.b through BLAS, forces summed over the last axis):
    systems come out equal to the official ones, bit for bit, on the same machine.
    """
    n = position.shape[1]
    i, j = np.triu_indices(n, 1)
    pair_NxN = np.zeros((n, n), np.int64)  # which pair (i, j) is; on the diagonal any
    pair_NxN[i, j] = pair_NxN[j, i] = np.arange(len(i))
    sign_NxN = np.sign(np.arange(n)[None] - np.arange(n)[:, None]).astype(float)
    x, v = (a.transpose(0, 2, 1).copy("C") for a in (position, velocity))  # [g, 3, N]

    def acceleration():
        if interaction == "springs":
            strength_gxP = -_SPRING_STRENGTH * coupling
        else:
            square = x * x
            square_gxN = (square[:, 0] + square[:, 1]) + square[:, 2]
            dot_gxNxN = np.matmul(x.transpose(0, 2, 1), x)
            distance2_gxP = (square_gxN[:, i] + square_gxN[:, j]) - 2 * dot_gxNxN[:, i, j]
            strength_gxP = coupling / np.power(distance2_gxP, 3.0 / 2.0)
        force_gx3xP = strength_gxP[:, None] * (x[:, :, i] - x[:, :, j])
        force_gx3xNxN = force_gx3xP.take(pair_NxN, axis=-1) * sign_NxN
        return np.clip(force_gx3xNxN.sum(axis=-1), -_MAX_FORCE, _MAX_FORCE)

    saved = []
    for step in range(1, save_at[-1] + 1):
        v += DT * acceleration()
        x += DT * v
        if box:
            _reflect(x, v, box)
        if step in save_at:
            saved.append((x.transpose(0, 2, 1).copy(), v.transpose(0, 2, 1).copy()))
    return saved


def _reflect(x: np.ndarray, v: np.ndarray, box: float) -> None:
    """Walls at +-box: what is past one comes back with its velocity turned inwards."""
    over, under = x > box, x < -box
    if over.any() or under.any():
        x[over], v[over] = 2 * box - x[over], -np.abs(v[over])
        x[under], v[under] = -2 * box - x[under], np.abs(v[under])
