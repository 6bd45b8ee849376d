"""The training loop: the file to read first, top to bottom.

`train_and_evaluate(config, workdir)` starts a run or goes on with the one in `workdir`; both
are the same code path. Everything of a run is a function of its config and the step: the
data order (`data_pipelines.plan`), the randomness (`fold_in(seed, step)`), when to log,
evaluate and save. What is neither (best score, plateau) is `progress`, saved with the state.
"""

import concurrent.futures
import pathlib
import time

import jax
import numpy as np
from clu import parameter_overview

from data_pipelines import batching
from data_pipelines.batch_plan import BatchPlan
from demetar.config import stored
from demetar.exits import NonFiniteLoss, Preempted
from demetar.job.job import Job, code_sha256
from demetar.job.watch import Watch
from demetar.records import files, graph_log, log, metrics
from demetar.records.log import say
from demetar.speed.machine import measured_machine
from demetar.speed.pace import Pace
from demetar.training import runtime, sharding
from demetar.training.checkpoints import Checkpoints
from demetar.training.evaluator import Evaluator, error_text, save_result
from demetar.training.experiment import Experiment, build_experiment
from demetar.training.objective import error_scale
from demetar.training.optim import plateau_step
from demetar.training.state import TrainState
from demetar.training.step import CompiledPerBucket, StepSums, make_train_step, several_steps


