"""What a data set asks a model for: named targets of graphs or of their nodes.

A data set lists its own targets with their units (`data_pipelines/qm9/properties.py`); nothing
here knows one of them.
"""

import dataclasses

import numpy as np

from data_pipelines.errors import UserError, check_known

# How a model may read a target out of its tokens -> whether it is one of the graph or its nodes.
READOUTS = {
    "cls": "graph",  # from the [CLS] token
    "sum": "graph",  # sum over nodes
    "mean": "graph",  # mean over nodes
    "max": "graph",  # largest over nodes, of each feature
    "dipole": "graph",  # length of the dipole of charges at the nodes
    "extent": "graph",  # charges at the nodes times their squared distances from the centre of mass
    "node": "node",  # a number of each node
    "position": "node",  # where each node will be: three numbers that turn with the input
    "velocity": "node",  # how each node will move then: they turn as well, but do not shift
}
NORMALIZATIONS = (
    "standard",  # mean and standard deviation over the training labels
    "scale",  # root mean square alone: a shift would break the symmetries of a vector
    "none",  # left as it is
)


@dataclasses.dataclass(frozen=True)
class Target:
    """One named quantity that a model predicts.

    Attributes:
      name: what `config.data.targets` calls it, and the key in `result.json`.
      unit: unit in which labels are given to the model's normalisation and errors are reported.
      symbol: as papers print it.
      readout: of `READOUTS`, the one that suits it; `config.model.readout` can override it.
      extensive: whether it grows with the graph; then its mean is one per node.
      normalization: of `NORMALIZATIONS`, between labels and what a model predicts.
      metric: of `demetar.training.measures`: what is reported, and what chooses the best weights.
    """

    name: str
    unit: str
    symbol: str = ""
    readout: str = "sum"
    extensive: bool = False
    normalization: str = "standard"
    metric: str = "mae"

    def __post_init__(self):
        check_known(f"read-out of target {self.name!r}:", self.readout, READOUTS)
        check_known(f"normalization of target {self.name!r}:", self.normalization, NORMALIZATIONS)
        if self.is_vector and self.normalization != "none":
            what = {"position": "positions", "velocity": "velocities"}[self.readout]
            raise UserError(
                f"Target {self.name!r} is read out as {what}, but its normalization is "
                f"{self.normalization!r}: only 'none' keeps the symmetries."
            )

    @property
    def is_vector(self) -> bool:
        """Whether every node has three numbers that turn with the input."""
        return self.readout in ("position", "velocity")

    @property
    def per_node(self) -> bool:
        """Whether every node has a label of its own, `[N]` or `[N, 3]`."""
        return READOUTS[self.readout] == "node"


def check_labels(target: Target, label: np.ndarray, index_G, node_offset_G) -> None:
    """Refuses labels of the wrong number and infinite ones; NaN is a missing label.

    Args:
      target: whose labels these are.
      label: [G], or of all nodes: [nodes] or [nodes, 3].
      index_G: published numbers of the graphs, for the message.
      node_offset_G: [G + 1].
    """
    wanted = node_offset_G[-1] if target.per_node else len(index_G)
    if len(label) != wanted:
        raise UserError(
            f"Target {target.name!r} has {len(label)} labels for {wanted} "
            f"{'nodes' if target.per_node else 'graphs'}: give one each, NaN where it is missing."
        )
    rows = np.flatnonzero(np.isinf(label.reshape(len(label), -1)).any(axis=1))
    if len(rows):
        row = rows[0]
        graph = np.searchsorted(node_offset_G, row, "right") - 1 if target.per_node else row
        raise UserError(
            f"Target {target.name!r} of graph {index_G[graph]} is infinite: repair it, or leave it "
            "out (NaN) as missing."
        )
