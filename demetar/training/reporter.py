"""What a run tells while it trains: the card at its start, metrics, progress lines."""

import concurrent.futures
import pathlib

import jax
import numpy as np
from clu import parameter_overview

from demetar.exits import NonFiniteLoss
from demetar.job.job import Job
from demetar.records import log
from demetar.records.metrics import Writers
from demetar.speed.machine import Peak
from demetar.speed.pace import Pace
from demetar.training import runtime
from demetar.training.evaluator import Outcome, metrics_text, reported_metrics
from demetar.training.progress import Progress
from demetar.training.state import TrainState
from demetar.training.step import StepSums
from demetar.training.trainer import Trainer


class Reporter:
    """Takes note of what the steps did; writes it for programs and says it to a person.

    Args:
      trainer: whose steps these are.
      workdir: of the run.
      progress: of the run; its window is filled and emptied here.
      job: whose process 0 alone writes.
      step: from which the run goes on.
    """

    def __init__(
        self, trainer: Trainer, workdir: pathlib.Path, progress: Progress, job: Job, step: int
    ):
        self._trainer, self._experiment = trainer, trainer.experiment
        self._workdir, self._progress, self._job = workdir, progress, job
        config = self._experiment.config
        self._num_steps = config.train.num_steps
        self._writers = Writers(
            workdir,
            step,
            progress.last_eval_step,
            self._experiment.identity["config"],
            config.log.writers,
            config.log.project,
            job.is_main,
        )
        self._cost: concurrent.futures.Future | None = None
        self._pace = Pace(step, self._num_steps, self.work_of)
        self._peak = Peak(runtime.cache_dir(config), config.model.dtype, job.count)

    # --- taking note -----------------------------------------------------------------------------

    def collect(self, sums: StepSums, step: int) -> bool:
        """Adds the sums of a step to the window; returns whether any process was asked to stop.

        Stops the run if the loss or the gradient is not finite.
        """
        on_host = jax.device_get(sums.replace(graph_loss=None))
        loss, grad_norm = float(on_host.loss), float(on_host.grad_norm)
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            items = self._experiment.dataset.items
            self.close()  # what went well so far is written
            raise NonFiniteLoss(
                f"Step {step}: the loss is {loss}, the norm of the gradient {grad_norm}. "
                f"{self._blame(sums, step)} Nothing of this step was saved. Look at these {items}, "
                "lower config.optim.learning_rate or config.optim.clip_norm, or raise "
                "config.optim.warmup_steps."
            )
        errors = on_host.errors
        graphs = float(on_host.graphs)
        self._progress.window.add(loss, graphs, errors.total, errors.count, grad_norm)
        self._pace.add(step)
        return bool(on_host.stop)

    def waited(self, seconds: float) -> None:
        """The devices had nothing to do, for want of a batch, for so long."""
        self._pace.waited(seconds)

    def count_operations(self) -> None:
        """On a thread beside the steps: what a graph costs, for the share of the peak."""
        self._cost = self._job.background.submit(lambda: self._experiment.graph_cost)
        self._cost.add_done_callback(_say_failure)

    def work_of(self, steps: list[int]) -> tuple:
        """(graphs, operations or None, nodes, slots for nodes) of these steps, by the plan."""
        plan, sizes = self._trainer.plan, self._experiment.arrays.sizes
        batches = [plan[step - 1] for step in steps]
        graphs = np.concatenate([graphs_B for _, graphs_B in batches] or [np.zeros(0, np.int64)])
        graphs = graphs[graphs >= 0]
        nodes, edges = sizes.num_nodes[graphs], sizes.num_edges[graphs]
        slots = plan.batch_size * sum(plan.buckets[bucket].num_nodes for bucket, _ in batches)
        known = self._cost is not None and self._cost.done() and not self._cost.exception()
        flops = self._cost.result().flops(nodes, edges).sum() if known else None
        return len(graphs), flops, nodes.sum(), slots

    def _blame(self, sums: StepSums, step: int) -> str:
        """Which graphs, of this process's rows, made a step not finite."""
        experiment, graphs_B = self._experiment, self._trainer.plan[step - 1][1]
        bad, items = [], experiment.dataset.items
        for shard in sums.graph_loss.addressable_shards:
            bad += graphs_B[shard.index][~np.isfinite(np.asarray(shard.data))].tolist()
        numbers = lambda graphs: ", ".join(str(experiment.arrays.index[g]) for g in graphs[:16])
        if bad:
            return f"Not finite: {items} {numbers(bad)}{' ...' if len(bad) > 16 else ''}."
        return f"Each loss is finite; the batch is {items} {numbers(graphs_B[graphs_B >= 0])} ...."

    # --- telling ---------------------------------------------------------------------------------

    def card(self, state: TrainState, step: int) -> None:
        """What runs, on what, from what: once, at the start."""
        experiment, plan, dataset = self._experiment, self._trainer.plan, self._experiment.dataset
        rows = {
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh "
            f"{dict(experiment.mesh.shape)}",
            "peak": f"{self._peak}",
            "processes": f"{self._job.count}, placed by {self._job.source}",
            **dataset.about,
            "targets": ", ".join(f"{t.name} [{t.unit}]" for t in dataset.targets),
            "split": f"{dataset.split_name}: "
            + ", ".join(f"{len(graphs)} {part}" for part, graphs in dataset.split.items()),
            "batches": f"{plan.batch_size} {dataset.items}, {plan.steps_per_epoch} steps an epoch, "
            f"{self._num_steps} steps",
            "buckets": ", ".join(f"{b.num_nodes}/{b.num_edges}" for b in plan.buckets)
            + f" (nodes/edges); {plan.node_efficiency:.1%} of node slots are used",
        }
        log.say(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        log.say(f"demetar  {self._workdir}  {'resumed at' if step else 'starts at'} step {step}")
        for name, text in rows.items():
            log.say(f"  {name:9} {text}")

    def progress_line(self, step: int) -> None:
        """One line of metrics and one for the person who watches; starts a new window."""
        experiment, progress, window = self._experiment, self._progress, self._progress.window
        dataset, targets = experiment.dataset, experiment.objective.targets
        errors = reported_metrics(
            window.mean_errors(),
            dataset,
            targets,
            experiment.normalizations,
            dataset.split["train"],
        )
        values = {"loss": window.mean_loss(), "grad_norm": window.grad_norm}
        values |= {f"{t.name}_{t.metric}": errors[t.name] for t in targets}
        rate = float(experiment.schedule(step - 1)) * progress.plateau.scale
        values["learning_rate"] = rate
        self._writers.write(step, "train", values)
        progress.next_window()
        lap = self._pace.lap(step)
        speed, share = {"rate": lap.rate, "fill": lap.fill, "data_wait": lap.wait}, ""
        if lap.flops is not None:  # counted on a thread, after compiling
            speed["share_of_peak"] = self._peak.share(lap.flops)
            share = f"{self._peak.text(speed['share_of_peak'])}, "
        self._writers.write_speed(step, speed)
        validation = progress.validation and f"  validation {progress.validation}"
        log.say(
            f"step {step}/{self._num_steps}  train {metrics_text(targets, errors)}{validation}  "
            f"lr {rate:.2e}  {lap.rate:.0f} {dataset.items}/s, {share}fill {lap.fill:.1%}, "
            f"data wait {lap.wait:.1%}  ETA {log.duration(lap.left)}"
        )

    def evaluation(self, step: int, outcome: Outcome, best: bool, seconds: float) -> None:
        """Writes a validation and says it."""
        self._writers.write(step, "validation", outcome.values() | {"score": outcome.score})
        log.say(
            f"step {step}  validation {outcome.text()}{'  (best)' if best else ''}  "
            f"{outcome.count} {outcome.dataset.items} in {seconds:.1f} s"
        )

    def first_step(self, seconds: float) -> None:
        """How long it took to get going."""
        log.say(
            f"First step after {seconds:.1f} s, of which {self._trainer.compile_seconds:.1f} s "
            "compiling its bucket."
        )

    def close(self) -> None:
        self._writers.close()


def _say_failure(counting: concurrent.futures.Future) -> None:
    """Where operations could not be counted, progress lines lack the share of the peak: say why."""
    if not counting.cancelled() and (error := counting.exception()):
        log.complain(f"The operations of a graph could not be counted: {error!r}")
