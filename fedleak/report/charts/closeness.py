"""How close the images came: over all images, and beside what the updates would allow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median_high
from typing import Any

import pandas as pd

from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.report.charts import vega
from fedleak.report.common import join, many, psnr, said, short, thinned
from fedleak.report.run_data import RunData


def reached_and_possible(runs: Sequence[RunData]) -> list[vega.Chart]:
    """The error of each image against its limit; nothing where no limit is known."""
    rows: list[vega.Row] = [
        {
            "run": run.name,
            "image": f"round {row['round']}, client {row['client']}, image {row['image']:.0f}",
            "limit": row["limit_mse"],
            "mse": row["mse"],
            "outcome": "recovered" if row["mse"] < RECOVERED_MSE else "not recovered",
        }
        for run in runs
        for row in run.limits.dropna(subset=["mse"]).to_dict("records")
        if row["limit_mse"] > 0 and math.isfinite(row["mse"])
    ]
    if not rows:
        return []
    values = [value for row in rows for value in (row["limit"], row["mse"]) if value > 0] + [RECOVERED_MSE]
    ends = [10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))]
    shown, left_out = thinned(rows, vega.MOST_POINTS)
    # A logarithm has no 0: an exact copy stands at the lower edge.
    drawn = [row | {"reached": max(row["mse"], ends[0])} for row in shown]
    fields = {"run": "run", "image": "image", "mse": "reached", "limit": "possible"}
    encoding = {
        "x": vega.logarithm("limit", "possible: the limit of the MSE", domain=ends, nice=False),
        "y": vega.logarithm("reached", "reached: the MSE", domain=ends, nice=False),
        "tooltip": vega.tips(fields),
        **vega.colour(runs, vega.OUTCOME),
    }
    diagonal = {
        "data": {"values": [{"limit": end, "reached": end} for end in ends]},
        "mark": {"type": "line", "strokeWidth": 1.5, "color": "@ink"},
        "encoding": {name: encoding[name] for name in ("x", "y")},
    }
    return [
        vega.chart(
            "limit",
            "What was reached, beside what was possible",
            f"{_beside(rows)} The limit is the least error that a linear attacker who knows how such images vary could "
            "expect, from everything the update tells. The network is taken as linear and images as Gaussian: it is an "
            f"estimate, and single images can fall below it. On the solid line nothing more could be had.{left_out}",
            rows,
            fields,
            {
                "height": 320,
                "layer": [
                    diagonal,
                    {"mark": vega.POINT, "encoding": encoding},
                    vega.threshold("y"),
                    vega.threshold("x"),
                ],
            },
            values=drawn,
        )
    ]


def _beside(rows: Sequence[vega.Row]) -> str:
    possible = sum(row["limit"] < RECOVERED_MSE for row in rows)
    recovered = sum(row["mse"] < RECOVERED_MSE for row in rows)
    ratio = median_high(row["mse"] / row["limit"] for row in rows)
    return (
        f"A point an image. {possible:,} of {many(len(rows), 'image')} could be recovered by this measure (left of the "
        f"dashed line), {recovered:,} were (below the other). Half came within {short(ratio)} times their limit."
    )


def distributions(runs: Sequence[RunData]) -> list[vega.Chart]:
    """Two histograms of the images, by PSNR and by mean squared error."""
    errors = {run.name: run.leakage["mse"].dropna() for run in runs}
    medians = {name: float(values.median()) for name, values in errors.items() if len(values)}
    if not medians:
        return []
    decibels = {name: f"{psnr(m):.1f} dB" if m > 0 else "an infinite PSNR: it is exact" for name, m in medians.items()}
    line = psnr(RECOVERED_MSE)
    by_psnr = _bars(errors, lambda m: min(max(psnr(m), 0), 98), 2, lambda low: low)
    for bar in by_psnr:
        bar["range"] = "98 dB and more, exact copies too" if bar["low"] >= 98 else f"{bar['low']} to {bar['high']} dB"
    by_mse = _bars(errors, lambda m: min(max(math.log10(m) if m > 0 else -10, -10), 0.99), 0.5, lambda low: 10**low)
    for bar in by_mse:
        bar["range"] = ("below" if bar["low"] < 2e-10 else f"{bar['low']:.1e} to") + f" {bar['high']:.1e}"
    decades = {"type": "log", "domain": [min([1e-4, *(bar["low"] for bar in by_mse)]), 10**0.5]}
    return [
        _histogram(
            "psnr",
            "How close the images came: PSNR",
            [said(name, f"the median image reached {reached}.", runs) for name, reached in decibels.items()],
            f"Images right of the dashed line, at {line:.0f} dB, count as recovered.",
            by_psnr,
            {
                "title": "PSNR in dB (higher is closer)",
                "scale": {"domain": [0, max([40, *(bar["high"] for bar in by_psnr)])]},
                "axis": {"tickCount": 8},
            },
            line,
            f"datum.low >= {line - 1e-6}",
            runs,
        ),
        _histogram(
            "mse",
            "How close the images came: mean squared error",
            [said(name, f"the error of the median image is {short(m)}.", runs) for name, m in medians.items()],
            f"Images left of the dashed line, at {RECOVERED_MSE:g}, count as recovered.",
            by_mse,
            {"title": "MSE (lower is closer)", "scale": decades, "axis": vega.LOG_AXIS},
            RECOVERED_MSE,
            f"datum.high <= {RECOVERED_MSE * (1 + 1e-6)}",
            runs,
        ),
    ]


def _bars(
    errors: Mapping[str, pd.Series], place: Callable[[float], float], width: float, back: Callable[[float], float]
) -> list[vega.Row]:
    """Each run's images in bins of `width` on the scale that `place` leads to and `back` from."""
    rows: list[vega.Row] = []
    for name, values in errors.items():
        lows = Counter(math.floor(place(value) / width + 1e-9) * width for value in values)
        rows += [
            {"run": name, "low": back(low), "high": back(low + width), "count": count}
            for low, count in sorted(lows.items())
        ]
    return rows


def _histogram(
    key: str,
    title: str,
    sentences: Sequence[str],
    message: str,
    rows: list[vega.Row],
    x: dict[str, Any],
    line: float,
    leaked: str,
    runs: Sequence[RunData],
) -> vega.Chart:
    """Bars over ``low`` to ``high``, coloured where the expression `leaked` says that they count as recovered."""
    several = len(runs) > 1
    fields = {"run": "run", "range": x["title"].split(" ")[0], "count": "images"}
    bar = {
        "mark": {"type": "bar", "binSpacing": 1, "opacity": 0.6 if several else 1},
        "encoding": {
            "x": {"field": "low", "bin": "binned", "type": "quantitative", **x},
            "x2": {"field": "high"},
            "y": vega.quantity("count", "images", stack=None if several else "zero", axis={"tickMinStep": 1}),
            "tooltip": vega.tips(fields),
            **vega.colour(runs, {"color": {"condition": {"test": leaked, "value": "@leak"}, "value": "@faint"}}),
        },
    }
    return vega.chart(
        key, title, f"{join(sentences)} {message}", rows, fields, {"layer": [bar, vega.threshold("x", line)]}
    )
