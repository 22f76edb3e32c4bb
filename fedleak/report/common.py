"""What the page, its charts and the pictures share: numbers and sentences in words, and fair choices among many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

MOST_SENTENCES = 4

T = TypeVar("T")


def many(count: int, noun: str, plural: str | None = None) -> str:
    """``1 image``, ``1,200 images``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def percent(share: float | None) -> str:
    """A share as ``3.2%`` or ``50%``; a dash where it is not known."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{share:.1%}" if 0 < share < 0.1 or 0.99 < share < 1 else f"{share:.0%}"


def short(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.3g}"


def small(error: float) -> str:
    """An error: 0.21, 3.4e-5, 0 (exact) or inf."""
    if 0.01 <= error < 100 or error == 0 or not math.isfinite(error):
        return f"{error:.2g}"
    mantissa, exponent = f"{error:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def psnr(error: float) -> float:
    """A mean squared error in dB, inf where it is 0."""
    return -10 * math.log10(error) if error > 0 else math.inf


def plain(value: Any) -> float | None:
    """A number, None where it is not finite."""
    return float(value) if math.isfinite(float(value)) else None


def said(name: str, sentence: str, runs: Sequence[Any]) -> str:
    """The sentence's subject where there are several runs."""
    return f"{name}: {sentence}" if len(runs) > 1 else sentence[:1].upper() + sentence[1:]


def join(sentences: Sequence[str]) -> str:
    """The first few of them: more runs than that are easier read off the chart or its table."""
    rest = len(sentences) - MOST_SENTENCES
    return " ".join(sentences[:MOST_SENTENCES]) + (f" ({rest} more runs are in the table.)" if rest > 0 else "")


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 … `count` - 1, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]


def thinned(items: Sequence[T], most: int, noun: str = "") -> tuple[list[T], str]:
    """At most `most` of the items, evenly chosen, and the sentence that says so."""
    shown = [items[i] for i in evenly(len(items), most)]
    return shown, f" Shown are {len(shown)} of {len(items)}{noun}, evenly chosen." if len(shown) < len(items) else ""
