"""Charged particles and springs: the N-body tasks, simulated here in float64.

Several tasks in the literature share the name "N-body"; they differ in horizon, generator
and size, and their errors must never share a column. Each is one row of `PROTOCOLS`.

The simulator is that of Kipf et al. (2018), as EGNN (Satorras et al. 2021) and the seed use
it: semi-implicit Euler with dt = 0.001, unit masses and unit interaction strength,

    charged:  F_i = sum_j q_i q_j (x_i - x_j) / |x_i - x_j|^3
    springs:  F_i = -0.1 sum_j s_ij (x_i - x_j)

each component of F clipped at 100. A saved velocity is the one that led to the saved
position, half a step behind it. Units are the simulator's own.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib

import numpy as np
from tqdm import tqdm

from data_pipelines.errors import UserError, suggest
from data_pipelines.prepared import default_cache_dir, prepare, write
from data_pipelines.splits import PARTS

_PREPARATION_VERSION = 1  # raise it when prepared folders of before must not be used
DT = 0.001
_MAX_FORCE = 0.1 / DT
_SPEED = 0.5  # of every particle at the start
_SPRING_STRENGTH = 0.1
_SAMPLE_EVERY = 100  # steps between the frames of the official files
INTERACTIONS = ("charged", "springs")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One N-body task.

    Attributes:
      seed: of NumPy's legacy generator.
      draws: how many systems are drawn for train, validation and test, in this order.
      uses: how many of each, from the first, are kept.
      input_step: simulator step of the input frame.
      horizon_steps: from input to target.
      length: steps of the simulation in the official files; decides how many random numbers
        a system draws.
      num_particles: N.
      interaction: `charged` or `springs`.
      box: half the side of a cube with reflecting walls; 0: none.
      about: where it comes from; words for a person, no part of its identity.
    """

    seed: int
    draws: tuple[int, int, int]
    uses: tuple[int, int, int]
    input_step: int
    horizon_steps: int
    length: int
    num_particles: int = 5
    interaction: str = "charged"
    box: float = 0.0
    about: str = dataclasses.field(default="", compare=False)

    @property
    def identity(self) -> dict:
        """What decides the numbers, as JSON."""
        fields = dataclasses.asdict(self)
        return json.loads(json.dumps({key: fields[key] for key in fields if key != "about"}))

    @property
    def horizon(self) -> float:
        """From input to target, in the simulator's time."""
        return self.horizon_steps * DT


PROTOCOLS = {
    "egnn": Protocol(
        seed=43,
        draws=(10_000, 2_000, 2_000),
        uses=(3_000, 2_000, 2_000),
        input_step=3_100,  # frame 30; the target is frame 40
        horizon_steps=1_000,
        length=5_000,
        about="EGNN's nbody_small, first 3000 training systems, frames 30 to 40",
    ),
    "blog": Protocol(
        seed=42,
        draws=(3_000, 2_000, 2_000),
        uses=(3_000, 2_000, 2_000),
        input_step=700,  # frame 6; the target is frame 8
        horizon_steps=200,
        length=1_000,
        about="the seed's task, frames 6 to 8; its own draws cannot be repeated: regenerated",
    ),
    "fuchs": Protocol(
        seed=42,
        draws=(5_000, 1_000, 1_000),
        uses=(5_000, 1_000, 1_000),
        input_step=3_100,
        horizon_steps=500,
        length=5_000,
        box=5.0,
        about="SE(3)-Transformer's sizes and horizon; its data were never released: regenerated "
        "with the walls of its public generator, frames 30 to 35; positions only",
    ),
}
GENERAL = "general"  # the protocol whose fields the config names itself


def general_protocol(
    *,
    num_particles: int,
    interaction: str,
    horizon_steps: int,
    num_train: int,
    num_validation: int,
    num_test: int,
    seed: int,
) -> Protocol:
    """A task of one's own: the input is the state after 100 steps."""
    if not 2 <= num_particles <= 255:
        raise UserError(
            f"config.data.general.num_particles ({num_particles}) must be from 2 to 255."
        )
    if interaction not in INTERACTIONS:
        raise UserError(
            f"Unknown config.data.general.interaction {interaction!r}."
            f"{suggest(interaction, INTERACTIONS)} Known: {', '.join(INTERACTIONS)}."
        )
    sizes = (num_train, num_validation, num_test)
    if min(sizes) < 1 or horizon_steps < 1:
        raise UserError(
            f"config.data.general asks for {sizes} systems and {horizon_steps} steps: every "
            "number must be at least 1."
        )
    return Protocol(
        seed=seed,
        draws=sizes,
        uses=sizes,
        input_step=_SAMPLE_EVERY,
        horizon_steps=horizon_steps,
        length=_SAMPLE_EVERY + horizon_steps,
        num_particles=num_particles,
        interaction=interaction,
        about="general: by config",
    )