def train_and_evaluate(config, workdir: pathlib.Path, job: Job) -> dict:
    """Trains to `config.train.num_steps`, evaluates the best weights once on test.

    All processes of `job` run it together and take every branch alike: what is neither in the
    config nor in the state (a signal) is added up by the step before anyone acts on it.

    Returns:
      What `result.json` holds.
    """
    start_time = time.perf_counter()

    ### Data, mesh, model, optimizer: all that follows from the config alone.
    job.watch.phase("data")
    experiment = build_experiment(config)
    if job.is_main:
        prepare_workdir(workdir, experiment.identity)
    if job.decide("finished", (workdir / "result.json").exists()):
        say(f"The run in {workdir} is finished: see result.json. Nothing to do.")
        return files.read_json(workdir / "result.json")
    plan = BatchPlan(
        experiment.arrays.sizes,
        experiment.dataset.split["train"],
        experiment.dataset.buckets,
        config.data.batch_size,
        config.seed,
    )
    train_step = compiled_train_step(experiment, job.watch)
    evaluator = Evaluator(experiment, job)
    peak_flops = job.count * measured_machine(runtime.cache_dir(config), config.model.dtype).flops

    ### State: restored from this workdir or, where there is nothing, created.
    checkpoints = Checkpoints(workdir, config.checkpoint.keep_last, job)
    first_step = checkpoints.latest_step() or 0
    job.watch.phase("data", first_step)
    job.check_progress(first_step)
    job.agree(
        experiment.identity
        | {"code": code_sha256(), "batch plan": plan.fingerprint(), "checkpoint": first_step}
    )
    if checkpoints.latest_step() is None:
        state = experiment.create_state()
        progress = new_progress(len(experiment.dataset.targets))
    else:
        meta = checkpoints.meta(first_step)
        progress = meta.pop("progress")
        stored.check_same_run(meta, experiment.identity, workdir)
        state = checkpoints.restore(first_step, experiment.abstract_state())
    print_card(experiment, workdir, plan, state, first_step, job)

    ### The loop.
    num_steps = config.train.num_steps
    loop_start = time.perf_counter() - progress["train_seconds"]  # as if never stopped
    write = metrics.Writers(workdir, first_step, progress["last_eval_step"], job.is_main)
    identity_log = graph_log.IdentityLog(workdir, job.process) if config.log.identity else None
    graph_cost = concurrent.futures.Future()
    pace = new_pace(experiment, plan, first_step, graph_cost)
    rows = sharding.process_rows(experiment.mesh, config.data.batch_size)
    train_iter = batching.batches(
        experiment.arrays,
        plan,
        rows,
        range(first_step, num_steps),
        config.data.prefetch_threads,
        config.data.prefetch_batches,
    )
    together = config.train.steps_per_call  # all below happens between calls of the device
    step, saved_step = first_step, first_step
    stop = False  # the same on all processes
    pending: StepSums | None = None  # sums of the call before, still on the device

    def save():
        nonlocal saved_step
        job.watch.phase("save", step)
        progress["train_seconds"] = time.perf_counter() - loop_start
        checkpoints.save(state, experiment.identity | {"progress": progress})
        saved_step = step

    while True:
        stop = stop or 0 < config.checkpoint.stop_at == step
        # The host reads the sums of step k after step k + 1 is dispatched; before it
        # evaluates, saves or logs it must have them all.
        evaluates = step > progress["last_eval_step"] and (
            step == num_steps or (step > 0 and step % config.train.eval_every == 0)
        )
        saves = step > saved_step and step % config.checkpoint.every_steps == 0
        logs = step > first_step and (step % config.log.every_steps == 0 or step == num_steps)
        if pending is not None and (evaluates or saves or logs or stop):
            stop = accumulate(progress, pending, experiment, plan, pace, step) or stop
            pending = None
        if logs:
            log_train(write, progress, pace, experiment, step, peak_flops)
        score = evaluate(evaluator, state, step, progress, write) if evaluates else None
        if score is not None:
            if config.optim.schedule == "plateau":
                plateau = config.optim.plateau
                plateau_step(progress, score, plateau.factor, plateau.patience, plateau.min_scale)
            save()
        elif saves or ((stop or evaluates) and step > saved_step):
            save()
        stop = stop or (evaluates and score is None)
        if stop or step == num_steps:
            break

        job.watch.phase("batch", step)
        waits_since = time.perf_counter()
        bucket, graphs = batching.stacked([next(train_iter) for _ in range(together)])
        if pending is None or pending.loss.is_ready():  # the devices had nothing to do meanwhile
            pace.waited(time.perf_counter() - waits_since)
        batch = sharding.to_devices(graphs, experiment.mesh, config.data.batch_size, together > 1)
        if identity_log is not None:
            identity_log.write_steps(step + 1, rows, graphs)
        job.watch.phase("step")
        asked = sharding.flags(experiment.mesh, bool(job.interruption.requested))
        lr_scale = np.float32(progress["lr_scale"])
        state, sums = train_step(bucket, state, batch, asked, lr_scale)
        step += together
        if step == first_step + together:
            jax.block_until_ready(sums)
            say(
                f"First step after {time.perf_counter() - start_time:.1f} s, of which "
                f"{train_step.compile_seconds:.1f} s compiling its bucket."
            )
            if jax.process_count() == 1:
                # Among several, on CPUs, compiling would keep gloo's idle thread from its turn.
                train_step.compile_ahead(job.background)
                evaluator.compile_ahead(job.background)
            job.background.submit(lambda: graph_cost.set_result(experiment.graph_cost))
        if pending is not None:
            stop = accumulate(progress, pending, experiment, plan, pace, step - together)
        pending = sums
        checkpoints.poll()

    ### The end.
    job.watch.phase("save", step)
    checkpoints.wait()
    write.close()
    result = {}
    if not stop:
        best_step = progress["best_step"]
        best = checkpoints.restore(best_step, experiment.abstract_state())
        result = save_result(
            workdir,
            evaluator,
            ema=best.ema,
            step=best_step,
            state=state,
            identity=experiment.identity,
            progress=progress,
        )
    checkpoints.close()
    if not result:
        if config.checkpoint.stop_at == step:
            why = f"config.checkpoint.stop_at={step}"
        else:
            why = job.interruption.requested or "a signal to another process"
        raise Preempted(f"Stopped by {why} after step {step} of {num_steps}, saved in {workdir}.")
    return result


# --- the pieces, in the order of their use -------------------------------------------------------


def prepare_workdir(workdir: pathlib.Path, identity: dict) -> None:
    """Writes config.json; refuses the folder of another run."""
    file = workdir / "config.json"
    started = (workdir / "result.json").exists() or any(workdir.glob("checkpoints/*/"))
    if file.exists() and started:
        stored.check_same_run(files.read_json(file), identity, workdir)
    else:
        files.write_json(file, identity)


def compiled_train_step(experiment: Experiment, watch: Watch | None = None) -> CompiledPerBucket:
    """The train step, compiled once per bucket."""
    buckets = experiment.dataset.buckets
    arguments = lambda bucket: abstract_arguments(experiment, bucket)
    return CompiledPerBucket(jitted_train_step(experiment), len(buckets), watch, arguments)


