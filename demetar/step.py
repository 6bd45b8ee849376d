"""The pure train and evaluation steps, and their compilation: once per size bucket.

Law 4: sums and counts leave the step. The gradient is that of the masked *sum* of the
loss, divided afterwards by the nominal batch size, so that padding weighs nothing, a batch
of three leftover graphs is not a full step, and one all-reduce does for everything.
"""

import time
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from demetar.graph import Array, Graph
from demetar.state import TrainState
from demetar.task import TargetErrors, graph_errors


@flax.struct.dataclass
class StepSums:
    """What the host needs of one training step.

    Attributes:
      loss: [] sum over graphs and targets of the loss, standardised units.
      errors: sum of the metric and count.
      grad_norm: [] global norm of the (averaged) gradient, before clipping.
      graph_loss: [B] per graph, to name the graphs behind a loss that is not finite.
    """

    loss: Array
    errors: TargetErrors
    grad_norm: Array
    graph_loss: Array


def make_train_step(
    model,
    tx: optax.GradientTransformation,
    *,
    loss: str,
    metric: str,
    seed: int,
    ema_decay: float,
    accumulation: int = 1,
) -> Callable[[TrainState, Graph, Array], tuple[TrainState, StepSums]]:
    """`(state, batch, lr_scale) -> (state, sums)`; randomness is fold_in(seed, step).

    Args:
      loss: of `task.ERRORS`, what is differentiated.
      metric: of `task.ERRORS`, what is logged.
    """
    has_dropout = getattr(model, "dropout", 0.0) > 0

    def micro_step(params, batch: Graph, key):
        """Gradient of the summed loss, and the sums."""

        def summed_loss(params):
            def predict(graph, key):
                rngs = {"dropout": key}
                return model.apply({"params": params}, graph, not has_dropout, rngs=rngs)

            keys_B = jax.random.split(key, len(batch.graph_mask))
            prediction = jax.vmap(predict)(batch, keys_B)
            loss_BxT = graph_errors(loss, prediction, batch)
            loss_B = jnp.where(batch.graph_mask, loss_BxT.mean(axis=1), 0.0)
            error_BxT = graph_errors(metric, prediction, batch)
            errors = TargetErrors.from_model_output(error_BxT, batch.graph_mask)
            return loss_B.sum(), (loss_B, errors)

        (total, (loss_B, errors)), grad = jax.value_and_grad(summed_loss, has_aux=True)(params)
        return grad, total, errors, loss_B

    def train_step(state: TrainState, batch: Graph, lr_scale: Array):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulation == 1:
            grad, total, errors, loss_B = micro_step(state.params, batch, key)
        else:
            grad, total, errors, loss_B = _accumulate(micro_step, state.params, batch, key)
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
        sums = StepSums(total, errors, optax.global_norm(grad), loss_B)
        return TrainState(state.step + 1, params, opt_state, ema), sums

    def _accumulate(micro_step, params, batch, key):
        """The same sums over `accumulation` micro-batches, one after the other."""
        # Row r goes to micro-batch r % A, so that every device keeps its own rows.
        split = lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        micro_batches = jax.tree.map(split, batch)

        def body(sums_so_far, scanned):
            number, micro_batch = scanned
            *sums, loss_B = micro_step(params, micro_batch, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, sums_so_far, tuple(sums)), loss_B

        one = jax.tree.map(lambda x: x[0], micro_batches)
        *shapes, _ = jax.eval_shape(micro_step, params, one, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tuple(shapes))
        (grad, total, errors), loss_AxB = jax.lax.scan(
            body, zeros, (jnp.arange(accumulation), micro_batches)
        )
        return grad, total, errors, loss_AxB.swapaxes(0, 1).reshape(-1)

    return train_step


def make_eval_step(model, metric: str) -> Callable:
    """`(params, batch) -> (TargetErrors, errors [B, T], predictions)`, without dropout."""

    def eval_step(params, batch: Graph):
        predict = lambda graph: model.apply({"params": params}, graph)
        prediction = jax.vmap(predict)(batch)
        error_BxT = graph_errors(metric, prediction, batch)
        return TargetErrors.from_model_output(error_BxT, batch.graph_mask), error_BxT, prediction

    return eval_step


class CompiledPerBucket:
    """A jitted function compiled ahead of time for each bucket, never for another shape."""

    def __init__(self, jitted, num_buckets: int):
        self._jitted = jitted
        self._compiled = [None] * num_buckets
        self.compile_seconds = 0.0

    def __call__(self, bucket: int, *args):
        if self._compiled[bucket] is None:
            start = time.perf_counter()
            self._compiled[bucket] = self._jitted.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - start
        # A compiled function refuses any other shape: nothing recompiles silently.
        return self._compiled[bucket](*args)
