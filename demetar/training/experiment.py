"""What follows from a config alone: mesh, data, model, optimizer; for training and evaluation."""

import dataclasses
import functools

import jax
import ml_collections
import numpy as np
import optax

from data_pipelines import batching
from data_pipelines.batch_plan import Bucket
from data_pipelines.dataset import Dataset
from data_pipelines.errors import UserError
from data_pipelines.registry import load_dataset
from demetar.config import stored
from demetar.models import create_model, predict
from demetar.models.base import GraphModel
from demetar.speed import flops
from demetar.training import sharding
from demetar.training.objective import Normalization, Objective, make_objective, standardize
from demetar.training.optim import make_optimizer
from demetar.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run.

    Attributes:
      config: resolved.
      mesh: of today's devices.
      dataset: graphs with labels in reported units, split, buckets, passport.
      arrays: the same graphs with standardised labels in the type that is computed in.
      normalizations: name of a target -> between the two.
      objective: losses and metrics of the targets.
      model: for one graph.
      schedule: learning rate of a step.
      tx: the optax chain.
    """

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    dataset: Dataset
    arrays: batching.GraphArrays
    normalizations: dict[str, Normalization]
    objective: Objective
    model: GraphModel
    schedule: optax.Schedule
    tx: optax.GradientTransformation

    @property
    def identity(self) -> dict:
        """What makes two runs the same run, as JSON: `{"config": ..., "passport": ...}`."""
        return {"config": stored.to_json(self.config), "passport": self.dataset.passport}

    def _init(self) -> TrainState:
        bucket = self.dataset.buckets[0]
        example = batching.gather(self.arrays, np.zeros(1, np.int64), bucket)
        one = jax.tree.map(lambda x: x[0], example)
        return create_state(self.model, self.tx, one, self.config.seed)

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._init)  # traces the model: once

    @functools.cached_property
    def state_specs(self) -> TrainState:
        """How each leaf of the state lies on today's mesh: `PartitionSpec`s."""
        return sharding.state_specs(self.mesh, self.model.SHARDING_RULES, self._shapes)

    @functools.cached_property
    def _jitted_init(self):
        return jax.jit(self._init, out_shardings=sharding.named(self.mesh, self.state_specs))

    def create_state(self) -> TrainState:
        """A fresh state, born in its shardings."""
        return self._jitted_init()

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state on today's mesh."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self._shapes,
            sharding.named(self.mesh, self.state_specs),
        )

    def abstract_batch(self, bucket: Bucket, batch_size: int):
        """Shapes, types and shardings of a batch of a bucket."""
        one = batching.gather(self.arrays, np.zeros(1, np.int64), bucket)
        rows = sharding.over_batch(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype, sharding=rows), one
        )

    @functools.cached_property
    def graph_cost(self) -> flops.GraphCost:
        """Operations of a training step, of each graph by itself: real nodes and edges alone."""
        model = self.model.clone(remat=False) if hasattr(self.model, "remat") else self.model

        def summed(params, batch):
            return sum(x.sum() for x in predict(model, params, batch).values())

        example = lambda n, e: (self._shapes.params, self.abstract_batch(Bucket(n, e), 1))
        sizes = self.arrays.sizes
        known = np.stack([sizes.num_nodes, sizes.num_edges], axis=1)
        return flops.graph_cost(jax.grad(summed), example, known)


def build_experiment(config: ml_collections.ConfigDict, devices=None) -> Experiment:
    """Builds all parts; whatever in the config is wrong is a `UserError` here.

    Args:
      config: resolved.
      devices: of a machine that is only planned; None: those of this one.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model, devices)
    batch_size, parts = config.data.batch_size, config.train.accumulation
    sharding.check_batch_size("config.data.batch_size", batch_size, mesh, parts)
    sharding.check_batch_size("config.data.eval_batch_size", config.data.eval_batch_size, mesh)
    dataset = load_dataset(**config.data)
    sharding.check_graphs(len(dataset.split["train"]), dataset.items, mesh)
    arrays, normalizations = standardize(dataset, stored.real_dtype(config))
    train = config.train
    objective = make_objective(
        dataset.targets, train.loss, train.losses, train.weights, train.metrics
    )
    model = create_model(
        targets=objective.targets,
        facts={"elements": dataset.elements, **dataset.model_facts},
        **config.model,
    )
    for feature in ("node_feature", "graph_feature"):
        if getattr(arrays, feature) is not None and feature not in model.READS:
            raise UserError(
                f"These data have a {feature} (features of atoms, scattering, or several horizons)"
                f", which model {config.model.name!r} does not read: choose data without it, or "
                "another model."
            )
    schedule, tx = make_optimizer(config.optim, train.num_steps, mesh)
    experiment = Experiment(
        config=config,
        mesh=mesh,
        dataset=dataset,
        arrays=arrays,
        normalizations=normalizations,
        objective=objective,
        model=model,
        schedule=schedule,
        tx=tx,
    )
    sharding.check_model_axis(mesh, model, experiment.abstract_state().params)
    return experiment
