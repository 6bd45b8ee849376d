"""Configs as data: JSON in and out, and which changes a resume may not survive."""

import json

import ml_collections
import numpy as np

from data_pipelines.errors import UserError

# A run may be resumed with other values of these: they change no number.
_FREE = (
    "log.",
    "checkpoint.",
    "mesh.",
    "cluster.",
    "data.prefetch",
    "data.cache_dir",
    "data.path",
)


def to_json(config: ml_collections.ConfigDict) -> dict:
    """The resolved config as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json_best_effort())


# Keys that younger versions added, with the value that older ones behaved by.
_ADDED = {"train": {"steps_per_call": 1}}


def from_json(fields: dict) -> ml_collections.ConfigDict:
    """The config of a saved `config.json`, also of an older version; data, never code."""
    return ml_collections.ConfigDict(_completed(fields)).lock()


def _completed(fields: dict) -> dict:
    """With the keys that younger versions added."""
    return fields | {group: keys | fields[group] for group, keys in _ADDED.items()}


def real_dtype(config: ml_collections.ConfigDict) -> np.dtype:
    """Type of positions, targets and parameters: float32, or float64 if the model computes so."""
    return np.dtype(np.float64 if config.model.dtype == "float64" else np.float32)


def _flat(fields: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_same_run(saved: dict, today: dict, workdir) -> None:
    """Refuses to go on with a run whose config or data changed in a way that matters.

    Args:
      saved: `{"config": ..., "passport": ...}` of the run in `workdir`.
      today: the same of the command.
    """
    old, new = _flat(saved | {"config": _completed(saved["config"])}), _flat(today)
    differing = [
        f"  {key}: {old.get(key)!r} in the run, {new.get(key)!r} today"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.removeprefix("config.").startswith(_FREE)
    ]
    if differing:
        raise UserError(
            f"The run in {workdir} was started with another config:\n"
            + "\n".join(differing)
            + "\nUse another --workdir for the new config, or the old values to go on."
        )
