"""The pure train and evaluation steps, and their compilation: once per size bucket.

Law 4: sums and counts leave the step. The gradient is that of the masked *sum* of the
loss, divided afterwards by the nominal batch size, so that padding weighs nothing, a batch
of three leftover graphs is not a full step, and one all-reduce does for all that is repeated.

Each device computes its own graphs under `jax.shard_map`, so the collectives over `data` and
`fsdp` are those written in `demetar.sharding` and no others; only the axis `model`, if any, is
left to the compiler. The optimizer works on whatever part of the state a device holds.
"""

import concurrent.futures
import time
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from data_pipelines.graph import Array, Graph
from demetar.job.watch import Watch
from demetar.training import sharding
from demetar.training.objective import TargetErrors, graph_errors
from demetar.training.state import TrainState


@flax.struct.dataclass
class StepSums:
    """What the host needs of one training step.

    Attributes:
      loss: [] sum over graphs and targets of the loss, standardised units.
      errors: sum of the metric and count.
      grad_norm: [] global norm of the (averaged) gradient, before clipping.
      graph_loss: [B] per graph, to name the graphs behind a loss that is not finite.
      stop: [] above 0 if any process was asked to stop.
    """

    loss: Array
    errors: TargetErrors
    grad_norm: Array
    graph_loss: Array
    stop: Array


def make_train_step(
    model,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    param_specs,
    *,
    loss: str,
    metric: str,
    seed: int,
    ema_decay: float,
    accumulation: int = 1,
) -> Callable[[TrainState, Graph, Array, Array], tuple[TrainState, StepSums]]:
    """`(state, batch, stop, lr_scale) -> (state, sums)`; randomness is fold_in(seed, step).

    Args:
      param_specs: how the parameters lie on `mesh`.
      loss: of `task.ERRORS`, what is differentiated.
      metric: of `task.ERRORS`, what is logged.
    """
    has_dropout = getattr(model, "dropout", 0.0) > 0

    def micro_step(params, batch: Graph, keys_B):
        """Gradient of the summed loss, the sums, and each graph's loss."""

        def summed_loss(params):
            def predict(graph, key):
                rngs = {"dropout": key}
                return model.apply({"params": params}, graph, not has_dropout, rngs=rngs)

            prediction = jax.vmap(predict)(batch, keys_B)
            loss_BxT = graph_errors(loss, prediction, batch)
            loss_B = jnp.where(batch.graph_mask, loss_BxT.mean(axis=1), 0.0)
            error_BxT = graph_errors(metric, prediction, batch)
            errors = TargetErrors.from_model_output(error_BxT, batch.graph_mask)
            return loss_B.sum(), (loss_B, errors)

        (total, (loss_B, errors)), grad = jax.value_and_grad(summed_loss, has_aux=True)(params)
        return grad, (total, errors), loss_B

    def gradient(params, batch: Graph, stop_1: Array, key):
        """On one device, with its graphs: gradient and sums over the graphs of all."""
        params = sharding.gather_params(params, param_specs)
        num_rows = len(batch.graph_mask)
        first_row = jax.lax.axis_index(sharding.BATCH_AXES) * num_rows
        # By row of the global batch: a graph's randomness does not depend on its device.
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(num_rows))
        if accumulation == 1:
            grad, sums, loss_B = micro_step(params, batch, keys_B)
        else:
            grad, sums, loss_B = _accumulate(micro_step, params, batch, keys_B)
        sums = (*sums, stop_1.sum())
        grad, sums = sharding.sum_gradients(grad, sums, param_specs)
        return grad, sums, loss_B

    def _accumulate(micro_step, params, batch, keys_B):
        """The same over `accumulation` micro-batches, one after the other."""
        split = lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        micro_batches = jax.tree.map(split, (batch, keys_B))

        def body(so_far, micro_batch):
            grad, sums, loss_B = micro_step(params, *micro_batch)
            return jax.tree.map(jnp.add, so_far, (grad, sums)), loss_B

        one = jax.tree.map(lambda x: x[0], micro_batches)
        grad, sums, _ = jax.eval_shape(micro_step, params, *one)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grad, sums))
        (grad, sums), loss_AxB = jax.lax.scan(body, zeros, micro_batches)
        return grad, sums, loss_AxB.swapaxes(0, 1).reshape(-1)

    split_gradient = _on_each_device(
        gradient,
        mesh,
        in_specs=(param_specs, P(sharding.BATCH_AXES), P(sharding.BATCH_AXES), P()),
        out_specs=(param_specs, P(), P(sharding.BATCH_AXES)),
    )

    def train_step(state: TrainState, batch: Graph, stop: Array, lr_scale: Array):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad, (total, errors, stop), loss_B = split_gradient(state.params, batch, stop, key)
        batch_size = batch.graph_mask.shape[0]
        grad = jax.tree.map(lambda g: g / batch_size, grad)
        updates, opt_state = tx.update(grad, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: u * lr_scale.astype(u.dtype), updates)
        params = optax.apply_updates(state.params, updates)
        # Early on the average follows faster, or it would remember the random start.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(
            lambda e, p: (e + (1 - decay) * (p - e)).astype(p.dtype), state.ema, params
        )
        sums = StepSums(total, errors, optax.global_norm(grad), loss_B, stop)
        return TrainState(state.step + 1, params, opt_state, ema), sums

    return train_step


