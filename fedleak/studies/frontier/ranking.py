"""The defenses that cost little, ranked by what leaks through them: by the limit, and by the best attack there was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedleak.studies.frontier.cells import CLEAN, CONTROL
from fedleak.studies.summaries import spread

_KEPT = ["defense", "strength", "accuracy_lost", "lost_low", "lost_high", "limit_mse", "limit_mse_low"]
_KEPT += ["limit_mse_high", "attacker", "mse", "mse_low", "mse_high", "recovered", "recovered_low", "recovered_high"]
_KEPT += ["recognised", "recognised_low", "recognised_high", "updates"]


def best_attack(summary: pd.DataFrame) -> pd.DataFrame:
    """Of every defense and strength the row of the attacker that came nearest."""
    known = summary.dropna(subset=["mse"])
    return known.loc[known.groupby(["defense", "strength"], sort=False)["mse"].idxmin()]


def affordable(summary: pd.DataFrame, cost: float) -> pd.DataFrame:
    """The best attack's rows of the defenses that cost at most so much test accuracy, in the mean over seeds."""
    best = best_attack(summary)
    return best[(best["accuracy_lost"].astype(float) <= cost) & ~best["defense"].isin([CLEAN, CONTROL])]


def rank(summary: pd.DataFrame, cost: float) -> pd.DataFrame:
    """A row an affordable defense and strength, the one that lets least through first.

    Args:
        summary: of `summarise`.
        cost: test accuracy that a defense may cost, as a share; the mean over seeds decides, whatever its interval.

    Returns:
        ``rank_limit, rank_attack``, 1 for the largest error, then the columns of the best attack's row. In the order of
        `rank_limit`, of those without a limit of `rank_attack`.
    """
    rows = affordable(summary, cost)[_KEPT]
    ranks = {
        f"rank_{name}": rows[column].astype(float).rank(ascending=False, method="min")
        for name, column in (("limit", "limit_mse"), ("attack", "mse"))
    }
    table = pd.concat([pd.DataFrame(ranks, index=rows.index), rows], axis=1)
    return table.sort_values(["rank_limit", "rank_attack"]).reset_index(drop=True)


def draw_ranking(ranking: pd.DataFrame, cost: float, path: Path) -> None:
    """A line a defense, the limit and the best attack's error with their intervals; nothing of an empty ranking."""
    if not len(ranking):
        return
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(ranking)), layout="constrained")
    panel = figure.subplots()
    places = np.arange(len(ranking))[::-1]
    shown = (("limit_mse", "limit", "#475569", "|", 0.13), ("mse", "best attack", "#c2410c", "o", -0.13))
    for column, text, color, mark, shift in shown:
        values = ranking.assign(**{name: ranking[name].astype(float) for name in (column, f"{column}_low")})
        bars = spread(values, column, f"{column}_low", f"{column}_high")
        panel.errorbar(
            values[column], places + shift, xerr=bars, fmt=mark, color=color, capsize=2, label=text, markersize=6,
        )  # fmt: skip
    names = [
        f"{row['defense']} {row['strength']:g} (−{100 * row['accuracy_lost']:.1f} points)"
        for _, row in ranking.iterrows()
    ]
    panel.set_yticks(places, names, fontsize=8)
    panel.axvline(1e-3, color="0.6", linestyle=":", linewidth=1, label="recovered below")
    panel.set(xscale="log", xlabel="mean squared error (bars: 95% intervals)")
    panel.grid(alpha=0.25, axis="x")
    panel.legend(frameon=False, fontsize=8)
    panel.set_title(
        f"Defenses that cost at most {100 * cost:g} points of accuracy, the least leaking first", fontsize=10
    )
    figure.savefig(path, dpi=100)
