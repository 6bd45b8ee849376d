"""The training loop: the file to read first, top to bottom.

`train_and_evaluate(config, workdir)` starts a run or goes on with the one in `workdir`; both
are the same code path. Everything of a run is a function of its config and the step: the
data order (`data_pipelines.batch_plan`), the randomness (`fold_in(seed, step)`), when to log,
evaluate and save. What is neither (best score, plateau) is `Progress`, saved with the state.
"""

import pathlib
import time

import jax

from demetar.config import stored
from demetar.exits import FilesGone, Preempted
from demetar.job.agreement import code_sha256
from demetar.job.job import Job
from demetar.records import files, graph_log, log
from demetar.training.checkpoints import Checkpoints
from demetar.training.evaluator import Evaluator
from demetar.training.experiment import Experiment, build_experiment
from demetar.training.optim import plateau_step
from demetar.training.progress import Progress
from demetar.training.reporter import Reporter
from demetar.training.result import final_result
from demetar.training.state import TrainState
from demetar.training.step import StepSums
from demetar.training.trainer import Trainer


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
        log.say(f"The run in {workdir} is finished: see result.json. Nothing to do.")
        return files.read_json(workdir / "result.json")
    trainer = Trainer(experiment, job.watch)
    evaluator = Evaluator(experiment, job)

    ### State: restored from this workdir or, where there is nothing, created.
    checkpoints = Checkpoints(workdir, config.checkpoint.keep_last, job)
    checkpoints.check_space(experiment.abstract_state())
    step = first_step = checkpoints.latest_step() or 0
    job.watch.phase("data", step)
    job.check_progress(step)
    job.agree(
        experiment.identity
        | {"code": code_sha256(), "batch plan": trainer.plan.fingerprint(), "checkpoint": step}
    )
    state, progress = restore_or_create(experiment, checkpoints, workdir)
    report = Reporter(trainer, workdir, progress, job, step)
    report.card(state, step)

    ### The loop. The host reads the sums of step k after step k + 1 is dispatched; before it
    ### evaluates, saves or logs it must have them all.
    num_steps = config.train.num_steps
    loop_start = time.perf_counter() - progress.train_seconds  # as if never stopped
    graphs_seen = graph_log.GraphLog(workdir, job.process) if config.log.graphs else None
    batches = trainer.batches(range(step, num_steps))
    saved_step, stop = step, False  # the same on all processes
    proven = step > 0  # that what this run saves can be restored: a resume has just done it
    pending: StepSums | None = None  # sums of the step before, still on the device
    while True:
        stop = stop or 0 < config.checkpoint.stop_at == step
        last = step == num_steps
        evaluates = step > progress.last_eval_step and (last or step % config.train.eval_every == 0)
        saves = step > saved_step and step % config.checkpoint.every_steps == 0
        logs = step > first_step and (last or step % config.log.every_steps == 0)
        if pending is not None and (evaluates or saves or logs or stop):
            stop = report.collect(pending, step) or stop
            pending = None
        if logs:
            report.progress_line(step)
        cut_short = evaluates and not evaluate(evaluator, state, step, progress, report, config)
        evaluated = evaluates and not cut_short
        if evaluated or saves or ((stop or cut_short) and step > saved_step):
            job.watch.phase("save", step)
            check_files(workdir, job)
            progress.train_seconds = time.perf_counter() - loop_start
            checkpoints.save(state, experiment.identity, progress)
            if not proven:
                state, proven = checkpoints.prove(state, progress), True
            saved_step = step
        stop = stop or cut_short
        if stop or last:
            break

        job.watch.phase("batch", step)
        waits_since = time.perf_counter()
        bucket, graphs = next(batches)
        if pending is None or pending.loss.is_ready():  # the devices had nothing to do meanwhile
            report.waited(time.perf_counter() - waits_since)
        if graphs_seen is not None:
            graphs_seen.write_step(step + 1, trainer.rows, graphs)
        batch = trainer.to_devices(graphs)
        job.watch.phase("step")
        stops, scale = bool(job.interruption.requested), progress.plateau.scale
        state, sums = trainer.step(state, bucket, batch, stops, scale)
        step += 1
        if step == first_step + 1:
            jax.block_until_ready(sums)
            report.first_step(time.perf_counter() - start_time)
            compile_the_rest(trainer, evaluator, job)
            report.count_operations()
        if pending is not None:
            stop = report.collect(pending, step - 1) or stop
        pending = sums
        checkpoints.poll()

    ### The end.
    job.watch.phase("save", step)
    checkpoints.wait()
    report.close()
    result = None  # if a signal has stopped the run, or stops the test
    if not stop:
        best = checkpoints.restore(progress.best_step, experiment.abstract_state())
        result = final_result(workdir, evaluator, experiment, best.ema, state, progress)
    checkpoints.close()
    check_files(workdir, job)
    if result is None:
        by = why_stopped(config, step, job)
        raise Preempted(f"Stopped by {by} after step {step} of {num_steps}, saved in {workdir}.")
    return result


