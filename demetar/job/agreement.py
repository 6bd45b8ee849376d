"""What all processes of a job must have in common, and what to say where they do not."""

import hashlib
import pathlib

import jax

from data_pipelines.json_text import json_text


def code_sha256() -> str:
    """SHA-256 over the sources of both packages and JAX's version."""
    root = pathlib.Path(__file__).parents[2]
    digest = hashlib.sha256(jax.__version__.encode())
    for package in ("demetar", "data_pipelines"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


def odd_one_out(told: list[dict]) -> str:
    """What to say about processes whose facts differ from those of most; empty if none does.

    Args:
      told: by each process, in their order: name -> JSON. All have the same names.
    """
    for name in told[0]:
        values = [json_text(facts[name], sort_keys=True) for facts in told]
        most = max(values, key=values.count)
        odd = [n for n, value in enumerate(values) if value != most]
        if odd:
            first = odd[0]
            usual = next(n for n, value in enumerate(values) if value == most)
            differences = _differences(told[first][name], told[usual][name])
            return (
                f"Process {', '.join(map(str, odd))} of {len(told)} differs from the others in its "
                f"{name}: {differences}. All processes must run one command, one version, on the "
                "same data."
            )
    return ""


def _differences(odd, usual, prefix: str = "") -> str:
    if isinstance(odd, dict) and isinstance(usual, dict):
        keys = [k for k in odd.keys() | usual.keys() if odd.get(k) != usual.get(k)]
        return "; ".join(
            _differences(odd.get(k), usual.get(k), f"{prefix}.{k}" if prefix else k)
            for k in sorted(keys)
        )
    return f"{prefix} {odd!r}, elsewhere {usual!r}" if prefix else f"{odd!r}, elsewhere {usual!r}"
