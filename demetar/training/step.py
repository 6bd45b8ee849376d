"""The pure train and evaluation steps, and their compilation: once per size bucket.

Law 4: sums and counts leave the step. The gradient is that of the masked *sum* of the
loss, divided afterwards by the nominal batch size, so that padding weighs nothing, a batch
of three leftover graphs is not a full step, and sums travel with the gradients.

Each device computes its own graphs under `jax.shard_map`, so the collectives over `data` and `fsdp`
are those written in `demetar.training.gradients` and `sharding`; only the axis `model`, if any, and
the norm of what is divided are left to the compiler. The optimizer works on whatever part of the
state a device holds.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from data_pipelines.graph import Array, Graph
from demetar.job.watch import UNWATCHED, Unwatched, Watch
from demetar.models import fused_attention, ops, predict
from demetar.models.base import GraphModel
from demetar.training import sharding
from demetar.training.gradients import global_norm, order_of_backward, sum_gradients
from demetar.training.objective import Objective, TargetErrors
from demetar.training.state import TrainState


@flax.struct.dataclass
class StepSums:
    """What the host needs of one training step.

    Attributes:
      loss: [] sum over graphs of the loss, standardised units.
      graphs: [] how many there are.
      errors: sums and counts of the reported measure of each target.
      grad_norm: [] global norm of the (averaged) gradient, before clipping.
      graph_loss: [B] per graph, to name the graphs behind a loss that is not finite.
      stop: [] above 0 if any process was asked to stop.
    """

    loss: Array
    graphs: Array
    errors: TargetErrors
    grad_norm: Array
    graph_loss: Array
    stop: Array


def make_train_step(
    gradient: Callable,
    tx: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    param_specs,
    *,
    seed: int,
    ema_decay: float,
    num_groups: int,
) -> Callable[[TrainState, Graph, Array, Array], tuple[TrainState, StepSums]]:
    """`(state, batch, stop, lr_scale) -> (state, sums)`; randomness is fold_in(seed, step).

    Args:
      gradient: of `gradients.make_gradient`.
      tx: of `optim.make_optimizer`.
      mesh: of the devices.
      param_specs: how the parameters lie on `mesh`.
      seed: of dropout.
      ema_decay: of the moving average of the parameters.
      num_groups: in which gradients are added up.
    """

    def of_device(params, batch: Graph, stop_1: Array, key):
        """On one device, with its graphs: `sum_gradients` over those of all, its own losses."""
        params = sharding.gather_params(params, param_specs)
        num_rows = len(batch.graph_mask)
        first_row = jax.lax.axis_index(sharding.BATCH_AXES) * num_rows
        # By row of the global batch: a graph's randomness does not depend on its device.
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(num_rows))
        grad, sums, loss_B = gradient(params, batch, keys_B)
        # Traced once more: not where there is nothing to order.
        ready = order_of_backward(gradient, params, batch, keys_B) if num_groups > 1 else None
        sums = (*sums, stop_1.sum())
        return *sum_gradients(grad, sums, param_specs, ready, num_groups), loss_B

    rows = P(sharding.BATCH_AXES)
    of_all = _on_each_device(
        of_device,
        mesh,
        in_specs=(param_specs, rows, rows, P()),
        out_specs=(param_specs, P(), P(), rows),
    )

    def train_step(state: TrainState, batch: Graph, stop: Array, lr_scale: Array):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad, sums, square, loss_B = of_all(state.params, batch, stop, key)
        total, graphs, errors, stop = sums
        batch_size = batch.graph_mask.shape[0]
        norm = global_norm(grad, param_specs, square) / batch_size
        grad = jax.tree.map(lambda g: g / batch_size, grad)
        updates, opt_state = tx.update(grad, state.opt_state, state.params, grad_norm=norm)
        updates = jax.tree.map(lambda u: u * lr_scale.astype(u.dtype), updates)
        params = optax.apply_updates(state.params, updates)
        # Early on the average follows faster, or it would remember the random start.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(
            lambda e, p: (e + (1 - decay) * (p - e)).astype(p.dtype), state.ema, params
        )
        sums = StepSums(total, graphs, errors, norm, loss_B, stop)
        return TrainState(state.step + 1, params, opt_state, ema), sums

    return train_step


def make_eval_step(model: GraphModel, mesh: Mesh, param_specs, objective: Objective) -> Callable:
    """`(params, batch, stop) -> ((errors, stop), errors [B, T], predictions)`, no dropout.

    All of it whole on every device, so that any process can report.
    """

    def evaluate(params, batch: Graph, stop_1: Array):
        params = sharding.gather_params(params, param_specs)
        predictions = predict(model, params, batch)
        error_BxT, labelled_BxT = objective.errors_BxT(predictions, batch)
        errors = TargetErrors.from_model_output(error_BxT, labelled_BxT)
        sums = sharding.sum_over((errors, stop_1.sum()), sharding.BATCH_AXES)
        return sums, *sharding.gather_rows((error_BxT, predictions))

    rows = P(sharding.BATCH_AXES)
    return _on_each_device(evaluate, mesh, in_specs=(param_specs, rows, rows), out_specs=P())


def _on_each_device(function, mesh: Mesh, *, in_specs, out_specs):
    """`jax.shard_map` over the batch axes; an axis `model` stays the compiler's."""
    # Kernels of ours: the compiler cannot divide them over `model`.
    may_fuse = fused_attention.is_for(mesh.devices.flat[0]) and mesh.shape["model"] == 1

    @functools.wraps(function)
    def traced(*args):
        with ops.fused(may_fuse):
            return function(*args)

    batch_axes_alone = lambda spec: P(*(a if a != "model" else None for a in spec))
    return jax.shard_map(
        traced,
        mesh=mesh,
        in_specs=jax.tree.map(batch_axes_alone, in_specs),
        out_specs=jax.tree.map(batch_axes_alone, out_specs),
        axis_names=set(sharding.BATCH_AXES),
        check_vma=False,
    )


