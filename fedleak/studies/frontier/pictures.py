"""The frontier's pictures: utility against leakage, a line a defense, and what was rebuilt, strength × attacker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedleak.studies.frontier.cells import CLEAN, CONTROL, Cell
from fedleak.studies.frontier.ranking import best_attack
from fedleak.studies.summaries import spread

_COLORS = ("#0f766e", "#c2410c", "#1d4ed8", "#7c3aed", "#be185d", "#4d7c0f", "#0891b2", "#a16207", "#475569", "#dc2626")
_MARKS = "osD^vP*X<>"


def draw_frontier(summary: pd.DataFrame, path: Path) -> None:
    """Left the error of the best attack (solid) and the limit (dashed), right what a classifier still names.

    Both against the test accuracy: a defense is good to the right, and high (left panel) or low (right panel). Bars are
    95% intervals, where there are three values or more.
    """
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = best_attack(summary)
    control = best[best["defense"] == CONTROL]
    clean = best[best["defense"] == CLEAN]
    names = [name for name in dict.fromkeys(best["defense"]) if name not in (CLEAN, CONTROL)]
    for number, name in enumerate(names):
        mine = best[best["defense"] == name].sort_values("test_accuracy")
        look = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKS[number // len(_COLORS) % len(_MARKS)]}
        _bars(left, mine, "mse", look["color"])
        _bars(right, mine, "recognised", look["color"])
        left.plot(mine["test_accuracy"], mine["mse"], label=name, linewidth=1.6, **look)
        limit = mine["limit_mse"].astype(float)  # a dash where there is but one strength
        left.plot(mine["test_accuracy"], limit, linestyle="--", marker="_", markersize=14, color=look["color"])
        for _, row in mine.iterrows():
            left.annotate(
                f"{row['strength']:g}", (row["test_accuracy"], row["mse"]), fontsize=7,
                xytext=(3, 3), textcoords="offset points",
            )  # fmt: skip
        right.plot(mine["test_accuracy"], mine["recognised"], label=name, linewidth=1.6, **look)
    for panel, value in ((left, "mse"), (right, "recognised")):
        panel.scatter(clean["test_accuracy"], clean[value], marker="*", s=160, color="k", label="no defense", zorder=5)
        if len(control):
            panel.axhline(
                float(control[value].iloc[0]), color="0.5", linestyle=":", label="control: an update of noise"
            )
        panel.set_xlabel("test accuracy after the whole federation")
        panel.grid(alpha=0.25)
    left.set_yscale("log")
    left.set_ylabel("mean squared error of the best attack (dashed: the limit)")
    right.set_ylabel("share of rebuilt images that a classifier names rightly")
    right.set_ylim(-0.03, 1.03)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle("What defenses cost, and what leaks through them all the same")
    figure.savefig(path, dpi=110)


def _bars(panel: Axes, rows: pd.DataFrame, value: str, color: str) -> None:
    """The intervals of leakage and of accuracy, thin behind the points."""
    known = rows.astype(dict.fromkeys((value, f"{value}_low", f"{value}_high"), float))
    across = spread(known, "test_accuracy", "accuracy_low", "accuracy_high")
    along = spread(known, value, f"{value}_low", f"{value}_high")
    look: dict[str, Any] = {"fmt": "none", "ecolor": color, "elinewidth": 0.8, "alpha": 0.5, "capsize": 1.5}
    panel.errorbar(known["test_accuracy"], known[value], xerr=across, yerr=along, **look)


def draw_privacy(summary: pd.DataFrame, path: Path) -> None:
    """What differential privacy promises, costs and lets through, by ε; nothing for fewer than two ε."""
    best = best_attack(summary).dropna(subset=["epsilon"]).sort_values("epsilon")
    if best["epsilon"].nunique() < 2:
        return
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, mine) in enumerate(best.groupby("defense", sort=False)):
        color, x = _COLORS[number % len(_COLORS)], mine["epsilon"]
        left.plot(x, mine["mse"], color=color, marker="o", label=f"{name}: error of the best attack")
        left.plot(x, mine["limit_mse"].astype(float), color=color, linestyle="--", label=f"{name}: the limit")
        right.plot(
            x, mine["reconstruction_bound"].astype(float), color=color, linestyle="--", label=f"{name}: formal bound"
        )
        right.plot(x, mine["recovered"], color=color, marker="o", label=f"{name}: recovered by the best attack")
        right.plot(x, mine["recognised"], color=color, marker="s", alpha=0.6, label=f"{name}: recognised")
        right.plot(x, mine["test_accuracy"], color="0.3", marker="^", linestyle=":", label=f"{name}: test accuracy")
    for panel in (left, right):
        panel.set(xscale="log", xlabel="epsilon of a whole federation")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    left.set(yscale="log", ylabel="mean squared error")
    right.set(ylim=(-0.03, 1.03), ylabel="share, or chance")
    figure.savefig(path, dpi=110)


def draw_images(cells: Sequence[Cell], frame: pd.DataFrame, path: Path) -> None:
    """A row a defense and strength: the private image and what each attacker rebuilt of it, of the first seed."""
    first = min(cell.seed for cell in cells)
    attackers = list(dict.fromkeys(frame["attacker"]))
    rows = []
    for cell in cells:
        if cell.seed != first or not cell.images.exists():
            continue
        with np.load(cell.images) as kept:
            names = [cell.defense, *([CONTROL] if cell.defense == CLEAN else [])]
            for name in names:
                text = name if name in (CLEAN, CONTROL) else f"{name}\n{cell.strength:g}"
                pairs = {who: kept[f"{name}:{who}"] for who in attackers if f"{name}:{who}" in kept}
                if pairs:
                    rows.append((text, pairs))
    if not rows:
        return
    most = max(len(pairs) for _, each in rows for pairs in each.values())
    columns = most * (1 + len(attackers))
    figure = Figure(figsize=(0.8 * columns + 1.2, 0.85 * len(rows) + 0.8), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(rows), columns, squeeze=False))
    for line, (text, pairs) in enumerate(rows):
        for column in range(columns):
            panel = axes[line, column]
            panel.set(xticks=[], yticks=[])
            for spine in panel.spines.values():
                spine.set(color="#c9ced6", linewidth=0.5)
            index, place = divmod(column, 1 + len(attackers))
            who = attackers[max(0, place - 1)]
            if who in pairs and index < len(pairs[who]):
                picture = np.clip(pairs[who][index][0 if place == 0 else 1], 0, 1).transpose(1, 2, 0)
                panel.imshow(picture.squeeze(-1) if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=1)
            else:
                panel.axis("off")
            if line == 0:
                panel.set_title("private" if place == 0 else attackers[place - 1], fontsize=8)
        axes[line, 0].set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=90)