def abstract_arguments(experiment: Experiment, bucket: int) -> tuple:
    """What the train step takes, as shapes."""
    mesh, config = experiment.mesh, experiment.config
    batch = experiment.abstract_batch(experiment.dataset.buckets[bucket], config.data.batch_size)
    if config.train.steps_per_call > 1:
        stacked = sharding.over_batch(mesh, stacked=True)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (config.train.steps_per_call, *x.shape), x.dtype, sharding=stacked
            ),
            batch,
        )
    lr_scale = jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(mesh))
    return experiment.abstract_state(), batch, sharding.abstract_flags(mesh), lr_scale


def jitted_train_step(experiment: Experiment):
    """`jax.jit` of the train step, or of several: state donated, shardings fixed."""
    config, mesh = experiment.config, experiment.mesh
    specs = experiment.state_specs
    step = make_train_step(
        experiment.model,
        experiment.tx,
        mesh,
        specs.params,
        loss=config.train.loss,
        metric=experiment.dataset.metric,
        seed=config.seed,
        ema_decay=config.optim.ema_decay,
        accumulation=config.train.accumulation,
    )
    if config.train.steps_per_call > 1:
        step = several_steps(step)
    everywhere = sharding.replicated(mesh)
    split = sharding.over_batch(mesh, stacked=config.train.steps_per_call > 1)
    asked = sharding.over_all(mesh)
    state = sharding.named(mesh, specs)
    sums = StepSums(everywhere, everywhere, everywhere, graph_loss=split, stop=everywhere)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state, split, asked, everywhere),
        out_shardings=(state, sums),
    )


def new_progress(num_targets: int) -> dict:
    """State of a run that is neither data position nor arrays; saved with every checkpoint."""
    return {
        "best_score": float("inf"),
        "best_step": 0,
        "last_eval_step": 0,
        "validation": "",
        "plateau_best": float("inf"),
        "plateau_bad": 0,
        "lr_scale": 1.0,
        "train_seconds": 0.0,
        "window": {"loss": 0.0, "errors": [0.0] * num_targets, "count": 0.0, "grad_norm": 0.0},
    }


def new_pace(
    experiment: Experiment, plan: BatchPlan, step: int, cost: concurrent.futures.Future
) -> Pace:
    """Counts what the steps from `step` on do, by the plan; operations once `cost` is known."""
    sizes = experiment.arrays.sizes

    def work(steps: list[int]) -> tuple:
        batches = [plan[step - 1] for step in steps]
        graphs = np.concatenate([graphs_B for _, graphs_B in batches] or [np.zeros(0, np.int64)])
        graphs = graphs[graphs >= 0]
        nodes, edges = sizes.num_nodes[graphs], sizes.num_edges[graphs]
        slots = plan.batch_size * sum(plan.buckets[bucket].num_nodes for bucket, _ in batches)
        flops = cost.result().flops(nodes, edges).sum() if cost.done() else None
        return len(graphs), flops, nodes.sum(), slots

    return Pace(step, experiment.config.train.num_steps, work)


def accumulate(
    progress: dict,
    pending: StepSums,
    experiment: Experiment,
    plan: BatchPlan,
    pace: Pace,
    step: int,
) -> bool:
    """Adds the sums of a call, whose last step is `step`, to the window since the last log line.

    Returns whether any process was asked to stop. Stops the run if the loss or the gradient is
    not finite.
    """
    together = experiment.config.train.steps_per_call
    on_host = jax.device_get(pending.replace(graph_loss=None))
    window = progress["window"]
    for k in range(together):
        sums = jax.tree.map(lambda x: x[k], on_host) if together > 1 else on_host  # noqa: B023
        loss, grad_norm, number = float(sums.loss), float(sums.grad_norm), step - together + k + 1
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            place = k if together > 1 else None
            raise NonFiniteLoss(
                f"Step {number}: the loss is {loss}, the norm of the gradient {grad_norm}. "
                f"{blame(pending, place, experiment, plan, number)} Nothing of this step was "
                f"saved. Look at these {experiment.dataset.items}, lower "
                "config.optim.learning_rate or config.optim.clip_norm, or raise "
                "config.optim.warmup_steps."
            )
        window["loss"] += loss
        window["grad_norm"] = grad_norm
        window["count"] += float(sums.errors.count)
        total = np.asarray(sums.errors.total, np.float64)
        window["errors"] = [a + float(b) for a, b in zip(window["errors"], total, strict=True)]
        pace.add(number)
    return bool(np.any(on_host.stop))


