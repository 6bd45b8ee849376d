"""The batch plan as a pure function of the step, and the batches gathered from it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import batching
from data_pipelines.batch_plan import (
    MAX_BUCKETS,
    BatchPlan,
    Sizes,
    buckets_with_limits,
    choose_buckets,
)
from data_pipelines.edges import rows_of
from data_pipelines.errors import UserError


def sizes_of(nodes):
    nodes = np.asarray(nodes)
    return Sizes(nodes, nodes + 1)


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.lists(st.integers(1, 29), min_size=1, max_size=200),
    batch_size=st.integers(1, 17),
    seed=st.integers(0, 5),
)
def test_an_epoch_visits_every_graph_once(nodes, batch_size, seed):
    sizes = sizes_of(nodes)
    buckets = choose_buckets(sizes)
    plan = BatchPlan(sizes, np.arange(len(nodes)), buckets, batch_size, seed)
    for epoch in (0, 3):
        first = epoch * plan.steps_per_epoch
        rows = [plan[first + k] for k in range(plan.steps_per_epoch)]
        seen = np.concatenate([graphs for _, graphs in rows])
        assert sorted(seen[seen >= 0]) == list(range(len(nodes)))
        for bucket, graphs in rows:
            assert len(graphs) == batch_size
            real = graphs[graphs >= 0]
            assert (sizes.num_nodes[real] <= buckets[bucket].num_nodes).all()
            assert (sizes.num_edges[real] <= buckets[bucket].num_edges).all()


@settings(max_examples=40, deadline=None)
@given(nodes=st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_chosen_buckets_waste_least(nodes):
    """Against trying every choice of at most 3 limits."""
    import itertools

    sizes = sizes_of(nodes)

    def slots(limits):
        return sum(min(limit for limit in limits if limit >= n) for n in nodes)

    distinct = sorted(set(nodes))
    best = min(
        slots((*choice, distinct[-1]))
        for k in range(3)
        for choice in itertools.combinations(distinct, k)
    )
    assert slots([b.num_nodes for b in choose_buckets(sizes, 3)]) == best


def test_the_order_depends_on_nothing_but_its_arguments():
    sizes = sizes_of(np.random.RandomState(0).randint(3, 30, 500))
    make = lambda **kw: BatchPlan(
        **dict(
            sizes=sizes, graphs=np.arange(400), buckets=choose_buckets(sizes), batch_size=16, seed=1
        )
        | kw
    )
    a, b = make(), make()
    for step in (0, 7, 200, 33):  # in any order
        assert a[step][0] == b[step][0]
        np.testing.assert_array_equal(a[step][1], b[step][1])
    assert a.fingerprint() == b.fingerprint()
    for change in ({"seed": 2}, {"batch_size": 8}, {"graphs": np.arange(399)}):
        assert make(**change).fingerprint() != a.fingerprint()


def test_epochs_and_seeds_differ():
    sizes = sizes_of(np.full(64, 9))
    plan = BatchPlan(sizes, np.arange(64), choose_buckets(sizes), 64, 0)
    assert not np.array_equal(plan[0][1], plan[1][1])


def test_order_is_frozen():
    """The order of a data set may never change: a resume years later must continue it."""
    sizes = sizes_of(np.arange(5, 25) // 2)
    plan = BatchPlan(sizes, np.arange(20), choose_buckets(sizes, 2), 4, seed=3)
    got = [[b, *g.tolist()] for b, g in (plan[k] for k in (0, 1, 7))]
    assert got == [[1, 19, -1, -1, -1], [0, 8, 2, 4, 3], [0, 6, 8, 10, 9]]


def test_qm9_sizes_of_the_sample_are_well_filled(dataset):
    plan = BatchPlan(dataset.arrays.sizes, np.arange(500), dataset.buckets, 4, 0)
    assert len(dataset.buckets) <= MAX_BUCKETS
    assert plan.node_efficiency > 0.93


def test_a_molecule_larger_than_the_largest_bucket():
    sizes = sizes_of([5, 9, 12])
    with pytest.raises(UserError, match="number 2 of the data set, has 12 nodes.*holds 10"):
        BatchPlan(sizes, np.arange(3), buckets_with_limits(sizes, (6, 10)), 2, 0)


def test_too_many_buckets():
    with pytest.raises(UserError, match="7 buckets"):
        buckets_with_limits(sizes_of([5]), range(1, 8))


@pytest.mark.parametrize("limit", [0, -3, "9"])
def test_buckets_that_hold_nothing(limit):
    with pytest.raises(UserError, match=f"A number of config.data.buckets is {limit}, but must"):
        buckets_with_limits(sizes_of([5]), (limit, 9))


# --- gathering ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [range(0, 12), range(5, 12)])
def test_batches_hold_what_the_plan_says(dataset, steps):
    arrays = dataclasses.replace(dataset.arrays, dtype=np.dtype(np.float32))
    plan = BatchPlan(arrays.sizes, dataset.split["train"], dataset.buckets, 8, 0)
    found = list(batching.batches(arrays, plan, slice(0, 8), steps, num_threads=2))
    assert len(found) == len(steps)
    for step, (bucket, batch) in zip(steps, found, strict=True):
        assert bucket == plan[step][0]
        for row, g in enumerate(plan[step][1]):
            assert batch.graph_mask[row] == (g >= 0)
            n = int(batch.node_mask[row].sum())
            e = int(batch.edge_mask[row].sum())
            assert not batch.position[row, n:].any() and not batch.edge_type[row, e:].any()
            if g < 0:
                assert n == e == batch.index[row] == 0
                continue
            atoms = slice(arrays.node_offset[g], arrays.node_offset[g + 1])
            edges = rows_of(arrays.edges, np.array([g]))
            np.testing.assert_array_equal(batch.position[row, :n], arrays.position[atoms])
            np.testing.assert_array_equal(batch.atomic_number[row, :n], arrays.atomic_number[atoms])
            np.testing.assert_array_equal(batch.senders[row, :e], edges[:, 0])
            np.testing.assert_array_equal(batch.receivers[row, :e], edges[:, 1])
            np.testing.assert_array_equal(batch.edge_type[row, :e], edges[:, 2])
            for name, label in arrays.graph_labels.items():
                assert batch.labels[name][row] == np.float32(label[g])
            assert batch.index[row] == arrays.index[g]


def test_features_of_nodes_and_graphs_are_gathered_and_padded(dataset):
    arrays = dataset.arrays
    rng = np.random.default_rng(0)
    feature, of_graph = rng.normal(size=(len(arrays.position), 3)), rng.normal(size=(500, 2))
    more = dataclasses.replace(
        arrays, node_feature=feature, graph_feature=of_graph, dtype=np.dtype(np.float32)
    )
    batch = batching.gather(more, np.array([7, -1, 3]), dataset.buckets[-1])
    assert batch.node_feature.dtype == batch.graph_feature.dtype == np.float32
    for row, g in enumerate((7, -1, 3)):
        atoms = slice(*arrays.node_offset[g : g + 2]) if g >= 0 else slice(0)
        n = len(feature[atoms])
        np.testing.assert_array_equal(batch.node_feature[row, :n], feature[atoms].astype("f4"))
        assert not batch.node_feature[row, n:].any()
        expected = of_graph[g].astype("f4") if g >= 0 else 0
        np.testing.assert_array_equal(batch.graph_feature[row], expected)
    plain = batching.gather(arrays, np.array([7]), dataset.buckets[-1])
    assert plain.node_feature is None and plain.graph_feature is None


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_slices_of_processes_make_the_global_batch(dataset, num_processes):
    plan = BatchPlan(dataset.arrays.sizes, dataset.split["train"], dataset.buckets, 8, 0)
    size = 8 // num_processes
    parts = [
        list(batching.batches(dataset.arrays, plan, slice(k, k + size), range(6)))
        for k in range(0, 8, size)
    ]
    for step in range(6):
        joined = np.concatenate([part[step][1].index for part in parts])
        graphs = plan[step][1]
        np.testing.assert_array_equal(
            joined, np.where(graphs >= 0, dataset.arrays.index[graphs], 0)
        )
