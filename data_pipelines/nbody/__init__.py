"""N-body systems: where will charged particles, or particles on springs, be, and how fast?"""

import numpy as np

from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import Dataset, make_buckets
from data_pipelines.errors import UserError, check_known
from data_pipelines.nbody import preparation
from data_pipelines.nbody.protocols import get_protocol
from data_pipelines.targets import Target

DEFAULTS = {
    "targets": ("position",),  # position | velocity, or both
    "protocol": "egnn",  # egnn | blog (the DEMETAr post's) | fuchs | general
    "general": {  # what protocol "general" simulates
        "num_particles": 20,
        "interaction": "charged",  # charged | springs
        "horizon_steps": 500,  # of the simulator, from input to target
        "num_train": 2_000,
        "num_validation": 500,
        "num_test": 500,
        "seed": 0,
    },
}

# Where the particles are after the horizon and how they move then, in the simulator's units.
# Neither shifted nor scaled: that would break the symmetries.
POSITION = Target("position", "length", "x", readout="position", normalization="none", metric="mse")
VELOCITY = Target(
    "velocity", "length / time", "v", readout="velocity", normalization="none", metric="mse"
)
TARGETS = {target.name: target for target in (POSITION, VELOCITY)}


def load(*, protocol, general, targets=("position",), cache_dir: str = "", buckets=()) -> Dataset:
    """N-body systems with the options of `DEFAULTS`, simulated here."""
    chosen = _chosen(targets)
    task = get_protocol(protocol, general)
    systems, passport = preparation.load(task, cache_dir, VELOCITY in chosen)
    labels = {POSITION.name: systems.target, VELOCITY.name: systems.target_velocity}
    num_systems, n, _ = systems.position.shape
    # Charged particles all act on each other; springs are the edges themselves.
    keep_GxP = systems.coupling != 0
    system_E, pair_E = np.nonzero(keep_GxP)
    i, j = np.triu_indices(n, 1)
    flat = lambda x: x.reshape(num_systems * n, *x.shape[2:])
    arrays = GraphArrays(
        index=np.arange(1, num_systems + 1, dtype=np.int32),
        node_offset=np.arange(num_systems + 1) * n,
        atomic_number=np.ones(num_systems * n, np.uint8),
        position=flat(systems.position),
        edge_offset=np.concatenate([[0], np.cumsum(np.bincount(system_E, minlength=num_systems))]),
        edges=np.stack([i[pair_E], j[pair_E], np.zeros_like(pair_E)], 1).astype(np.uint16),
        node_labels={target.name: flat(labels[target.name]) for target in chosen},
        velocity=flat(systems.velocity),
        charge=flat(systems.charge),
    )
    split = preparation.split_of(task)
    return Dataset(
        name="nbody",
        items="systems",
        elements=(1,),
        arrays=arrays,
        targets=chosen,
        split=split,
        split_name=protocol,
        buckets=make_buckets(arrays, buckets),
        passport=passport,
        about={
            "data": f"nbody {protocol}: {task.about}; {n} particles, {task.interaction}, "
            f"{task.horizon_steps} steps ahead, content {passport['content_sha256'][:12]}",
        },
        model_facts={"horizon": task.horizon},
        baselines=_baselines(systems, chosen, task.horizon, split["train"]),
    )


def _chosen(names) -> tuple[Target, ...]:
    """The targets of these names, in their order."""
    for name in names:
        check_known("config.data.targets", name, TARGETS)
    if not names or len(set(names)) < len(names):
        raise UserError(f"config.data.targets ({', '.join(names)}) must name each target once.")
    return tuple(TARGETS[name] for name in names)


def _baselines(
    systems: preparation.SystemArrays,
    targets: tuple[Target, ...],
    horizon: float,
    train: np.ndarray,
):
    """No motion, free flight, and the best linear map of x and v about the centre of mass.

    The linear map is fitted by least squares over training, for each target.
    """
    after = {POSITION.name: systems.target, VELOCITY.name: systems.target_velocity}

    def parts(graphs, target: Target):
        """Target, position, velocity relative to the moving centre of mass; and its velocity."""
        x, v, y = (a[graphs] for a in (systems.position, systems.velocity, after[target.name]))
        x_com, v_com = x.mean(axis=1, keepdims=True), v.mean(axis=1, keepdims=True)
        y = y - x_com - horizon * v_com if target is POSITION else y - v_com
        return y, x - x_com, v - v_com, v_com

    def errors(graphs: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        found = {"no_motion": {}, "free_flight": {}, "linear": {}}
        for target in targets:
            y, x, v, _ = parts(train, target)
            columns = np.stack([x.ravel(), v.ravel()], axis=1)
            weights, *_ = np.linalg.lstsq(columns, y.ravel(), rcond=None)
            y, x, v, v_com = parts(graphs, target)
            moves = target is POSITION
            predictions = {
                "no_motion": x - horizon * v_com if moves else -v_com,
                "free_flight": x + horizon * v if moves else v,
                "linear": weights[0] * x + weights[1] * v,
            }
            for name, prediction in predictions.items():
                found[name][target.name] = prediction - y
        return found

    return errors
