"""Optimizers and schedules by name: rows of optax, each with its own options.

`config.optim` is one flat group: the keys that every choice has (`config/defaults.py`), the options
of `config.optim.name` and those of `config.optim.schedule`, whose defaults stand in the rows here.
A new optimizer or schedule is a row. It needs no other change: the command line knows its options.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from data_pipelines.errors import UserError, check_known
from data_pipelines.ranges import BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE, check_range
from demetar.training.muon import scale_by_muon


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row of `OPTIMIZERS`.

    Attributes:
      make: `(learning_rate, **options) -> optax.GradientTransformation`; the rate is a schedule.
      defaults: option -> value; these are its keys of `config.optim`.
      is_divided: whether `make` also takes the `mesh`, to divide its own work over the devices.
    """

    make: Callable[..., optax.GradientTransformation]
    defaults: dict[str, Any]
    is_divided: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A row of `SCHEDULES`.

    Attributes:
      make: `(peak, warmup_steps, num_steps, **options) -> optax.Schedule`: the learning rate of
        step 0, 1, .... All of them rise from 0 to `peak` in `warmup_steps` first.
      defaults: option -> value; these are its keys of `config.optim`.
    """

    make: Callable[..., optax.Schedule]
    defaults: dict[str, Any]


# --- what decays ---------------------------------------------------------------------------------


def _is_kernel(path: tuple) -> bool:
    """Whether a parameter is the matrix of a dense layer, by the name that flax gives it."""
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


# Name -> (path, parameter) -> whether weight decay makes it smaller.
WEIGHT_DECAY_MASKS = {
    "matrices": lambda path, x: x.ndim >= 2,  # no biases, norms or single vectors
    "kernels": lambda path, x: _is_kernel(path),  # matrices of dense layers: no tables, no [CLS]
    "all": lambda path, x: True,
    "none": lambda path, x: False,
}


def _mask(name: str):
    """Parameters -> a tree of the same form that says which of them decay."""
    check_known("config.optim.weight_decay_mask", name, WEIGHT_DECAY_MASKS)
    return lambda params: jax.tree_util.tree_map_with_path(WEIGHT_DECAY_MASKS[name], params)


# --- optimizers ----------------------------------------------------------------------------------

_DECAY = {
    "weight_decay": 1e-2,  # times the learning rate: part of a weight that a step takes away
    "weight_decay_mask": "matrices",  # which weights decay: matrices | kernels | all | none
}
_ADAM = {
    "b1": 0.9,  # decay rate of the average of gradients
    "b2": 0.999,  # decay rate of the average of squared gradients
    "eps": 1e-8,  # added to the root of the second
}
# Below this many rows or columns a kernel maps from or to a few numbers (a distance, an output):
# to make its singular values equal would give noise the weight of signal.
_MUON_MIN_SIZE = 9


def _decaying(make):
    """An optimizer of optax with decoupled weight decay, which takes the mask by its name."""

    def with_mask(learning_rate, weight_decay_mask, **options) -> optax.GradientTransformation:
        return make(learning_rate, mask=_mask(weight_decay_mask), **options)

    return with_mask


def _muon(
    learning_rate, mesh, momentum, consistent_rms, weight_decay, weight_decay_mask, **adamw
) -> optax.GradientTransformation:
    """Muon for the kernels, AdamW for tables, [CLS], biases and small kernels."""
    mask = _mask(weight_decay_mask)

    def label(path, x) -> str:
        large = x.ndim == 2 and min(x.shape) >= _MUON_MIN_SIZE
        return "muon" if large and _is_kernel(path) else "adamw"

    return optax.partition(
        {
            "muon": optax.chain(
                scale_by_muon(momentum, consistent_rms, mesh),
                optax.add_decayed_weights(weight_decay, mask),
                optax.scale_by_learning_rate(learning_rate),
            ),
            "adamw": optax.adamw(learning_rate, weight_decay=weight_decay, mask=mask, **adamw),
        },
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


OPTIMIZERS = {
    # Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101
    "adamw": Optimizer(_decaying(optax.adamw), _ADAM | _DECAY),
    # Kingma and Ba 2015, https://arxiv.org/abs/1412.6980
    "adam": Optimizer(optax.adam, _ADAM),
    # See muon.py; an update is about as large as one of AdamW.
    "muon": Optimizer(
        _muon,
        {
            "momentum": 0.95,  # decay rate of the sum of gradients that is made orthogonal
            "consistent_rms": 0.2,  # root mean square of an update over the rate; AdamW's is ~0.2
            **_ADAM,  # of the AdamW that takes the rest
            **_DECAY,  # of all
        },
        is_divided=True,
    ),
    # Chen et al. 2023, https://arxiv.org/abs/2302.06675: a third to a tenth of AdamW's rate, and
    # three to ten times its decay.
    "lion": Optimizer(
        _decaying(optax.lion),
        {
            "b1": 0.9,  # weight of the average against the gradient, whose sign is the update
            "b2": 0.99,  # decay rate of the average of gradients
            **_DECAY,
        },
    ),
    # You et al. 2020, https://arxiv.org/abs/1904.00962: for large batches
    "lamb": Optimizer(_decaying(optax.lamb), _ADAM | {"eps": 1e-6} | _DECAY),
    "sgd": Optimizer(
        optax.sgd,
        {
            "momentum": 0.9,  # decay rate of the sum of gradients; 0: the gradient alone
            "nesterov": False,  # whether to look ahead by the momentum
        },
    ),
}


# --- schedules -----------------------------------------------------------------------------------

_END = {"final_fraction": 0.01}  # of the peak: the learning rate at the end of the run


def _after_warmup(peak, warmup_steps, *phases, until=()) -> optax.Schedule:
    """Linear warm-up, then the phases, each until its step (the last for ever)."""
    warmup = optax.linear_schedule(0.0, peak, max(1, warmup_steps))
    return optax.join_schedules([warmup, *phases], [warmup_steps, *until])


def _constant(peak, warmup_steps, num_steps) -> optax.Schedule:
    return _after_warmup(peak, warmup_steps, optax.constant_schedule(peak))


def _plateau(peak, warmup_steps, num_steps, factor, patience, min_scale) -> optax.Schedule:
    """Constant: its factor depends on the validation, and is state of the run (`plateau_step`)."""
    return _constant(peak, warmup_steps, num_steps)


def _cosine(peak, warmup_steps, num_steps, final_fraction) -> optax.Schedule:
    decay = optax.cosine_decay_schedule(peak, num_steps - warmup_steps, final_fraction)
    return _after_warmup(peak, warmup_steps, decay)


def _linear(peak, warmup_steps, num_steps, final_fraction) -> optax.Schedule:
    decay = optax.linear_schedule(peak, peak * final_fraction, num_steps - warmup_steps)
    return _after_warmup(peak, warmup_steps, decay)


def _wsd(peak, warmup_steps, num_steps, decay_fraction, final_fraction) -> optax.Schedule:
    """Warm-up, stable, decay."""
    decay_steps = max(1, round(decay_fraction * num_steps))
    if warmup_steps + decay_steps > num_steps:
        raise UserError(
            f"config.optim.warmup_steps ({warmup_steps}) and the {decay_steps} steps of "
            f"config.optim.decay_fraction ({decay_fraction}) are together more than "
            f"config.train.num_steps ({num_steps}): lower one of them."
        )
    stable = optax.constant_schedule(peak)
    decay = optax.linear_schedule(peak, peak * final_fraction, decay_steps)
    return _after_warmup(peak, warmup_steps, stable, decay, until=[num_steps - decay_steps])


SCHEDULES = {
    # Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, without restarts
    "cosine": Schedule(_cosine, _END),
    "linear": Schedule(_linear, _END),
    "constant": Schedule(_constant, {}),
    # Hu et al. 2024, https://arxiv.org/abs/2404.06395: a run that may still be made longer
    "wsd": Schedule(
        _wsd,
        {
            "decay_fraction": 0.2,  # of all steps: how long the rate falls at the end
            **_END,
        },
    ),
    "plateau": Schedule(
        _plateau,
        {
            "factor": 0.8,  # of the learning rate, each time that validation stops improving
            "patience": 15,  # evaluations without a better score that are waited for
            "min_scale": 1e-3,  # of the peak: the rate is never lower
        },
    ),
}


# --- a config to both ----------------------------------------------------------------------------

# Key of config.optim -> what its value must be.
_RANGES = {
    "learning_rate": POSITIVE,
    "clip_norm": ("finite and at least 0; 0 switches it off", lambda x: 0 <= x < math.inf),
    "ema_decay": ("at least 0 and less than 1; 0 keeps no average", lambda x: 0 <= x < 1),
    "b1": BELOW_ONE,
    "b2": BELOW_ONE,
    "momentum": BELOW_ONE,
    "eps": POSITIVE,
    "consistent_rms": POSITIVE,
    "weight_decay": ("finite and at least 0; 0 switches it off", lambda x: 0 <= x < math.inf),
    "final_fraction": PART,
    "decay_fraction": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "factor": ("above 0 and below 1", lambda x: 0 < x < 1),
    "patience": NOT_NEGATIVE,
    "min_scale": PART,
}


def make_optimizer(
    optim: Mapping[str, Any], num_steps: int, mesh: Mesh | None = None
) -> tuple[optax.Schedule, optax.GradientTransformationExtraArgs]:
    """The learning rate of each step, and the whole chain: clipping by global norm, optimizer.

    `update` of the chain takes the norm of the gradient as `grad_norm`.

    Args:
      optim: the completed group `config.optim`.
      num_steps: `config.train.num_steps`.
      mesh: of the devices, which may share the optimizer's own work; None: each does all of it.

    Raises:
      UserError: a name that is no row; a value out of its range.
    """
    options = dict(optim)
    name, schedule_name = options["name"], options["schedule"]
    check_known("config.optim.name", name, OPTIMIZERS)
    check_known("config.optim.schedule", schedule_name, SCHEDULES)
    _check_ranges(options, num_steps)
    own = lambda row: {key: options[key] for key in row.defaults}
    row = SCHEDULES[schedule_name]
    schedule = row.make(options["learning_rate"], options["warmup_steps"], num_steps, **own(row))
    divided = {"mesh": mesh} if OPTIMIZERS[name].is_divided else {}
    optimizer = OPTIMIZERS[name].make(schedule, **divided, **own(OPTIMIZERS[name]))
    clip_norm = options["clip_norm"]
    # `identity` keeps the optimizer's place in the chain: the form of its state is the same.
    clip = _clip_by_given_norm(clip_norm) if clip_norm else optax.identity()
    return schedule, optax.chain(clip, optimizer)


def _clip_by_given_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, told the norm as `grad_norm`."""

    def update(updates, state, params=None, *, grad_norm, **more):
        del params, more
        clip = lambda x: jnp.where(grad_norm < max_norm, x, x / grad_norm * max_norm)
        return jax.tree.map(lambda x: clip(x).astype(x.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _check_ranges(options: dict[str, Any], num_steps: int) -> None:
    for key, allowed in _RANGES.items():
        if key in options:
            check_range(f"config.optim.{key}", options[key], allowed)
    if not 0 <= options["warmup_steps"] < num_steps:
        raise UserError(
            f"config.optim.warmup_steps ({options['warmup_steps']}) must be at least 0 and less "
            f"than config.train.num_steps ({num_steps})."
        )


# --- plateau -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plateau:
    """What `plateau` remembers of a run; saved with every checkpoint.

    Attributes:
      best: lowest score so far.
      bad: evaluations since then, or since the rate was lowered.
      scale: what the learning rate is multiplied by.
    """

    best: float = math.inf
    bad: int = 0
    scale: float = 1.0


def plateau_step(
    plateau: Plateau, score: float, factor: float, patience: int, min_scale: float
) -> Plateau:
    """The state after an evaluation; a score that is not finite is no improvement.

    Args:
      score: of this evaluation, lower is better.
      factor: of `scale`, once more than `patience` evaluations brought no better score.
      patience: evaluations.
      min_scale: `scale` is never lower.
    """
    if math.isfinite(score) and score < plateau.best:
        return Plateau(score, 0, plateau.scale)
    if plateau.bad < patience:
        return dataclasses.replace(plateau, bad=plateau.bad + 1)
    return Plateau(plateau.best, 0, max(min_scale, plateau.scale * factor))