def get_protocol(name: str, general: dict) -> Protocol:
    """The row of `PROTOCOLS`, or for `general` the one that its own options describe."""
    if name == GENERAL:
        return general_protocol(**general)
    if name not in PROTOCOLS:
        known = (*PROTOCOLS, GENERAL)
        raise UserError(
            f"Unknown config.data.protocol {name!r}.{suggest(name, known)} "
            f"Known: {', '.join(known)}."
        )
    return PROTOCOLS[name]


@dataclasses.dataclass(frozen=True)
class SystemArrays:
    """All systems of a task, train, validation and test one after the other.

    Attributes:
      position: [G, N, 3] float64, at the input.
      velocity: [G, N, 3] float64, at the input.
      charge: [G, N] float64, +1 or -1; 1 where springs act.
      target: [G, N, 3] float64, positions at the target.
      coupling: [G, pairs] float64, q_i q_j or whether a spring joins i and j; pairs in the
        order of `np.triu_indices(N, 1)`.
    """

    position: np.ndarray
    velocity: np.ndarray
    charge: np.ndarray
    target: np.ndarray
    coupling: np.ndarray


def load(protocol: Protocol, cache_dir: str = "") -> tuple[SystemArrays, dict]:
    """The simulated systems and their passport, simulating them first where needed."""
    text = f"{_PREPARATION_VERSION}:{json.dumps(protocol.identity)}"
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = pathlib.Path(cache_dir or default_cache_dir()) / "nbody" / key
    arrays, passport = prepare(folder, lambda building: _build(protocol, building), "100 MB")
    return SystemArrays(**arrays), passport


def split_of(protocol: Protocol) -> dict[str, np.ndarray]:
    """Positions of the systems of each part."""
    ends = np.cumsum(protocol.uses)
    return {
        part: np.arange(end - used, end)
        for part, end, used in zip(PARTS, ends, protocol.uses, strict=True)
    }


# --- preparing ---------------------------------------------------------------------------------


def _build(protocol: Protocol, folder: pathlib.Path) -> None:
    start = _draw_all(protocol)
    position, velocity, target = simulate(
        start["position"],
        start["velocity"],
        start["coupling"],
        protocol.input_step,
        protocol.horizon_steps,
        protocol.interaction,
        protocol.box,
    )
    arrays = {
        "position": position,
        "velocity": velocity,
        "charge": start["charge"],
        "target": target,
        "coupling": start["coupling"],
    }
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"The simulation gave a {name} that is not finite: {protocol}.")
    digest = hashlib.sha256()
    for name in ("position", "velocity", "charge", "target"):
        # Rounded: sums in another order differ in the last bits. (Systems whose encounters
        # amplify those differ all the same, and then the data are others: see `_run`.)
        digest.update(np.round(arrays[name], 3).astype("<f4").tobytes())
    passport = {
        "dataset": "nbody",
        "preparation_version": _PREPARATION_VERSION,
        "protocol": protocol.identity,
        "systems": dict(zip(PARTS, protocol.uses, strict=True)),
        "units": "of the simulator: unit mass, unit interaction strength",
        "content_sha256": digest.hexdigest(),
    }
    write(folder, arrays, passport)


def _draw_all(protocol: Protocol) -> dict[str, np.ndarray]:
    """Initial states of the systems used, drawing also those that are not."""
    rng = np.random.RandomState(protocol.seed)
    kept = []
    for drawn, used in zip(protocol.draws, protocol.uses, strict=True):
        for number in range(drawn):
            system = _draw(rng, protocol)
            if number < used:
                kept.append(system)
    names = ("charge", "position", "velocity", "coupling")
    return {
        name: np.stack(column) for name, column in zip(names, zip(*kept, strict=True), strict=True)
    }


def _draw(rng: np.random.RandomState, protocol: Protocol) -> tuple[np.ndarray, ...]:
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
    frames = protocol.length // _SAMPLE_EVERY - 1
    rng.randn(2 * frames * 3 * n)
    return charge, position_3xN.T, velocity_3xN.T, coupling


def simulate(
    position_GxNx3: np.ndarray,
    velocity_GxNx3: np.ndarray,
    coupling_GxP: np.ndarray,
    input_step: int,
    horizon_steps: int,
    interaction: str = "charged",
    box: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs all systems: position and velocity at the input, position at the target.

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
                results.append((*states[0], states[1][0]))
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
