"""Configs as data: JSON in and out, and which changes a resume may not survive."""

import json
import pathlib
from collections.abc import Mapping

import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from data_pipelines.errors import UserError
from demetar.config import defaults

# A run may be resumed with other values of these: they change no number. What the data and the
# split are is in the passport, wherever the files lie.
_FREE = (
    "log.",
    "checkpoint.",
    "mesh.",
    "cluster.",
    "data.prefetch",
    "data.cache_dir",
    "data.path",
    "data.validation_path",
    "data.test_path",
    "data.split_file",
)


def to_json(config: ml_collections.ConfigDict) -> dict:
    """The completed config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())


def read_identity(file: pathlib.Path) -> dict:
    """What a saved `config.json` holds, `config` and `passport`; a damaged one is a `UserError`."""
    try:
        identity = json.loads(file.read_text())
        parts = [identity[part] for part in ("config", "passport")]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("config and passport must be objects")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} does not hold the settings of a run ({error!r}). Copy the folder again, or "
            "start anew in another one."
        ) from error
    return identity


def from_json(fields: Mapping) -> ml_collections.ConfigDict:
    """The config of a saved `config.json`, locked; keys that it lacks are at their defaults.

    The file is data, never code.
    """
    try:
        return defaults.complete(fields).lock()
    except UserError as error:
        raise UserError(f"This config was saved by another version of demetar: {error}") from error


def on_one_device(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config for one device, whatever mesh it was trained on: to evaluate, compare, predict.

    How many devices a run had is of its training; what it has learned does not depend on it.
    """
    config = config.copy_and_resolve_references()
    config.mesh.update({"data": 1, "fsdp": 1, "model": 1, "cpu_devices": 0})
    return config.lock()


def real_dtype(config: ml_collections.ConfigDict) -> np.dtype:
    """Type of positions, labels and parameters: float32, or float64 if the model computes so."""
    return np.dtype(np.float64 if config.model.dtype == "float64" else np.float32)


def check_same_run(saved: dict, today: dict, workdir) -> None:
    """Refuses to go on with a run whose config or data changed in a way that matters.

    Args:
      saved: `{"config": ..., "passport": ...}` of the run in `workdir`.
      today: the same of the command.
      workdir: for the message.
    """
    saved = saved | {"config": to_json(from_json(saved["config"]))}
    saved, today = _without_names(saved), _without_names(today)
    differing = [line for key, line in differences(saved, today).items() if changes_numbers(key)]
    if differing:
        raise UserError(
            f"The run in {workdir} was started with another config:\n"
            + "\n".join(differing)
            + "\nUse another --workdir for the new config, or the old values to go on."
        )


def _without_names(identity: dict) -> dict:
    """Without the names of the files of the data, whose content is compared."""
    sources = identity["passport"].get("sources")
    if not sources:
        return identity
    content = [{k: v for k, v in source.items() if k != "name"} for source in sources]
    return identity | {"passport": identity["passport"] | {"sources": content}}


def changes_numbers(key: str) -> bool:
    """Whether a run with another value at this dotted path of its identity is another run."""
    return not key.removeprefix("config.").startswith(_FREE)


def differences(
    saved: Mapping, today: Mapping, names: tuple[str, str] = ("in the run", "today")
) -> dict[str, str]:
    """Dotted path of each value that differs -> both values and whose they are, for a person."""
    old, new = (flatten_dict(dict(fields), sep=".") for fields in (saved, today))
    return {
        key: f"  {key}: {old.get(key)!r} {names[0]}, {new.get(key)!r} {names[1]}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
