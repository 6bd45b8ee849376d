"""`result.json`: what a finished run or an evaluation says, with all that it depends on."""

import pathlib

import jax
import numpy as np

from demetar.records import files, plots
from demetar.training import sharding
from demetar.training.evaluator import Evaluator, Outcome, label_variance
from demetar.training.experiment import Experiment
from demetar.training.measures import MEASURES
from demetar.training.progress import Progress
from demetar.training.provenance import provenance
from demetar.training.state import TrainState, params_sha256, state_sha256


def result_of(outcome: Outcome, part: str, step: int, identity: dict) -> dict:
    """The part of `result.json` that an evaluation alone can say.

    Args:
      outcome: of the evaluation.
      part: of the data set.
      step: of the weights.
      identity: config and passport.
    """
    passport = identity["passport"]
    baselines = outcome.dataset.baselines(outcome.graphs)
    targets = {}
    for k, target in enumerate(outcome.targets):
        measure = MEASURES[target.metric]
        variance = label_variance(outcome.dataset, target, outcome.graphs)
        row = {
            target.metric: outcome.metrics[target.name],
            "unit": target.unit,
        }
        for name, errors in baselines.items():
            if target.name not in errors:
                continue
            scale = outcome.normalizations[target.name].scale  # measures are of standardised errors
            error = measure.of_error(errors[target.name] / scale) * scale**measure.power
            row[f"{target.metric}_of_{name}"] = float(measure.finish(np.nanmean(error), variance))
        # A few graphs may make most of a mean: say so.
        error_g = outcome.graph_errors[:, k]
        error_g = error_g[~np.isnan(error_g)]
        row["median"] = float(measure.finish(np.median(error_g), variance))
        means = _resampled_means(error_g)
        row["interval_95"] = sorted(float(measure.finish(mean, variance)) for mean in means)
        if len(error_g) < outcome.count:
            row["labelled"] = len(error_g)
        targets[target.name] = row
    return {
        "dataset": passport["dataset"],
        "split": part,
        "split_name": outcome.dataset.split_name,
        "step": step,
        "count": outcome.count,
        "targets": targets,
        "data_passport": passport,
        "config": identity["config"],
    }


def _resampled_means(error_g: np.ndarray) -> list[float]:
    """Bootstrap: percentiles 2.5 and 97.5 of the mean over graphs, of 2,000 resamples."""
    rng = np.random.default_rng(0)
    means = [rng.choice(error_g, len(error_g)).mean() for _ in range(2_000)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def final_result(
    workdir: pathlib.Path,
    evaluator: Evaluator,
    experiment: Experiment,
    best_ema,
    state: TrainState,
    progress: Progress,
) -> dict | None:
    """Evaluates the best weights once on test; process 0 writes `result.json` and pictures.

    Args:
      workdir: of the run.
      evaluator: of the experiment.
      experiment: that was trained.
      best_ema: the best weights.
      state: the last one, for its hashes.
      progress: of the run.

    Returns:
      What `result.json` holds; None if a signal cut the evaluation short.
    """
    outcome = evaluator.run(best_ema, "test")
    if outcome is None:
        return None
    state = sharding.to_host(state)
    result = result_of(outcome, "test", progress.best_step, experiment.identity) | {
        "validation_score": progress.best_score,
        "train_seconds": progress.train_seconds,
        "seed": experiment.config.seed,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        **provenance(),
        "params_sha256": params_sha256(state.params),
        "state_sha256": state_sha256(state, progress.to_json()),
    }
    if jax.process_index() == 0:
        plots.plot_outcome(workdir, outcome)
        files.write_json(workdir / "result.json", result)
        items = outcome.dataset.items
        print(f"Test {outcome.text()} over {outcome.count} {items}; see {workdir}/result.json")
    return result
