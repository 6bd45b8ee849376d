"""A trained network as compiled programs: one for each shape, on all devices of this process.

No setting of JAX is changed: whoever uses a model has a program of their own.
"""

import contextlib
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.batch_plan import Bucket
from data_pipelines.graph import Array, Graph
from demetar.models import predict_and_embed
from demetar.models.base import GraphModel


class Programs:
    """`(bucket, rows, batch) -> (predictions, embedding)`, compiled once for each shape.

    Args:
      network: for one graph.
      params: its weights, NumPy.
      dtype: of positions: float32, or float64 for a network that computes so.
    """

    def __init__(self, network: GraphModel, params, dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self._network = network
        self._compiled: dict[tuple, Any] = {}
        self._params: dict[Mesh, Any] = {}
        self._host_params = params
        self._devices = jax.local_devices()

    def precision(self) -> contextlib.AbstractContextManager:
        """In which JAX has the types that the network computes in, whatever it has outside."""
        return jax.enable_x64(self.dtype == np.float64)

    def mesh(self, rows: int) -> Mesh:
        """All devices of this process, or the first where they do not divide the rows."""
        devices = self._devices if rows % len(self._devices) == 0 else self._devices[:1]
        return jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)

    def rows(self, batch_size: int) -> int:
        """`batch_size`, raised so that every device has as many; 1 stays 1."""
        number = len(self._devices)
        return batch_size if batch_size == 1 else -(-batch_size // number) * number

    def __call__(self, bucket: Bucket, batch: Graph) -> tuple[dict[str, Array], Array | None]:
        """Predictions as the network gives them, standardised, and the embedding `[B, D]`."""
        rows = len(batch.graph_mask)
        with self.precision():
            if (bucket, rows) not in self._compiled:
                self._compiled[bucket, rows] = self._compile(batch, self.mesh(rows))
            program, mesh, over_batch = self._compiled[bucket, rows]
            return program(self.params(mesh), jax.device_put(batch, over_batch))

    def params(self, mesh: Mesh):
        """The weights on all devices of a mesh."""
        if mesh not in self._params:
            self._params[mesh] = jax.device_put(self._host_params, NamedSharding(mesh, P()))
        return self._params[mesh]

    def _compile(self, batch: Graph, mesh: Mesh):
        over_batch = NamedSharding(mesh, P("batch"))
        of_all = jax.shard_map(
            functools.partial(predict_and_embed, self._network),
            mesh=mesh,
            in_specs=(P(), P("batch")),
            out_specs=P("batch"),
            check_vma=False,
        )
        placed = jax.device_put(batch, over_batch)
        return jax.jit(of_all).lower(self.params(mesh), placed).compile(), mesh, over_batch