# --- the pieces, in the order of their use -------------------------------------------------------


def prepare_workdir(workdir: pathlib.Path, identity: dict) -> None:
    """Writes config.json; refuses the folder of another run."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "config.json"
    started = (workdir / "result.json").exists() or any(workdir.glob("checkpoints/*/"))
    if file.exists() and started:
        stored.check_same_run(stored.read_identity(file), identity, workdir)
    else:
        files.write_json(file, identity)


def check_files(workdir: pathlib.Path, job: Job) -> None:
    """Stops a run whose files were deleted: what it writes from here on nobody would find."""
    gone = [name for name in ("config.json", "metrics.jsonl") if not (workdir / name).exists()]
    if job.is_main and gone:
        raise FilesGone(
            f"{' and '.join(gone)} of the run in {workdir} were deleted while it ran, so it cannot "
            "be resumed or read. Start it again with another --workdir; checkpoints that are left "
            f"are in {workdir / 'checkpoints'}."
        )


def restore_or_create(
    experiment: Experiment, checkpoints: Checkpoints, workdir: pathlib.Path
) -> tuple[TrainState, Progress]:
    """Of the newest whole checkpoint; or fresh where there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return experiment.create_state(), Progress.new(len(experiment.dataset.targets))
    identity, progress = checkpoints.meta(step)
    stored.check_same_run(identity, experiment.identity, workdir)
    best = progress.best_step
    if best and best not in checkpoints.all_steps():
        log.complain(
            f"The checkpoint of step {best}, which had the best validation score, is not there any "
            "more: the best of what comes now counts."
        )
        progress.forget_best(step)
    return checkpoints.restore(step, experiment.abstract_state()), progress


def evaluate(
    evaluator: Evaluator, state: TrainState, step: int, progress: Progress, report: Reporter, config
) -> bool:
    """Validation error of the averaged weights; False if a signal cut it short.

    Then nothing is recorded, and a resume evaluates this step again.
    """
    start = time.perf_counter()
    outcome = evaluator.run(state.ema, "validation")
    if outcome is None:
        return False
    best = progress.record_evaluation(step, outcome.score, outcome.text())
    report.evaluation(step, outcome, best, time.perf_counter() - start)
    optim = config.optim
    if optim.schedule == "plateau":
        progress.plateau = plateau_step(
            progress.plateau, outcome.score, optim.factor, optim.patience, optim.min_scale
        )
    return True


def compile_the_rest(trainer: Trainer, evaluator: Evaluator, job: Job) -> None:
    """Other buckets and the evaluation, on a thread, while the first bucket trains."""
    if job.count == 1:
        # Among several, on CPUs, compiling would keep gloo's idle thread from its turn.
        trainer.compile_ahead(job.background)
        evaluator.compile_ahead(job.background)


def why_stopped(config, step: int, job: Job) -> str:
    """What asked for a stop, for a person."""
    if config.checkpoint.stop_at == step:
        return f"config.checkpoint.stop_at={step} (drop or raise it to go on)"
    return job.interruption.requested or "a signal to another process"
