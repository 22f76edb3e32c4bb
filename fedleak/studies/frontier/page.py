"""The frontier on one page: the picture, the images, and the table; opened from disk, with nothing to fetch."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak import files
from fedleak.report.common import percent, small
from fedleak.studies.frontier.ranking import affordable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1f2937 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto }
figcaption { color: #4b5563; font-size: 13px }
"""


def write_page(summary: pd.DataFrame, folder: Path, attackers: Sequence[str], cost: float) -> Path:
    """``frontier.html`` in `folder`, which holds the pictures already; returns its path.

    Args:
        cost: test accuracy that a defense may cost, see `rank`.
    """
    parts = [f"<h1>Defenses: cost and leakage</h1><p>{html.escape(sentence(summary, cost))}</p>"]
    said = {
        "frontier.png": "Left: error of the best attack (solid) and the least error anyone could reach (dashed). "
        "Right: what a classifier trained on other images still names rightly. Numbers at the points are strengths, "
        "bars 95% intervals, which take three values.",
        "ranking.png": "What leaks through the defenses that cost little, by the limit: the least error anyone could "
        "reach, and that of the best attack.",
        "privacy.png": "By epsilon: error of the best attack and the limit; what was recovered, the most that the "
        "chance of a reconstruction can be (formal bound, one of ten known candidates), and test accuracy.",
        "images.png": "Private images and what each attacker rebuilt: " + ", ".join(attackers) + ".",
    }
    for name, caption in said.items():
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            caption = html.escape(caption)
            parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">')
            parts.append(f"<figcaption>{caption}</figcaption></figure>")
    parts.append(_table(summary))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fedleak frontier</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    path = folder / "frontier.html"
    files.write_atomically(path, page.encode())
    return path


def sentence(summary: pd.DataFrame, cost: float) -> str:
    """The result in words: of the defenses that cost at most so much accuracy, the one that leaks least."""
    cheap = affordable(summary, cost)
    points = f"{100 * cost:g} points of test accuracy"
    if not len(cheap):
        return f"No defense costs {points} or less."
    row = cheap.sort_values("mse").iloc[-1]
    limit = "" if pd.isna(row["limit_mse"]) else f" (possible: {small(float(row['limit_mse']))})"
    return (
        f"Of {len(cheap)} settings that cost at most {points}, {row['defense']} {row['strength']:g} "
        f"leaks least: the best attack ({row['attacker']}) is left with a mean squared error of "
        f"{small(float(row['mse']))}{limit}, and {percent(float(row['recognised']))} of its images are recognised."
    )


def _table(summary: pd.DataFrame) -> str:
    shown = ["defense", "strength", "attacker", "test_accuracy", "accuracy_lost", "epsilon", "label_accuracy", "mse"]
    shown += [
        "mse_low",
        "mse_high",
        "psnr",
        "ssim",
        "recovered",
        "recognised",
        "limit_mse",
        "limit_mse_low",
        "limit_mse_high",
        "limit_bits",
        "reconstruction_bound",
    ]
    shown += ["lpips"] if "lpips" in summary and summary["lpips"].notna().any() else []
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in shown)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(_cell(name, row[name]))}</td>" for name in shown) + "</tr>"
        for _, row in summary.iterrows()
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        return "–"
    if name in ("test_accuracy", "accuracy_lost", "label_accuracy", "recovered", "recognised"):
        return f"{float(value):.1%}"
    return small(float(value)) if "mse" in name else f"{float(value):.4g}"
