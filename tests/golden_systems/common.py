"""What the golden files share: molecules, and official weights in our trees of parameters."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.graph import Graph
from data_pipelines.targets import Target
from demetar.models.base import GraphModel

TARGET = Target("output", "1", readout="sum", normalization="none")
ELEMENTS = (1, 6, 7, 8, 9)
BATCH_AXIS = "batch"  # name of the vmapped axis over the graphs of a file


@dataclasses.dataclass(frozen=True)
class System:
    """One compared system: our model for a golden file, and what is compared.

    Attributes:
      model: (golden, meta) -> our model with the options of the file, in float64.
      official: (params, golden, meta) -> official name -> our parameters in the official layout:
        reshaped, transposed, split and joined only, so that it can be inverted.
      batch: (golden, meta) -> the graphs of the file.
      output: (predictions, batch) -> an array of the shape of the file's `output`.
      loss: (output, golden) -> the number whose gradients are in the file.
      layers: (intermediates, predictions, batch, golden, meta) -> name in the file -> ours, of
        what flax captured (see `intermediate`). Nodes past a graph's own are not compared.
      weightless: names (after `param/`) that our model has no weight for, because they reach no
        output; names without a gradient, in a file with gradients, need no entry.
      variables: (golden, meta) -> collections beside the parameters.
      of_batch: (golden, meta) -> our model as it is where graphs of a batch depend on each other
        (the file's `output_train`), if it is another.
      rtol: relative to the largest number of an array.
    """

    model: Callable[..., GraphModel]
    official: Callable[..., dict[str, np.ndarray]]
    batch: Callable[..., Graph] = lambda golden, meta: molecules(golden)
    output: Callable = lambda predictions, batch: predictions[TARGET.name][:, None]
    loss: Callable = lambda output, golden: output.sum()
    layers: Callable[..., Mapping[str, np.ndarray]] = lambda *_: {}
    weightless: tuple[str, ...] = ()
    variables: Callable[..., dict] = lambda golden, meta: {}
    of_batch: Callable[..., GraphModel] | None = None
    rtol: float = 1e-9


def molecules(golden, **more) -> Graph:
    """The padded molecules of a file as a batch: every pair of atoms is an edge, with its bond."""
    number = golden["atomic_number"].astype(np.int32)
    num, n = number.shape
    mask = golden["node_mask"].astype(bool)
    i, j = np.triu_indices(n, 1)
    bonds = golden["bond_type"] if "bond_type" in golden else np.zeros((num, n, n))
    return Graph(
        position=golden["position"].astype(float),
        atomic_number=number,
        node_mask=mask,
        senders=np.tile(i.astype(np.int32), (num, 1)),
        receivers=np.tile(j.astype(np.int32), (num, 1)),
        edge_type=bonds[:, i, j].astype(np.int32),
        edge_mask=mask[:, i] & mask[:, j],
        graph_mask=np.ones(num, bool),
        index=np.arange(num, dtype=np.int32),
        **more,
    )


def initial_shapes(model: GraphModel, batch: Graph) -> dict:
    one = jax.tree.map(lambda x: x[0], batch)
    return jax.eval_shape(model.init, jax.random.key(0), one)["params"]


def load_weights(shapes: dict, official: Callable, weights: Mapping[str, np.ndarray]) -> dict:
    """Official weights in our tree, by inverting `official` on numbered parameters."""
    counter = iter(range(10**9))
    numbered = jax.tree.map(
        lambda s: np.array([next(counter) for _ in range(s.size)]).reshape(s.shape), shapes
    )
    values = np.full(next(counter), np.nan)
    for name, numbers in official(numbered).items():
        numbers = np.asarray(numbers)
        assert numbers.shape == weights[name].shape, (name, numbers.shape, weights[name].shape)
        values[numbers.ravel()] = weights[name].astype(float).ravel()
    missing = [
        jax.tree_util.keystr(path)
        for path, numbers in jax.tree_util.tree_leaves_with_path(numbered)
        if np.isnan(values[numbers]).any()
    ]
    assert not missing, f"no official weight for {missing}"
    return jax.tree.map(lambda numbers: jnp.asarray(values[numbers]), numbered)


def run(model: GraphModel, params: dict, batch: Graph, variables: dict):
    """(predictions, captured intermediates) of a batch: flax captures what each module returns."""

    def one(graph):
        return model.apply(
            {"params": params} | variables,
            graph,
            capture_intermediates=True,
            mutable=["intermediates"],
        )

    predictions, captured = jax.vmap(one, axis_name=BATCH_AXIS)(batch)
    return predictions, captured["intermediates"]


def intermediate(captured: dict, path: str, call: int = 0):
    """What the module at `path` ("layer_0/attention") returned, at its `call`-th call."""
    for name in path.split("/"):
        captured = captured[name]
    return captured["__call__"][call]