def several_steps(train_step) -> Callable:
    """The same for batches [steps, B, ...]: sums have a leading axis of steps, too.

    One call of the device for many small steps, whose dispatch would take longer than they do.
    """

    def call(state: TrainState, batches: Graph, stop: Array, lr_scale: Array):
        one = lambda state, batch: train_step(state, batch, stop, lr_scale)
        return jax.lax.scan(one, state, batches)

    return call


def make_eval_step(model, mesh: Mesh, param_specs, metric: str) -> Callable:
    """`(params, batch, stop) -> ((errors, stop), errors [B, T], predictions)`, no dropout.

    All of it whole on every device, so that any process can report.
    """

    def evaluate(params, batch: Graph, stop_1: Array):
        params = sharding.gather_params(params, param_specs)
        predict = lambda graph: model.apply({"params": params}, graph)
        prediction = jax.vmap(predict)(batch)
        error_BxT = graph_errors(metric, prediction, batch)
        errors = TargetErrors.from_model_output(error_BxT, batch.graph_mask)
        sums = sharding.sum_over((errors, stop_1.sum()), sharding.BATCH_AXES)
        return sums, *sharding.gather_rows((error_BxT, prediction))

    rows = P(sharding.BATCH_AXES)
    return _on_each_device(evaluate, mesh, in_specs=(param_specs, rows, rows), out_specs=P())


def _on_each_device(function, mesh: Mesh, *, in_specs, out_specs):
    """`jax.shard_map` over the batch axes; an axis `model` stays the compiler's."""
    batch_axes_alone = lambda spec: P(*(a if a != "model" else None for a in spec))
    return jax.shard_map(
        function,
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
      watch: is told of compiling, which may take long.
      arguments: bucket -> what `jitted` takes, as shapes; None: only the first call knows.
    """

    def __init__(
        self,
        jitted,
        num_buckets: int,
        watch: Watch | None = None,
        arguments: Callable[[int], tuple] | None = None,
    ):
        self._jitted, self._watch, self._arguments = jitted, watch, arguments
        self._programs = [None] * num_buckets
        self._ahead: dict[int, concurrent.futures.Future] = {}
        self.compile_seconds = 0.0

    def compile_ahead(self, executor: concurrent.futures.Executor) -> None:
        """Compiles all buckets on another thread, while the first that is there computes."""
        for bucket, program in enumerate(self._programs):
            if program is None:
                self._ahead[bucket] = executor.submit(self._compile, bucket)

    def program(self, bucket: int):
        """The compiled program of a bucket that was called before."""
        return self._programs[bucket]

    def __call__(self, bucket: int, *args):
        if self._programs[bucket] is None:
            start = time.perf_counter()
            if self._watch is not None:
                self._watch.phase("compile")
            ahead = self._ahead.pop(bucket, None)
            if ahead is None or ahead.cancel():  # nobody has begun with it
                self._programs[bucket] = self._jitted.lower(*args).compile()
            else:
                self._programs[bucket] = ahead.result()
            if self._watch is not None:
                self._watch.phase("step")
            self.compile_seconds += time.perf_counter() - start
        # A compiled function refuses any other shape: nothing recompiles silently.
        return self._programs[bucket](*args)

    def _compile(self, bucket: int):
        return self._jitted.lower(*self._arguments(bucket)).compile()
