"""The frontier in a row a defense, strength and attacker, with 95% intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fedleak.evaluation.intervals import student, wilson
from fedleak.studies.frontier.cells import CLEAN
from fedleak.studies.summaries import by_group

KEYS = ["defense", "strength", "attacker"]
_LEAST = 1e-16
"""The least error that has a logarithm worth averaging."""


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Means and 95% intervals: of accuracy over seeds (Student's t), of shares over rows (Wilson's), and of errors as
    geometric means (Student's t of their logarithms); with the accuracy lost against no defense on the same seeds."""
    clean = frame[frame["defense"] == CLEAN].drop_duplicates("seed").set_index("seed")["test_accuracy"]

    def row(group: pd.DataFrame) -> dict[str, Any]:
        seeds = group.drop_duplicates("seed")
        accuracy = pd.to_numeric(seeds["test_accuracy"], errors="coerce")
        lost = clean.reindex(seeds["seed"]).to_numpy() - accuracy.to_numpy()
        low, high = student(accuracy.dropna())
        lost_low, lost_high = student(lost[np.isfinite(lost)])
        found = {
            "updates": len(group),
            "test_accuracy": _short(accuracy.mean()),
            "accuracy_low": _short(low),
            "accuracy_high": _short(high),
            "accuracy_lost": _short(np.nanmean(lost)) if np.isfinite(lost).any() else None,
            "lost_low": _short(lost_low),
            "lost_high": _short(lost_high),
            "epsilon": _short(pd.to_numeric(group["epsilon"], errors="coerce").mean()),
        }
        for name in ("label_accuracy", "recovered", "recognised"):
            share = float(pd.to_numeric(group[name], errors="coerce").mean())
            low, high = wilson(share, len(group)) if np.isfinite(share) else (np.nan, np.nan)
            found |= {name: _short(share), f"{name}_low": _short(low), f"{name}_high": _short(high)}
        for name in ("mse", "limit_mse"):
            logs = np.log(pd.to_numeric(group[name], errors="coerce").dropna().clip(lower=_LEAST))
            low, high = student(logs)
            found[name] = _short(np.exp(logs.mean())) if len(logs) else None
            found |= {f"{name}_low": _short(np.exp(low)), f"{name}_high": _short(np.exp(high))}
        for name in ("psnr", "ssim", "limit_bits"):
            found[name] = _short(pd.to_numeric(group[name], errors="coerce").mean())
        return found

    return by_group(frame, KEYS, row)


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{float(value):.4g}")
