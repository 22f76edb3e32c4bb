"""The index of a capture store: lines that know when they were altered, and what each may say."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def read_row(line: str, number: int | None = None) -> dict[str, Any] | None:
    """A line of the index, None where it is damaged.

    Args:
        line: JSON.
        number: which it is, from 0; None for captures before format 3, whose lines are not numbered.
    """
    try:
        row = json.loads(line)
        check = row.pop("check", None)
    except (ValueError, AttributeError, RecursionError):
        return None
    if number is not None and (check != digest(row) or row.get("row") != number):
        return None
    tests: dict[str, Callable[[Any], bool]] = {
        "round": lambda v: _whole_from(v, 0),
        "client": lambda v: _whole_from(v, 0),
        "payload": lambda v: v in ("gradient", "weights"),
        "batch_size": lambda v: v is None or _whole_from(v, 1),
        "local_steps": lambda v: v is None or _whole_from(v, 1),
        "lr": lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf),
        "per_sample": lambda v: isinstance(v, bool),
        "error": lambda v: v is None or isinstance(v, str),
    }
    tests |= {
        f"{kind}_{key}": lambda v: isinstance(v, str) for kind in ("start", "update") for key in ("file", "sha256")
    }
    optional: dict[str, Callable[[Any], bool]] = {
        "epochs": lambda v: v is None or _whole_from(v, 1),
        "optimizer": lambda v: v is None or isinstance(v, dict),
        **{f"{kind}_{key}": lambda v: _whole_from(v, 0) for kind in ("start", "update") for key in ("offset", "size")},
    }
    sound = all(key in row and test(row[key]) for key, test in tests.items())
    return row if sound and all(key not in row or test(row[key]) for key, test in optional.items()) else None


def _whole_from(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def write_row(row: Mapping[str, Any]) -> str:
    """A line that `read_row` reads, its digest last."""
    text = json.dumps(row, sort_keys=True)
    return f'{text[:-1]}, "check": "{_short(text)}"}}'


def digest(values: Mapping[str, Any]) -> str:
    """A short SHA-256 of plain JSON, whatever the order of its keys."""
    return _short(json.dumps(values, sort_keys=True))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
