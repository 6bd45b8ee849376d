"""What follows from a config alone: mesh, data, model, optimizer; for training and evaluation."""

import dataclasses
import functools
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from data_pipelines import batching
from data_pipelines.batch_plan import Bucket
from data_pipelines.dataset import Dataset, load_dataset
from data_pipelines.errors import UserError, suggest
from demetar.config import stored
from demetar.models import create_model
from demetar.speed import flops
from demetar.training import sharding
from demetar.training.objective import ERRORS, Normalization, standardize
from demetar.training.optim import learning_rate, make_optimizer
from demetar.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run.

    Attributes:
      config: resolved.
      mesh: of today's devices.
      dataset: graphs with targets in reported units, split, buckets, passport.
      arrays: the same graphs with standardised targets in the type that is computed in.
      normalization: between the two.
      model: for one graph.
      schedule: learning rate of a step.
      tx: the optax chain.
    """

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    dataset: Dataset
    arrays: batching.GraphArrays
    normalization: Normalization
    model: Any
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
        return sharding.state_specs(self.mesh, self._shapes)

    def create_state(self) -> TrainState:
        """A fresh state, born in its shardings."""
        return jax.jit(self._init, out_shardings=sharding.named(self.mesh, self.state_specs))()

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
        split = sharding.over_batch(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype, sharding=split), one
        )

    @functools.cached_property
    def graph_cost(self) -> flops.GraphCost:
        """Operations of a training step, of each graph by itself: real nodes and edges alone."""
        model = self.model.clone(remat=False) if hasattr(self.model, "remat") else self.model

        def summed(params, batch):
            return jax.vmap(lambda graph: model.apply({"params": params}, graph))(batch).sum()

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
    _check(config, mesh)
    dataset = load_dataset(**config.data)
    arrays, normalization = standardize(dataset, stored.real_dtype(config))
    optim, num_steps = config.optim, config.train.num_steps
    schedule = learning_rate(
        optim.schedule, optim.learning_rate, optim.warmup_steps, num_steps, optim.final_fraction
    )
    experiment = Experiment(
        config=config,
        mesh=mesh,
        dataset=dataset,
        arrays=arrays,
        normalization=normalization,
        model=create_model(
            target_readouts=tuple(t.readout for t in dataset.targets),
            horizon=dataset.horizon,
            **config.model,
        ),
        schedule=schedule,
        tx=make_optimizer(schedule, optim.b1, optim.b2, optim.weight_decay, optim.clip_norm),
    )
    if config.train.steps_per_call > 1 and len(dataset.buckets) > 1:
        raise UserError(
            f"config.train.steps_per_call ({config.train.steps_per_call}) needs graphs of one "
            f"bucket, and the data have {len(dataset.buckets)}: set it to 1, or "
            f"config.data.buckets to ({dataset.buckets[-1].num_nodes},)."
        )
    heads = config.model.get("num_heads")
    sharding.check_model(mesh, experiment.abstract_state().params, heads)
    return experiment


def _check(config: ml_collections.ConfigDict, mesh) -> None:
    """Refuses now what could only fail later."""
    data, train = config.data, config.train
    sharding.check_batch_size("config.data.batch_size", data.batch_size, mesh, train.accumulation)
    sharding.check_batch_size("config.data.eval_batch_size", data.eval_batch_size, mesh)
    if train.loss not in ERRORS:
        raise UserError(
            f"Unknown config.train.loss {train.loss!r}.{suggest(train.loss, ERRORS)} "
            f"Known: {', '.join(ERRORS)}."
        )
    for group, key in (
        ("train", "num_steps"),
        ("train", "eval_every"),
        ("train", "accumulation"),
        ("train", "steps_per_call"),
        ("checkpoint", "every_steps"),
        ("log", "every_steps"),
    ):
        if key not in config[group]:
            raise UserError(
                f"The config has no {group}.{key}: set it in its file, as in configs/qm9.py."
            )
        if config[group][key] < 1:
            raise UserError(f"config.{group}.{key} ({config[group][key]}) must be at least 1.")
    if train.steps_per_call > 1:
        _check_alignment(config)


def _check_alignment(config: ml_collections.ConfigDict) -> None:
    """Whatever happens between steps happens between calls."""
    together = config.train.steps_per_call
    for group, key in (
        ("train", "num_steps"),
        ("train", "eval_every"),
        ("checkpoint", "every_steps"),
        ("checkpoint", "stop_at"),
        ("log", "every_steps"),
    ):
        value = config[group][key]
        if value % together:
            near = [n for n in (value - value % together, value + -value % together) if n]
            raise UserError(
                f"config.{group}.{key} ({value}) must be a multiple of config.train.steps_per_call "
                f"({together}): {' or '.join(map(str, near))}."
            )
