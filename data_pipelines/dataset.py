"""A data set as training sees it: graphs with edges and labels, a split, buckets, a passport."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data_pipelines.batch_plan import MAX_BUCKETS, Bucket, buckets_with_limits, choose_buckets
from data_pipelines.batching import GraphArrays
from data_pipelines.elements import check_elements
from data_pipelines.errors import UserError
from data_pipelines.targets import Target, check_labels

_OF_A_BUCKET = 80  # graphs, at least
PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a data set's `load` gives.

    Attributes:
      name: of the data set.
      items: what its graphs are called, "molecules" or "systems".
      elements: atomic numbers that its nodes may have, ascending.
      arrays: all graphs; labels in reported units, float64.
      targets: what there are labels for.
      split: positions of the graphs of each of `PARTS`.
      split_name: as results name it.
      buckets: the compiled shapes, ascending; enough for every graph.
      passport: counts, ids, units and hashes.
      about: lines for a person: name -> text.
      model_facts: what a model of these data may need to be told beside its options: name of a
        model's field -> value.
      references: name of a target -> atomic number -> what each such atom adds, in the target's
        unit, to a label to give what the source holds. Labels are without them; a prediction is
        given with them.
      baselines: positions of graphs [g] -> name of a trivial predictor -> name of a target -> its
        errors, prediction minus label, on these graphs. Any model must beat them.
    """

    name: str
    items: str
    elements: tuple[int, ...]
    arrays: GraphArrays
    targets: tuple[Target, ...]
    split: Mapping[str, np.ndarray]
    split_name: str
    buckets: tuple[Bucket, ...]
    passport: dict
    about: Mapping[str, str]
    model_facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    references: Mapping[str, Mapping[int, float]] = dataclasses.field(default_factory=dict)
    baselines: Callable[[np.ndarray], dict[str, dict[str, np.ndarray]]] = lambda graphs: {}

    def __post_init__(self):
        arrays = self.arrays
        check_graphs(arrays, self.elements, self.name)
        for target in self.targets:
            check_labels(target, self.labels(target), arrays.index, arrays.node_offset)
        for part, graphs in self.split.items():
            if not len(graphs):
                raise UserError(
                    f"Split {self.split_name!r} of data set {self.name} leaves no {self.items} for "
                    f"{part}: {len(arrays.index)} in all. Give it more, or choose another split."
                )
            for target in self.targets:
                if target.name not in arrays.incomplete:
                    continue
                if np.isnan(self.labels_of(target, graphs)).all():
                    raise UserError(
                        f"None of the {len(graphs)} {self.items} for {part} has a label of "
                        f"{target.name} (split {self.split_name!r}): give it more labels, leave "
                        "the target out, or choose another split."
                    )

    def labels(self, target: Target) -> np.ndarray:
        """All labels of a target, float64: [G]; or of every node, [nodes] or [nodes, 3]."""
        arrays = self.arrays
        return (arrays.node_labels if target.per_node else arrays.graph_labels)[target.name]

    def labels_of(self, target: Target, graphs_g: np.ndarray) -> np.ndarray:
        """The labels of some graphs, in their order."""
        rows = self.arrays.nodes_of(graphs_g) if target.per_node else graphs_g
        return self.labels(target)[rows]


def check_graphs(arrays: GraphArrays, elements: tuple[int, ...], data_set: str) -> None:
    """Refuses a graph with an element that its data set does not name."""
    others = np.setdiff1d(np.unique(arrays.atomic_number), elements)
    if len(others):
        node = np.flatnonzero(np.isin(arrays.atomic_number, others))[0]
        graph = np.searchsorted(arrays.node_offset, node, "right") - 1
        rows = slice(arrays.node_offset[graph], arrays.node_offset[graph + 1])
        check_elements(arrays.atomic_number[rows], elements, arrays.index[graph], data_set)


def training_mean(dataset_labels: dict[str, np.ndarray], train: np.ndarray):
    """The usual `Dataset.baselines` of graph targets: predict the mean of the training labels."""
    means = {name: np.nanmean(label_G[train]) for name, label_G in dataset_labels.items()}

    def errors(graphs: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        return {
            "training_mean": {
                name: means[name] - label_G[graphs] for name, label_G in dataset_labels.items()
            }
        }

    return errors


def make_buckets(arrays: GraphArrays, limits) -> tuple[Bucket, ...]:
    """Of `config.data.buckets`: these node limits or, if empty, the best for the data."""
    if limits:
        return buckets_with_limits(arrays.sizes, limits)
    # Each has to fill batches, and takes its time to compile.
    return choose_buckets(arrays.sizes, max(1, min(MAX_BUCKETS, len(arrays.index) // _OF_A_BUCKET)))
