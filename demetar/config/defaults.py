"""Every key of a config: what it means, its unit, its choices, its default.

A config file says only what differs; `complete` fills in the rest. Four groups have more keys than
stand here, because a choice brings options of its own:

    config.data.name        of the data set: `DEFAULTS` of its folder in data_pipelines/
    config.model.name       of the model: the fields of its class in demetar/models/
    config.optim.name       of the optimizer: its row in demetar/training/optim.py
    config.optim.schedule   of the schedule: its row in demetar/training/optim.py

Keys of one group are flat: `config.model.width`, `config.optim.weight_decay`.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from data_pipelines.errors import UserError, check_known
from data_pipelines.ranges import COUNT, NOT_NEGATIVE, SEED, check_range
from data_pipelines.registry import DATASETS
from demetar.models import MODELS, option_defaults
from demetar.training.optim import OPTIMIZERS, SCHEDULES

DEFAULTS = {
    "seed": 0,  # of random numbers: initial weights, order of the data, dropout
    "data": {
        "name": "",  # of the data set, a row of data_pipelines/registry.py; has no default
        "cache_dir": "",  # folder of prepared data and compiled programs; "": ~/.cache/demetar
        "buckets": (),  # most nodes of a graph in each bucket; (): the best for the data, at most 6
        "batch_size": 128,  # graphs of a training step, over all devices
        "eval_batch_size": 256,  # graphs of a batch of an evaluation, over all devices
        "prefetch_threads": 1,  # threads that assemble batches
        "prefetch_batches": 8,  # batches that are ready, at most
    },
    "model": {
        "name": "demetar",  # a row of demetar/models/__init__.py
        "readout": "auto",  # of graph targets: auto, each its own; or one of READOUTS
    },
    "optim": {
        "name": "adamw",  # a row of OPTIMIZERS in demetar/training/optim.py
        "learning_rate": 1e-3,  # at its highest, after the warm-up
        "schedule": "cosine",  # a row of SCHEDULES in demetar/training/optim.py
        "warmup_steps": 500,  # steps in which the rate rises from 0; fewer than train.num_steps
        "clip_norm": 1.0,  # most that the global norm of the gradient may be; 0: no limit
        "ema_decay": 0.999,  # of the moving average of the weights, which is evaluated; 0: none
    },
    "train": {
        "num_steps": 10_000,  # of the whole run
        "loss": "mae",  # of standardised targets: a row of demetar/training/measures.py
        "losses": {},  # target -> its own loss, where it differs
        "weights": {},  # target -> weight of its loss in the sum; 1 where not named
        "metrics": {},  # target -> what is reported and chooses the best weights; else as it says
        "accumulation": 1,  # parts that a batch is computed in, one after the other
        "eval_every": 1_000,  # steps between evaluations on the validation part
    },
    "checkpoint": {
        "every_steps": 1_000,  # steps between saves
        "keep_last": 2,  # newest checkpoints that are kept, at least 2; the best is kept besides
        "stop_at": 0,  # step after which to save and stop, as if preempted; 0: never
    },
    "log": {
        "every_steps": 100,  # steps between lines of progress and of metrics.jsonl
        "graphs": False,  # also which graphs each process computed in each step, in graph_log/
        "writers": ("tensorboard",),  # beside metrics.jsonl: rows of demetar/records/writers.py
        "project": "demetar",  # that a writer on a server puts the run into
    },
    "cluster": {
        "start_seconds": 300,  # how long the first process waits for the last
        "lost_seconds": 30,  # silence after which a process is lost, and the job ends
        "stuck_seconds": 80,  # without any progress, after which the job ends
    },
    "mesh": {
        "data": -1,  # copies of the state, each with other graphs; -1: all devices that are left
        "fsdp": 1,  # parts of the state, each with other graphs
        "model": 1,  # parts of each layer, all with the same graphs
        "gradient_groups": 0,  # all-reduces of a step; 0: as suits the platform
        "cpu_devices": 0,  # virtual CPU devices of each process; 0: one
    },
}

# Dotted path -> what its value must be; ranges of options stand with the model, optimizer, ...
RANGES = {
    "seed": SEED,
    **dict.fromkeys(("data.batch_size", "data.eval_batch_size"), COUNT),
    **dict.fromkeys(("data.prefetch_threads", "data.prefetch_batches"), NOT_NEGATIVE),
    **dict.fromkeys(("train.num_steps", "train.accumulation", "train.eval_every"), COUNT),
    "checkpoint.every_steps": COUNT,
    "checkpoint.keep_last": (
        "at least 2: a damaged newest checkpoint falls back to the one before",
        lambda x: x >= 2,
    ),
    "checkpoint.stop_at": NOT_NEGATIVE,
    "log.every_steps": COUNT,
    **{f"cluster.{key}": COUNT for key in DEFAULTS["cluster"]},
    **dict.fromkeys(("mesh.cpu_devices", "mesh.gradient_groups"), NOT_NEGATIVE),
}

# Groups whose keys are names of targets, with a value of the right type.
BY_TARGET = {"train.losses": "mae", "train.weights": 1.0, "train.metrics": "mae"}

# Key of a choice -> what can be chosen, the options that one of them brings.
CHOICES = {
    "data.name": (DATASETS, lambda name: DATASETS[name].defaults),
    "model.name": (MODELS, option_defaults),
    "optim.name": (OPTIMIZERS, lambda name: OPTIMIZERS[name].defaults),
    "optim.schedule": (SCHEDULES, lambda name: SCHEDULES[name].defaults),
}


def complete(fields: Mapping) -> ml_collections.ConfigDict:
    """The config with all keys that `fields` leave out, at their defaults.

    Args:
      fields: what differs, nested; a list stands for a tuple, a whole number for a float.

    Raises:
      UserError: an unknown key, with the nearest known one; a value of the wrong type or out of
        its range; a data set, model, optimizer or schedule that does not exist.
    """
    fields = _plain(fields)
    known = copy.deepcopy(DEFAULTS)
    for key, (rows, options) in CHOICES.items():
        name = chosen(fields, key)
        if not name:
            raise UserError(f"The config has no config.{key}: set it. Known: {', '.join(rows)}.")
        _typed(key, name, "")
        check_known(f"config.{key}", name, rows)
        known[key.partition(".")[0]] |= copy.deepcopy(options(name))
    filled = _filled(known, fields, "", known)
    for path, allowed in RANGES.items():
        group, _, key = path.rpartition(".")
        check_range(f"config.{path}", (filled[group] if group else filled)[key], allowed)
    return ml_collections.ConfigDict(filled)


def chosen(fields: Mapping, key: str) -> Any:
    """What `fields` choose by `key`, one of `CHOICES`, or its default."""
    group, _, name = key.partition(".")
    given = fields.get(group, {})
    default = DEFAULTS[group][name]
    return given.get(name, default) if _is_group(given) else default


def choose_again(fields: Mapping, key: str, name: str) -> dict:
    """`fields` with another choice by `key`: options that only the old one had are left out."""
    fields, (rows, options) = _plain(fields), CHOICES[key]
    old, (group, _, last) = chosen(fields, key), key.partition(".")
    check_known(f"config.{key}", name, rows)
    gone = options(old).keys() - options(name).keys() if old in rows else ()
    kept = {k: value for k, value in fields.get(group, {}).items() if k not in gone}
    return fields | {group: kept | {last: name}}


def check_key(path: str, known: Mapping) -> None:
    """Refuses a dotted path that the completed config `known` does not have."""
    here, group = known, ""
    for key in path.split("."):
        if not _is_group(here) or key not in here:
            break
        here, group = here[key], f"{group}.{key}".strip(".")
    else:
        return
    top, _, key = path.partition(".")
    for choice, (rows, options) in CHOICES.items():
        owners = [name for name in rows if key.partition(".")[0] in options(name)]
        name = chosen(known, choice)
        if top == choice.partition(".")[0] and owners and name not in owners:
            raise UserError(
                f"There is no config.{path} where config.{choice} is {name!r}: it belongs to "
                f"{', '.join(owners)}."
            )
    paths = list(dotted(known))
    close = [p for p in paths if p.rpartition(".")[2] == path.rpartition(".")[2]]
    close += difflib.get_close_matches(path, paths, n=1, cutoff=0.7)
    if close:
        raise UserError(f"There is no config.{path}. Did you mean config.{close[0]}?")
    at = f"config.{group}" if group else "config"
    has = f"has {', '.join(sorted(here))}" if _is_group(here) else "is no group of keys"
    raise UserError(f"There is no config.{path}: {at} {has}.")


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping | ml_collections.ConfigDict)


def dotted(fields: Mapping, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all values, and of groups that are empty."""
    for key, value in fields.items():
        if _is_group(value) and len(value):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def type_name(default: Any) -> str:
    """What a value must be, for a person, by its default."""
    if _is_group(default):
        return "a group of keys"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(type(default), "a tuple")


def _filled(defaults: dict, fields: dict, prefix: str, known: dict) -> dict:
    """`defaults` with the values of `fields`, each checked."""
    filled = dict(defaults)
    for key, value in fields.items():
        path = f"{prefix}{key}"
        group = prefix.rstrip(".")
        if group in BY_TARGET:
            filled[key] = _typed(path, value, BY_TARGET[group])
            continue
        if key not in defaults:
            check_key(path, known)
        if isinstance(defaults[key], dict) and isinstance(value, dict):
            filled[key] = _filled(defaults[key], value, f"{path}.", known)
        else:
            filled[key] = _typed(path, value, defaults[key])
    return filled


def _typed(path: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`, where nothing is lost by that."""
    if type(default) is float and type(value) is int:
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(value)
    if type(value) is not type(default):
        raise UserError(f"config.{path} is {value!r}, but must be {type_name(default)}.")
    return value


def _plain(fields: Mapping | ml_collections.ConfigDict) -> dict:
    """Nested dicts, without references."""
    try:
        return ml_collections.ConfigDict(fields).to_dict()
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"These are no groups of keys and values: {error}") from error
