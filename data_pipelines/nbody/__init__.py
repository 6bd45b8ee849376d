"""N-body systems: where will charges, particles on springs or masses be, and how fast?"""

import numpy as np

from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import Dataset, make_buckets
from data_pipelines.edges import StoredEdges
from data_pipelines.errors import UserError, check_known
from data_pipelines.nbody import preparation
from data_pipelines.nbody.pairs import edges_of
from data_pipelines.nbody.protocols import get_protocol
from data_pipelines.ranges import NOT_NEGATIVE, check_range
from data_pipelines.targets import Target

DEFAULTS = {
    "targets": ("position",),  # position | velocity, or both
    # egnn | blog (the DEMETAr post's) | fuchs | glad_5, _20, _50, _100 | gravity_100 | general
    "protocol": "egnn",
    # Edges go from each particle to so many nearest; 0: to all that act on it. Springs: only 0.
    "neighbors": 0,
    "general": {  # what protocol "general" simulates
        "num_particles": 20,
        "interaction": "charged",  # charged | springs | gravity
        # Of the simulator, from the input to the target. With several, each system gives one
        # example for each.
        "horizon_steps": (500,),
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


def load(
    *, protocol, neighbors, general, targets=("position",), cache_dir: str = "", buckets=()
) -> Dataset:
    """N-body systems with the options of `DEFAULTS`, simulated here."""
    chosen = _chosen(targets)
    check_range("config.data.neighbors", neighbors, NOT_NEGATIVE)
    task = get_protocol(protocol, general)
    if neighbors and task.interaction == "springs":
        raise UserError(
            f"config.data.neighbors is {neighbors}, but springs pull from afar, and are the edges "
            "themselves: set it to 0."
        )
    systems, passport = preparation.load(task, cache_dir, VELOCITY in chosen)
    # One graph for each target of each system.
    num_targets = len(task.horizons)
    each = lambda x: None if x is None else x.repeat(num_targets, axis=0)
    horizon_G = np.tile(task.horizons, len(systems.position))
    of_nodes = {POSITION.name: systems.target, VELOCITY.name: systems.target_velocity}
    arrays = arrays_of(
        each(systems.position),
        each(systems.velocity),
        each(systems.charge),
        edges_of(each(systems.position), each(systems.spring), neighbors),
        node_labels={target.name: of_nodes[target.name].reshape(-1, 3) for target in chosen},
        graph_feature=horizon_G[:, None] if num_targets > 1 else None,
    )
    split = {
        part: (systems_g[:, None] * num_targets + np.arange(num_targets)).ravel()
        for part, systems_g in preparation.split_of(task).items()
    }
    steps = " and ".join(map(str, task.horizon_steps))
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
            "data": f"nbody {protocol}: {task.about}; {task.num_particles} particles, "
            f"{task.interaction}, "
            f"{steps} steps ahead, content {passport['content_sha256'][:12]}",
            "edges": f"each to its {neighbors} nearest" if neighbors else "all that act",
        },
        model_facts={"horizon": task.horizons[-1]},
        baselines=_baselines(arrays, chosen, horizon_G, split["train"]),
    )


def arrays_of(
    position_GxNx3: np.ndarray,
    velocity_GxNx3: np.ndarray,
    charge_GxN: np.ndarray,
    edges: tuple[np.ndarray, np.ndarray],
    **more,
) -> GraphArrays:
    """Systems of as many particles each as the arrays that batches are gathered from.

    Args:
      position_GxNx3: at the input.
      velocity_GxNx3: at the input.
      charge_GxN: of each particle.
      edges: of `edges_of`.
      **more: other fields of `GraphArrays`.
    """
    number, n = charge_GxN.shape
    return GraphArrays(
        index=np.arange(1, number + 1, dtype=np.int32),
        node_offset=np.arange(number + 1) * n,
        atomic_number=np.ones(number * n, np.uint8),
        position=position_GxNx3.reshape(-1, 3),
        edges=StoredEdges(*edges),
        velocity=velocity_GxNx3.reshape(-1, 3),
        charge=charge_GxN.ravel(),
        **more,
    )


def _chosen(names) -> tuple[Target, ...]:
    """The targets of these names, in their order."""
    for name in names:
        check_known("config.data.targets", name, TARGETS)
    if not names or len(set(names)) < len(names):
        raise UserError(f"config.data.targets ({', '.join(names)}) must name each target once.")
    return tuple(TARGETS[name] for name in names)


def _baselines(
    arrays: GraphArrays, targets: tuple[Target, ...], horizon_G: np.ndarray, train: np.ndarray
):
    """No motion, free flight, and the best linear map of x and v about the centre of mass.

    The linear map is fitted by least squares over training, for each target and horizon.
    """
    shape = (len(horizon_G), -1, 3)

    def parts(graphs, target: Target):
        """Target, position, velocity relative to the moving centre of mass; and its velocity."""
        columns = (arrays.position, arrays.velocity, arrays.node_labels[target.name])
        x, v, y = (column.reshape(shape)[graphs] for column in columns)
        x_com, v_com = x.mean(axis=1, keepdims=True), v.mean(axis=1, keepdims=True)
        y = y - x_com - time_of(graphs) * v_com if target is POSITION else y - v_com
        return y, x - x_com, v - v_com, v_com

    def time_of(graphs):
        return horizon_G[graphs][:, None, None]

    def linear(graphs, target: Target, x, v):
        """Of each horizon its own map."""
        found = np.zeros_like(x)
        for horizon in np.unique(horizon_G):
            y_t, x_t, v_t, _ = parts(train[horizon_G[train] == horizon], target)
            columns = np.stack([x_t.ravel(), v_t.ravel()], axis=1)
            weights, *_ = np.linalg.lstsq(columns, y_t.ravel(), rcond=None)
            here = horizon_G[graphs] == horizon
            found[here] = weights[0] * x[here] + weights[1] * v[here]
        return found

    def errors(graphs: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        found = {"no_motion": {}, "free_flight": {}, "linear": {}}
        for target in targets:
            y, x, v, v_com = parts(graphs, target)
            moves = target is POSITION
            predictions = {
                "no_motion": x - time_of(graphs) * v_com if moves else -v_com,
                "free_flight": x + time_of(graphs) * v if moves else v,
                "linear": linear(graphs, target, x, v),
            }
            for name, prediction in predictions.items():
                found[name][target.name] = prediction - y
        return found

    return errors