class CompiledPerBucket:
    """A jitted function compiled ahead of time for each bucket, never for another shape.

    Args:
      jitted: of `jax.jit`.
      num_buckets: how many shapes there are.
      arguments: bucket -> what `jitted` takes, as shapes.
      watch: is told of compiling, which may take long.
    """

    def __init__(
        self,
        jitted,
        num_buckets: int,
        arguments: Callable[[int], tuple],
        watch: Watch | Unwatched = UNWATCHED,
    ):
        self.jitted, self.abstract_arguments = jitted, arguments
        self._watch = watch
        self._programs = [None] * num_buckets
        self._ahead: dict[int, concurrent.futures.Future] = {}
        self.compile_seconds = 0.0

    def compile_ahead(self, executor: concurrent.futures.Executor) -> None:
        """Compiles all buckets on another thread, while the first that is there computes."""
        for bucket, program in enumerate(self._programs):
            if program is None:
                self._ahead[bucket] = executor.submit(self._compile, bucket)

    def program(self, bucket: int):
        """The compiled program of a bucket, compiled first where needed."""
        if self._programs[bucket] is None:
            start = time.perf_counter()
            self._watch.phase("compile")
            ahead = self._ahead.pop(bucket, None)
            if ahead is None or ahead.cancel():  # nobody has begun with it
                self._programs[bucket] = self._compile(bucket)
            else:
                self._programs[bucket] = ahead.result()
            self._watch.phase("step")
            self.compile_seconds += time.perf_counter() - start
        return self._programs[bucket]

    def __call__(self, bucket: int, *args):
        # A compiled function refuses any other shape: nothing recompiles silently.
        return self.program(bucket)(*args)

    def _compile(self, bucket: int):
        return self.jitted.lower(*self.abstract_arguments(bucket)).compile()
