"""JSON as text: the one place that writes it, because Python's own writes NaN, which is no JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(content: Any) -> Any:
    """What JSON can hold: null in the place of a number that is not finite, however deep."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def json_text(content: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """The text of `content`, with null for each number that is not finite."""
    return json.dumps(finite(content), indent=indent, sort_keys=sort_keys, allow_nan=False)
