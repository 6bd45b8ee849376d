"""N-body systems: where will charged particles, or particles on springs, be?"""

import numpy as np

from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import Dataset, make_buckets
from data_pipelines.nbody import preparation
from data_pipelines.nbody.protocols import get_protocol
from data_pipelines.targets import Target

DEFAULTS = {
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

# Where the particles are after the horizon, in the simulator's length. Neither shifted nor scaled:
# that would break the symmetries.
POSITION = Target("position", "length", "x", readout="position", normalization="none", metric="mse")


def load(*, protocol, general, cache_dir: str = "", buckets=()) -> Dataset:
    """N-body systems with the options of `DEFAULTS`, simulated here."""
    task = get_protocol(protocol, general)
    systems, passport = preparation.load(task, cache_dir)
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
        node_labels={POSITION.name: flat(systems.target)},
        velocity=flat(systems.velocity),
        charge=flat(systems.charge),
    )
    split = preparation.split_of(task)
    return Dataset(
        name="nbody",
        items="systems",
        elements=(1,),
        arrays=arrays,
        targets=(POSITION,),
        split=split,
        split_name=protocol,
        buckets=make_buckets(arrays, buckets),
        passport=passport,
        about={
            "data": f"nbody {protocol}: {task.about}; {n} particles, {task.interaction}, "
            f"{task.horizon_steps} steps ahead, content {passport['content_sha256'][:12]}",
        },
        model_facts={"horizon": task.horizon},
        baselines=_baselines(systems, task.horizon, split["train"]),
    )


def _baselines(systems: preparation.SystemArrays, horizon: float, train: np.ndarray):
    """No motion, free flight, and the best linear map of x and v about the centre of mass.

    The linear map is fitted by least squares over training.
    """

    def parts(graphs):
        """Target, position, velocity relative to the moving centre of mass; and its velocity."""
        x, v, y = (a[graphs] for a in (systems.position, systems.velocity, systems.target))
        x_com, v_com = x.mean(axis=1, keepdims=True), v.mean(axis=1, keepdims=True)
        return y - x_com - horizon * v_com, x - x_com, v - v_com, v_com

    def errors(graphs: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        y, x, v, _ = parts(train)
        columns = np.stack([x.ravel(), v.ravel()], axis=1)
        weights, *_ = np.linalg.lstsq(columns, y.ravel(), rcond=None)
        y, x, v, v_com = parts(graphs)
        predictions = {
            "no_motion": x - horizon * v_com,
            "free_flight": x + horizon * v,
            "linear": weights[0] * x + weights[1] * v,
        }
        return {name: {POSITION.name: p - y} for name, p in predictions.items()}

    return errors
