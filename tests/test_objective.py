"""Normalisation, losses and metrics: by hand, over padding, with labels that are missing."""

import csv
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import batching
from data_pipelines.batch_plan import Bucket
from data_pipelines.batching import GraphArrays
from data_pipelines.dataset import Dataset, training_mean
from data_pipelines.edges import StoredEdges
from data_pipelines.errors import UserError
from data_pipelines.targets import Target
from demetar import evaluate
from demetar.training.evaluator import Outcome
from demetar.training.measures import MEASURES
from demetar.training.objective import (
    Normalization,
    TargetErrors,
    make_objective,
    standardize,
)
from demetar.training.progress import Window
from demetar.training.result import result_of

ENERGY = Target("energy", "eV", extensive=True)
GAP = Target("gap", "eV", readout="cls")
CHARGE = Target("charge", "e", readout="node")
FORCE = Target("force", "eV/A", readout="node", normalization="scale")
TARGETS = (ENERGY, GAP, CHARGE, FORCE)


def labelled_arrays(num_graphs=6, missing=(), seed=0):
    """Graphs of 2 to 4 atoms with labels of four kinds; `missing` graphs have none of GAP."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, num_graphs)
    offset = np.concatenate([[0], np.cumsum(sizes)])
    nodes = offset[-1]
    gap = rng.normal(size=num_graphs)
    gap[list(missing)] = np.nan
    return GraphArrays(
        index=np.arange(1, num_graphs + 1),
        node_offset=offset,
        atomic_number=np.ones(nodes, np.uint8),
        position=rng.normal(size=(nodes, 3)),
        edges=StoredEdges(np.zeros(num_graphs + 1, int), np.zeros((0, 3), np.uint16)),
        graph_labels={"energy": 5.0 * sizes + rng.normal(size=num_graphs), "gap": gap},
        node_labels={"charge": rng.normal(size=nodes), "force": rng.normal(size=(nodes, 3))},
    )


def dataset_of(arrays, targets=TARGETS, **changes):
    graphs = np.arange(len(arrays.index))
    split = {"train": graphs[:4], "validation": graphs[4:5], "test": graphs[5:]}
    fields = dict(
        name="four",
        items="molecules",
        elements=(1,),
        arrays=arrays,
        targets=targets,
        split=split,
        split_name="first",
        buckets=(Bucket(5, 1),),
        passport={"dataset": "four"},
        about={},
    )
    return Dataset(**fields | changes)


def objective_of(targets=TARGETS, loss="mae", losses=None, weights=None, metrics=None):
    return make_objective(targets, loss, losses or {}, weights or {}, metrics or {})


# --- normalisation -------------------------------------------------------------------------------


def test_normalization_is_of_the_training_labels_and_invertible(dataset):
    arrays, normalizations = standardize(dataset, np.float64)
    train, n = dataset.split["train"], dataset.arrays.sizes.num_nodes
    for target in dataset.targets:
        z = arrays.graph_labels[target.name]
        np.testing.assert_allclose((z[train] ** 2).mean(), 1.0)
        back = normalizations[target.name].restore(z, n)
        np.testing.assert_allclose(back, dataset.labels(target), rtol=1e-12)
    np.testing.assert_allclose(arrays.graph_labels["homo"][train].mean(), 0.0, atol=1e-12)
    changed = {name: y.copy() for name, y in dataset.arrays.graph_labels.items()}
    for y in changed.values():
        y[dataset.split["test"]] += 1e6
    other = dataclasses.replace(
        dataset, arrays=dataclasses.replace(dataset.arrays, graph_labels=changed)
    )
    assert standardize(other, np.float64)[1] == normalizations


def test_extensive_targets_are_normalised_per_node(dataset):
    _, normalizations = standardize(dataset, np.float64)
    assert normalizations["homo"].slope == 0 and normalizations["homo"].offset != 0
    assert normalizations["U0"].slope != 0 and normalizations["U0"].offset == 0
    for label in (1.0, 0.1, 104.7):  # all alike, but for the rounding of their mean
        assert Normalization.fit(GAP, np.full(1_000, label), np.ones(1_000)).scale == 1.0
        n = np.arange(1.0, 1_001.0)
        assert Normalization.fit(ENERGY, label * n, n).scale == 1.0


def test_missing_labels_are_left_out_of_the_statistics():
    whole = labelled_arrays()
    some = labelled_arrays(missing=[1])
    normalization = standardize(dataset_of(some), np.float64)[1]["gap"]
    present = whole.graph_labels["gap"][[0, 2, 3]]
    np.testing.assert_allclose(normalization.offset, present.mean())
    np.testing.assert_allclose(normalization.scale, present.std())
    with pytest.raises(UserError, match="None of the 4 .* for train has a label of gap"):
        dataset_of(labelled_arrays(missing=range(4)))


def test_a_vector_of_nodes_is_scaled_but_not_shifted():
    _, normalizations = standardize(dataset_of(labelled_arrays()), np.float64)
    force = normalizations["force"]
    assert force.offset == force.slope == 0 and force.scale > 0
    with pytest.raises(UserError, match="only 'none' keeps the symmetries"):
        Target("position", "A", readout="position")


def test_an_element_that_the_data_set_does_not_name_is_refused():
    arrays = labelled_arrays()
    arrays.atomic_number[arrays.node_offset[3]] = 34
    with pytest.raises(UserError, match="Molecule 4 has the element Se, but data set four"):
        dataset_of(arrays)


def test_infinite_labels_and_wrong_numbers_of_labels_are_refused():
    arrays = labelled_arrays()
    arrays.node_labels["charge"][5] = np.inf
    graph = np.searchsorted(arrays.node_offset, 5, "right")
    with pytest.raises(UserError, match=f"'charge' of graph {graph} is infinite"):
        dataset_of(arrays)
    arrays = labelled_arrays()
    arrays.graph_labels["gap"] = arrays.graph_labels["gap"][:-1]
    with pytest.raises(UserError, match="'gap' has 5 labels for 6 graphs"):
        dataset_of(arrays)
    nobody = {"train": np.arange(5), "validation": np.arange(0), "test": np.arange(5, 6)}
    with pytest.raises(UserError, match="leaves no molecules for validation"):
        dataset_of(labelled_arrays(), split=nobody)


# --- losses and errors ---------------------------------------------------------------------------


def batch_and_predictions(missing=()):
    """A batch of three graphs and an empty row, in float64, with random predictions and junk."""
    arrays = labelled_arrays(missing=missing)
    batch = batching.gather(arrays, np.array([0, 1, 2, -1]), Bucket(5, 1))
    rng = np.random.default_rng(1)
    predictions = {name: rng.normal(size=y.shape) for name, y in batch.labels.items()}
    return arrays, batch, predictions


def test_errors_by_hand(float64):
    arrays, batch, predictions = batch_and_predictions()
    objective = objective_of(metrics={"gap": "mse"}, losses={"gap": "huber"})
    errors, labelled = objective.errors_BxT(predictions, batch)
    assert labelled.tolist() == [[True] * 4] * 3 + [[False] * 4]
    for g in range(3):
        n = arrays.sizes.num_nodes[g]
        rows = slice(arrays.node_offset[g], arrays.node_offset[g + 1])
        of = lambda name: predictions[name][g]  # noqa: B023
        expected = [
            abs(of("energy") - arrays.graph_labels["energy"][g]),
            (of("gap") - arrays.graph_labels["gap"][g]) ** 2,
            np.abs(of("charge")[:n] - arrays.node_labels["charge"][rows]).mean(),
            np.abs(of("force")[:n] - arrays.node_labels["force"][rows]).mean(),
        ]
        np.testing.assert_allclose(errors[g], expected, rtol=1e-12)
        size = abs(of("gap") - arrays.graph_labels["gap"][g])
        expected[1] = size**2 / 2 if size < 1 else size - 0.5
        loss = objective.loss_B(predictions, batch)[g]
        np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-12)


def test_weights_are_of_single_targets(float64):
    _, batch, predictions = batch_and_predictions()
    alone = [
        objective_of(weights={t.name: float(t is other) for t in TARGETS}).loss_B(
            predictions, batch
        )
        for other in TARGETS
    ]
    both = objective_of(weights={"energy": 3.0, "charge": 0.0, "force": 0.0})
    found = both.loss_B(predictions, batch)
    np.testing.assert_allclose(found[:3], (3 * alone[0] + alone[1])[:3], rtol=1e-12)


@pytest.mark.parametrize("junk", [0.0, 1e30, np.nan, np.inf])
def test_a_missing_label_weighs_nothing(float64, junk):
    """Whatever the model says there: not in the loss, its gradient, the sums or the count."""
    _, batch, predictions = batch_and_predictions(missing=[1])
    objective = objective_of(targets=(GAP,))
    names = ["gap"]
    clean = {name: predictions[name] for name in names}
    dirty = {"gap": np.where([False, True, False, True], junk, clean["gap"])}
    loss = lambda p: jnp.where(batch.graph_mask, objective.loss_B(p, batch), 0).sum()
    for function in (loss, jax.grad(loss)):
        a, b = jax.tree.leaves(function(clean)), jax.tree.leaves(function(dirty))
        np.testing.assert_array_equal(a, b)
    found = TargetErrors.from_model_output(*objective.errors_BxT(dirty, batch))
    assert found.count.tolist() == [2] and np.isfinite(found.total).all()


def test_metric_is_exact_over_padding_and_batching():
    rng = np.random.default_rng(0)
    prediction, label = rng.normal(size=(2, 11, 2))
    exact = np.abs(prediction - label).mean(axis=0)
    for size in (1, 3, 11):
        merged = TargetErrors.empty()
        for start in range(0, 12, size):
            rows = np.arange(start, start + size)
            mask = rows < 11
            rows = np.minimum(rows, 10)
            junk = np.where(mask[:, None], prediction[rows], np.nan)
            both = np.repeat(mask[:, None], 2, axis=1)
            part = TargetErrors.from_model_output(np.abs(junk - label[rows]), both)
            merged = merged.merge(jax.tree.map(lambda x: np.asarray(x, np.float64), part))
        assert merged.count.tolist() == [11, 11]
        np.testing.assert_allclose(merged.compute(), exact, rtol=1e-6)


# --- the table of measures -----------------------------------------------------------------------


def test_measures_by_hand():
    error = np.array([-3.0, 0.5, 1.0, 2.0])
    of = lambda name: MEASURES[name].of_error(error)
    np.testing.assert_allclose(of("mae"), [3, 0.5, 1, 2])
    np.testing.assert_allclose(of("mse"), [9, 0.25, 1, 4])
    np.testing.assert_allclose(of("huber"), [2.5, 0.125, 0.5, 1.5])
    assert MEASURES["rmse"].finish(4.0, 0.0) == 2.0
    assert MEASURES["r2"].finish(1.0, 4.0) == 0.75
    assert np.isnan(MEASURES["r2"].finish(1.0, 0.0))
    assert MEASURES["mse"].unit("eV") == "eV^2" and MEASURES["r2"].unit("eV") == ""


def outcome_of(metric, arrays, prediction_of):
    """An evaluation of all graphs on the target GAP, as `Evaluator` would give it."""
    target = dataclasses.replace(GAP, metric=metric)
    dataset = dataset_of(
        arrays,
        (target,),
        baselines=lambda graphs: {"zero": {"gap": -arrays.graph_labels["gap"][graphs]}},
    )
    normalization = standardize(dataset, np.float64)[1]["gap"]
    graphs = np.arange(len(arrays.index))
    label = arrays.graph_labels["gap"]
    prediction = prediction_of(label)
    measure, scale = MEASURES[metric], normalization.scale
    errors = measure.of_error((prediction - label) / scale)
    known = ~np.isnan(label)
    return Outcome(
        dataset=dataset,
        targets=(target,),
        errors=TargetErrors(errors[known].sum(keepdims=True), np.array([known.sum()])),
        graphs=graphs,
        graph_errors=errors[:, None] * scale**measure.power,
        predictions={"gap": prediction},
        normalizations={"gap": normalization},
    )


@pytest.mark.parametrize("missing", [(), (2,)])
def test_reported_values_are_of_the_labels_in_their_unit(missing):
    arrays = labelled_arrays(missing=missing)
    label = arrays.graph_labels["gap"]
    known = ~np.isnan(label)
    noise = np.random.default_rng(5).normal(size=len(label))
    error = noise[known]
    expected = {
        "mae": np.abs(error).mean(),
        "mse": np.square(error).mean(),
        "rmse": np.sqrt(np.square(error).mean()),
        "r2": 1 - np.square(error).sum() / np.square(label[known] - label[known].mean()).sum(),
    }
    for metric, value in expected.items():
        outcome = outcome_of(metric, arrays, lambda label: label + noise)
        np.testing.assert_allclose(outcome.metrics["gap"], value, rtol=1e-12)
        identity = {"passport": {"dataset": "four"}, "config": {}}
        row = result_of(outcome, "test", 3, identity)["targets"]["gap"]
        np.testing.assert_allclose(row[metric], value, rtol=1e-12)
        low, high = row["interval_95"]
        assert low <= value <= high
        trivial = {"mae": np.abs(label[known]).mean(), "mse": np.square(label[known]).mean()}
        if metric in trivial:  # an mse target never publishes an MAE
            np.testing.assert_allclose(row[f"{metric}_of_zero"], trivial[metric], rtol=1e-12)
        assert ("labelled" in row) == bool(missing)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "hubr"}, "Did you mean 'huber'"),
        ({"loss": "r2"}, "'r2', which is no loss"),
        ({"losses": {"gap": "rmse"}}, "config.train.losses.gap is 'rmse', which is no loss"),
        ({"weights": {"gpa": 1.0}}, "names 'gpa', which is no target.*Did you mean 'gap'"),
        ({"weights": {"gap": -1.0}}, r"config.train.weights.gap \(-1.0\) must be 0 or more"),
        ({"weights": {t.name: 0.0 for t in TARGETS}}, "config.train.weights is 0 for every target"),
        ({"metrics": {"gap": "mape"}}, "Unknown config.train.metrics.gap 'mape'"),
    ],
)
def test_bad_objectives_are_named(options, message):
    with pytest.raises(UserError, match=message):
        objective_of(**options)


def test_progress_says_nothing_of_a_target_without_a_label():
    window = Window.empty(2)
    window.add(1.0, 3, [4.0, 0.0], [2.0, 0.0], 1.0)
    np.testing.assert_array_equal(window.mean_errors(), [2.0, np.nan])


def test_a_trivial_predictor_is_measured_as_the_model():
    """Huber's measure is of standardised errors, and so is that of the training mean."""
    arrays = labelled_arrays()
    arrays.graph_labels["gap"] *= 600
    mean = training_mean({"gap": arrays.graph_labels["gap"]}, np.arange(4))
    gap = dataclasses.replace(GAP, metric="huber")
    dataset = dataset_of(arrays, (gap,), baselines=mean)
    _, normalizations = standardize(dataset, np.float64)
    graphs = dataset.split["train"]
    outcome = types.SimpleNamespace(
        dataset=dataset,
        graphs=graphs,
        targets=(gap,),
        metrics={"gap": 0.0},
        normalizations=normalizations,
        graph_errors=np.zeros((4, 1)),
        count=4,
    )
    found = result_of(outcome, "train", 0, {"passport": {"dataset": "four"}, "config": {}})
    z = mean(graphs)["training_mean"]["gap"] / normalizations["gap"].scale
    expected = np.where(np.abs(z) < 1, z**2 / 2, np.abs(z) - 0.5).mean()
    assert found["targets"]["gap"]["huber_of_training_mean"] == pytest.approx(expected)


