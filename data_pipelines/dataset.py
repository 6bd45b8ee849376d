"""A data set as training sees it: graphs with edges and targets, a split, buckets, a passport."""

import dataclasses

import numpy as np

from data_pipelines.batch_plan import MAX_BUCKETS, Bucket, buckets_with_limits, choose_buckets
from data_pipelines.batching import GraphArrays
from data_pipelines.edges import build_edges
from data_pipelines.errors import UserError, suggest
from data_pipelines.nbody import simulation
from data_pipelines.qm9 import preparation
from data_pipelines.splits import get_split
from data_pipelines.targets import POSITION, Target, get_targets, reported_values


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What `load_dataset` gives.

    Attributes:
      name: of the data set.
      items: what its graphs are called, "molecules" or "systems".
      arrays: all graphs; targets in reported units, atom references subtracted, float64.
      targets: rows of the table of targets, in the order of `arrays.target`'s columns; one,
        `POSITION`, where every node has its own.
      split: positions of the graphs of `train`, `validation` and `test`.
      split_name: as results name it.
      buckets: the compiled shapes, ascending; enough for every graph.
      passport: counts, ids, units and hashes.
      about: lines for a person: name -> text.
      horizon: time from input to target, for particles.
    """

    name: str
    items: str
    arrays: GraphArrays
    targets: tuple[Target, ...]
    split: dict[str, np.ndarray]
    split_name: str
    buckets: tuple[Bucket, ...]
    passport: dict
    about: dict[str, str]
    horizon: float | None = None

    @property
    def metric(self) -> str:
        """`mae` or `mse`: the error that is reported and that chooses the best weights."""
        return self.targets[0].metric


def load_dataset(*, name: str, **options) -> Dataset:
    """Loads (preparing it first where needed) what the group `config.data` names."""
    if name not in _LOADERS:
        raise UserError(
            f"Unknown config.data.name {name!r}.{suggest(name, _LOADERS)} "
            f"Known: {', '.join(_LOADERS)}."
        )
    return _LOADERS[name](**options)


def _load_qm9(
    *, source, path, cache_dir, targets, split, edges, edge_cutoff, buckets, **_
) -> Dataset:
    rows = get_targets(targets)
    molecules, passport = preparation.load(source, path, cache_dir)
    parts = get_split(split, molecules.index)
    edge_offset, edge_rows = build_edges(molecules, edges, edge_cutoff)
    arrays = GraphArrays(
        index=molecules.index,
        node_offset=molecules.node_offset,
        atomic_number=molecules.atomic_number,
        position=molecules.position,
        edge_offset=edge_offset,
        edges=edge_rows,
        target=reported_values(rows, molecules.properties, molecules.composition()),
    )
    bonds = passport["smiles_and_geometry"]
    about = {
        "data": f"qm9 from {passport['source']}: {passport['molecules']} molecules, content "
        f"{passport['content_sha256'][:12]}",
        "bonds": f"SMILES and geometry agree for {bonds['agree']} molecules; the SMILES is kept "
        f"for {bonds['heavy_graph_differs']}, distances decide for {bonds['smiles_unusable']}",
    }
    chosen = _buckets(arrays, buckets)
    return Dataset("qm9", "molecules", arrays, rows, parts, split, chosen, passport, about)


def _load_nbody(*, protocol, general, cache_dir, buckets, **_) -> Dataset:
    task = simulation.get_protocol(protocol, general)
    systems, passport = simulation.load(task, cache_dir)
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
        edges=np.stack([i[pair_E], j[pair_E], np.zeros_like(pair_E)], 1).astype(np.uint8),
        target=flat(systems.target),
        velocity=flat(systems.velocity),
        charge=flat(systems.charge),
    )
    about = {
        "data": f"nbody {protocol}: {task.about}; {n} particles, {task.interaction}, "
        f"{task.horizon_steps} steps ahead, content {passport['content_sha256'][:12]}",
    }
    return Dataset(
        "nbody",
        "systems",
        arrays,
        (POSITION,),
        simulation.split_of(task),
        protocol,
        _buckets(arrays, buckets),
        passport,
        about,
        task.horizon,
    )


def _buckets(arrays: GraphArrays, limits) -> tuple[Bucket, ...]:
    if limits:
        return buckets_with_limits(arrays.sizes, limits)
    return choose_buckets(arrays.sizes, MAX_BUCKETS)


_LOADERS = {"qm9": _load_qm9, "nbody": _load_nbody}
