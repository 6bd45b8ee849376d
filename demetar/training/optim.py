"""The optax chain: clipping, AdamW, warm-up and a schedule."""

import jax
import numpy as np
import optax

from data_pipelines.errors import UserError, suggest

SCHEDULES = ("cosine", "plateau", "constant")


def learning_rate(
    schedule: str, peak: float, warmup_steps: int, num_steps: int, final_fraction: float
) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine to `final_fraction * peak`, or constant.

    `plateau` is constant here: its factor is state, see `plateau_step`.
    """
    if schedule not in SCHEDULES:
        raise UserError(
            f"Unknown config.optim.schedule {schedule!r}.{suggest(schedule, SCHEDULES)} "
            f"Known: {', '.join(SCHEDULES)}."
        )
    if not 0 <= warmup_steps < num_steps:
        raise UserError(
            f"config.optim.warmup_steps ({warmup_steps}) must be at least 0 and less than "
            f"config.train.num_steps ({num_steps})."
        )
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, num_steps - warmup_steps, final_fraction)
    else:
        after = optax.constant_schedule(peak)
    warmup = optax.linear_schedule(0.0, peak, max(1, warmup_steps))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule, b1: float, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Global-norm clipping and AdamW; only matrices decay, not biases, norms or embeddings."""
    decays = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays),
    )


def plateau_step(
    progress: dict, score: float, factor: float, patience: int, min_scale: float
) -> None:
    """Lowers `progress['lr_scale']` once `score` has not improved for `patience` evaluations.

    State, not a function of the step: `progress` is saved with every checkpoint.
    """
    if np.isfinite(score) and score < progress["plateau_best"]:
        progress["plateau_best"], progress["plateau_bad"] = score, 0
        return
    progress["plateau_bad"] += 1
    if progress["plateau_bad"] > patience:
        progress["lr_scale"] = max(min_scale, progress["lr_scale"] * factor)
        progress["plateau_bad"] = 0