def test_a_table_has_labels_and_predictions_as_the_source_has_them(tmp_path):
    arrays = labelled_arrays(missing=[1])
    dataset = dataset_of(arrays, (ENERGY, GAP), references={"energy": {1: -10.0}})
    graphs = np.array([4, 1])
    outcome = types.SimpleNamespace(
        dataset=dataset,
        graphs=graphs,
        targets=(ENERGY, GAP),
        labels=lambda target: dataset.labels_of(target, graphs),
        predictions={"energy": np.zeros(2), "gap": np.ones(2)},
    )
    evaluate._write_table(outcome, str(tmp_path / "t.csv"))
    with (tmp_path / "t.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    sizes = arrays.sizes.num_nodes[graphs]
    assert [row["index"] for row in rows] == ["5", "2"] and rows[1]["gap"] == ""
    assert [float(row["energy_pred"]) for row in rows] == (-10.0 * sizes).tolist()
    energy = arrays.graph_labels["energy"][graphs] - 10 * sizes
    np.testing.assert_allclose([float(row["energy"]) for row in rows], energy)


def test_a_table_of_nodes_is_refused_before_anything_is_computed():
    experiment = types.SimpleNamespace(objective=types.SimpleNamespace(targets=(GAP, CHARGE)))
    with pytest.raises(UserError, match="--out: charge has values of each node"):
        evaluate._evaluated(experiment, None, "test", "table.csv")
