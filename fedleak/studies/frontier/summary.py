"""The frontier in a row a defense, strength and attacker, with 95% intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fedleak.evaluation.intervals import geometric, student, wilson
from fedleak.studies.frontier.cells import CLEAN
from fedleak.studies.summaries import by_group

KEYS = ["defense", "strength", "attacker"]
_LEAST = 1e-16
"""The least error that has a logarithm worth averaging."""


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Means and 95% intervals: of accuracy over seeds (Student's t), of shares over rows (Wilson's), and of errors as
    geometric means (see `geometric`); with the accuracy lost against no defense on the same seeds. Fewer than three
    values have no interval but a share's."""
    clean = frame[frame["defense"] == CLEAN].drop_duplicates("seed").set_index("seed")["test_accuracy"]

    def row(group: pd.DataFrame) -> dict[str, Any]:
        seeds = group.drop_duplicates("seed")
        accuracy = pd.to_numeric(seeds["test_accuracy"], errors="coerce")
        lost = clean.reindex(seeds["seed"]).to_numpy() - accuracy.to_numpy()
        low, high = _interval(accuracy.dropna(), 0.0, 1.0)
        lost_low, lost_high = _interval(lost[np.isfinite(lost)], -1.0, 1.0)
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
            errors = pd.to_numeric(group[name], errors="coerce").dropna().clip(lower=_LEAST)
            low, high = geometric(errors)
            found[name] = _short(np.exp(np.log(errors).mean())) if len(errors) else None
            found |= {f"{name}_low": _short(low), f"{name}_high": _short(high)}
        for name in ("psnr", "ssim", "limit_bits", "lpips"):
            known = group[name] if name in group else pd.Series(dtype=float)  # a cell of before has no lpips
            found[name] = _short(pd.to_numeric(known, errors="coerce").mean())
        return found

    return by_group(frame, KEYS, row)


def _interval(values: Any, least: float, most: float) -> tuple[float, float]:
    """Student's interval within what the quantity can be; NaN for fewer than three values, of which it says nothing."""
    low, high = student(values) if len(values) > 2 else (np.nan, np.nan)
    return float(np.clip(low, least, most)), float(np.clip(high, least, most))


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{float(value):.4g}")