def blame(
    sums: StepSums, place: int | None, experiment: Experiment, plan: BatchPlan, step: int
) -> str:
    """Which graphs (of this process's rows) made a step, in that place of a call, not finite."""
    _, graphs_B = plan[step - 1]
    bad, items = [], experiment.dataset.items
    for shard in sums.graph_loss.addressable_shards:
        graphs, loss_B = graphs_B[shard.index[-1]], np.asarray(shard.data)
        bad += graphs[~np.isfinite(loss_B if place is None else loss_B[place])].tolist()
    numbers = lambda graphs: ", ".join(str(experiment.arrays.index[g]) for g in graphs[:16])
    if bad:
        return f"Not finite: {items} {numbers(bad)}{' ...' if len(bad) > 16 else ''}."
    return f"Each loss is finite; the batch is {items} {numbers(graphs_B[graphs_B >= 0])} ...."


def log_train(
    write, progress: dict, pace, experiment: Experiment, step: int, peak_flops: float
) -> None:
    """One line of metrics and one for the person who watches; starts a new window."""
    window, dataset = progress["window"], experiment.dataset
    targets = dataset.targets
    num_steps = experiment.config.train.num_steps
    count = max(window["count"], 1.0)
    scale = error_scale(experiment.normalization, dataset.metric)
    error_T = np.array(window["errors"]) / count * scale
    values = {"loss": window["loss"] / count, "grad_norm": window["grad_norm"]}
    values |= {f"{t.name}_{t.metric}": e for t, e in zip(targets, error_T.tolist(), strict=True)}
    values["learning_rate"] = float(experiment.schedule(step - 1)) * progress["lr_scale"]
    write.write(step, "train", values)
    progress["window"] = new_progress(len(error_T))["window"]
    lap = pace.lap(step)
    speed = {"rate": lap.rate, "fill": lap.fill, "data_wait": lap.wait}
    share = ""
    if lap.flops is not None:  # counted on a thread, after compiling
        speed["share_of_peak"] = lap.flops / peak_flops
        share = f"{speed['share_of_peak']:.1%} of peak, "
    write.write_speed(step, speed)
    validation = progress["validation"] and f"  validation {progress['validation']}"
    say(
        f"step {step}/{num_steps}  train {error_text(dataset, error_T)}{validation}  "
        f"lr {values['learning_rate']:.2e}  {lap.rate:.0f} {dataset.items}/s, {share}"
        f"fill {lap.fill:.1%}, data wait {lap.wait:.1%}  ETA {log.duration(lap.left)}"
    )


def evaluate(evaluator: Evaluator, state: TrainState, step: int, progress: dict, write):
    """Validation error of the averaged weights; None if a signal cut it short.

    Then nothing is recorded, and a resume evaluates this step again.
    """
    start = time.perf_counter()
    outcome = evaluator.run(state.ema, "validation")
    if outcome is None:
        return None
    score, values = outcome.score, outcome.values()
    write.write(step, "validation", values | {"score": score})
    progress["last_eval_step"], progress["validation"] = step, outcome.text()
    best = score < progress["best_score"]
    if best:
        progress["best_score"], progress["best_step"] = score, step
    say(
        f"step {step}  validation {outcome.text()}{'  (best)' if best else ''}  "
        f"{outcome.count} {outcome.dataset.items} in {time.perf_counter() - start:.1f} s"
    )
    return score


def print_card(
    experiment: Experiment,
    workdir: pathlib.Path,
    plan: BatchPlan,
    state: TrainState,
    step: int,
    job: Job,
) -> None:
    """What runs, on what, from what: once, at the start."""
    config, mesh, dataset = experiment.config, experiment.mesh, experiment.dataset
    device = jax.devices()[0].device_kind
    rows = {
        "devices": f"{jax.device_count()} x {device}, mesh {dict(mesh.shape)}",
        "processes": f"{job.count}, placed by {job.source}",
        **dataset.about,
        "targets": ", ".join(f"{t.name} [{t.unit}]" for t in dataset.targets),
        "split": f"{dataset.split_name}: "
        + ", ".join(f"{len(graphs)} {part}" for part, graphs in dataset.split.items()),
        "batches": f"{plan.batch_size} {dataset.items}, {plan.steps_per_epoch} steps an epoch, "
        f"{config.train.num_steps} steps",
        "buckets": ", ".join(f"{b.num_nodes}/{b.num_edges}" for b in plan.buckets)
        + f" (nodes/edges); {plan.node_efficiency:.1%} of node slots are used",
    }
    say(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    say(f"demetar  {workdir}  {'resumed at' if step else 'starts at'} step {step}")
    for name, text in rows.items():
        say(f"  {name:9} {text}")
