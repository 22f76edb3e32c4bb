"""What the studies' tables and pictures have in common: a row a group, 95% intervals, and the looks of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from fedleak.evaluation.intervals import normal, of_median, wilson

CONTROL, OURS = "random", "fedleak"
"""Choices of ``attack/labels`` that stand out in pictures."""


def by_group(frame: pd.DataFrame, keys: Sequence[str], row: Callable[[pd.DataFrame], dict[str, Any]]) -> pd.DataFrame:
    """A row a group of equal `keys`, in the order of the frame: the keys, then what `row` makes of the group."""
    groups = frame.groupby(list(keys), sort=False)
    return pd.DataFrame([dict(zip(keys, key, strict=True)) | row(group) for key, group in groups])


def label_shares(group: pd.DataFrame) -> dict[str, float]:
    """Mean label accuracy and whole-batch rate with 95% intervals: normal for the one, Wilson's for the other."""
    low, high = normal(group["label_accuracy"])
    exact = float(group["labels_exact"].mean())
    exact_low, exact_high = wilson(exact, len(group))
    accuracy = {"label_accuracy": group["label_accuracy"].mean(), "low": max(0.0, low), "high": min(1.0, high)}
    return accuracy | {"labels_exact": exact, "exact_low": exact_low, "exact_high": exact_high}


def label_summary(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """`label_shares` of attacked updates, which count as independent, those of one federation too."""
    return by_group(frame, keys, lambda group: {"updates": len(group)} | label_shares(group)).round(4)


def image_summary(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A row a group of rows of `leakage.csv`'s form: the share recovered and the medians of MSE, PSNR and SSIM.

    95% intervals over images, which count as independent, those of one batch too.
    """

    def row(group: pd.DataFrame) -> dict[str, Any]:
        recovered = float(group["recovered"].astype(float).mean())
        low, high = wilson(recovered, len(group))
        psnr_low, psnr_high = of_median(group["psnr"])
        return (
            {"images": len(group), "recovered": round(recovered, 4), "low": round(low, 4), "high": round(high, 4)}
            | {"mse": float(f"{group['mse'].median():.4g}"), "psnr": round(group["psnr"].median(), 2)}
            | {"psnr_low": round(psnr_low, 2), "psnr_high": round(psnr_high, 2)}
            | {"ssim": round(group["ssim"].median(), 4)}
        )

    return by_group(frame, keys, row)


def spread(table: pd.DataFrame, value: str, low: str = "low", high: str = "high") -> list[pd.Series]:
    """The lengths of error bars, for matplotlib."""
    return [(table[value] - table[low]).clip(lower=0), (table[high] - table[value]).clip(lower=0)]


def look(name: str, color: str, style: str = "-") -> tuple[str, str]:
    """Colour and line style of a method: those given, if it does not stand out."""
    return {OURS: ("#c2410c", "-"), CONTROL: ("0.5", ":")}.get(name, (color, style))
