"""The attack: why it stopped, and what its evaluations bought."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_high

from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.report.charts import vega
from fedleak.report.common import evenly, many, plain, short, thinned
from fedleak.report.run_data import RunData

MOST_TRACES = 40
EVALUATIONS = "evaluations of the objective"
LINE = {"type": "line", "strokeWidth": 1.5, "opacity": 0.6}


def effort_charts(runs: Sequence[RunData]) -> list[vega.Chart]:
    """Why attacks stopped, and what their evaluations bought."""
    return [*_stops(runs), *_traces(runs), *_films(runs), *_endpoints(runs)]


def _stops(runs: Sequence[RunData]) -> list[vega.Chart]:
    rows: list[vega.Row] = [
        {"run": run.name, "reason": str(reason), "count": int(count)}
        for run in runs
        for reason, count in run.attacks["stop_reason"].fillna("not said").value_counts().items()
    ]
    if not rows:
        return []
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["reason"]] = counts.get(row["reason"], 0) + row["count"]
    reasons = sorted(sorted(counts.items()), key=lambda item: -item[1])
    words = ", ".join(f"{reason} {count}" for reason, count in reasons[:6])
    fields = {"run": "run", "reason": "stop reason", "count": "updates"}
    axis = {"labelLimit": 220}
    spec = {
        "height": 30 * len(reasons),
        "mark": {"type": "bar", "cornerRadiusEnd": 3},
        "encoding": {
            "y": {"field": "reason", "type": "nominal", "sort": "-x", "title": None, "axis": axis},
            "x": vega.quantity("count", "updates", axis={"tickMinStep": 1}),
            "tooltip": vega.tips(fields),
            **vega.colour(runs),
        },
    }
    sentence = f"{many(sum(counts.values()), 'update')}: {words}."
    return [vega.chart("stops", "Why the attack on an update stopped", sentence, rows, fields, spec)]


def _traces(runs: Sequence[RunData]) -> list[vega.Chart]:
    every = [(run.name, *trace) for run in runs for trace in run.traces]
    shown, left_out = thinned(every, MOST_TRACES)
    rows: list[vega.Row] = [
        {"run": name, "update": f"{name}: round {number}, client {client}", "x": points[i][0], "y": points[i][1]}
        for name, number, client, points in shown
        for i in evenly(len(points), 150)
        if math.isfinite(points[i][1]) and points[i][1] > 0
    ]
    if not rows:
        return []
    end = median_high([points[-1][1] for _, _, _, points in every if points and math.isfinite(points[-1][1])])
    fields = {"update": "update", "x": "evaluations", "y": "objective"}
    spec = {
        "mark": LINE,
        "encoding": {
            "x": vega.quantity("x", EVALUATIONS),
            "y": vega.logarithm("y", "objective"),
            "detail": {"field": "update"},
            "tooltip": vega.tips(fields),
            **vega.colour(runs),
        },
    }
    sentence = (
        f"The lower the line, the closer the dummy update came to the captured one; the median trace ends at "
        f"{short(end)}.{left_out}"
    )
    return [vega.chart("traces", "The objective during the attack, a line an update", sentence, rows, fields, spec)]


def _films(runs: Sequence[RunData]) -> list[vega.Chart]:
    """The error along the way, of the images that snapshots were kept of."""
    every = [(run.name, m) for run in runs for m in run.matches if m.frames and m.mse is not None]
    shown, left_out = thinned(every, MOST_TRACES)
    rows: list[vega.Row] = [
        {
            "run": name,
            "image": f"{f'{name}: ' if len(runs) > 1 else ''}round {m.round}, client {m.client}, image {m.image}",
            "x": frame.evaluations,
            "mse": frame.mse,
            "outcome": "recovered" if m.recovered else "not recovered",
        }
        for name, m in shown
        for frame in m.frames
        if frame.mse and math.isfinite(frame.mse)
    ]
    if not rows:
        return []
    first, last = (median_high([m.frames[i].mse or 0.0 for _, m in every]) for i in (0, -1))
    sentence = f"A line an image. The median error goes from {short(first)} at the start to {short(last)} at the end."
    closest = median_high([min(frame.mse or 0.0 for frame in m.frames) for _, m in every])
    if closest < last / 2:
        sentence += f" On the way it had come down to {short(closest)}, which the attacker cannot see."
    passed = [
        next(frame.evaluations for frame in m.frames if frame.mse is not None and frame.mse < RECOVERED_MSE)
        for _, m in every
        if m.recovered
    ]
    if passed:
        half = median_high(passed)
        sentence += f" Half of the recovered images were below the dashed line after {half:,} evaluations or sooner."
    fields = {"image": "image", "x": "evaluations", "mse": "MSE"}
    axis = {"format": ",", "tickCount": 6, "grid": False}
    line = {
        "mark": {"type": "line", "point": {"size": 20}, "strokeWidth": 1.5, "opacity": 0.6},
        "encoding": {
            "x": vega.quantity("x", EVALUATIONS, scale={"type": "log", "nice": False}, axis=axis),
            "y": vega.logarithm("mse", "MSE of the image"),
            "detail": {"field": "image"},
            "tooltip": vega.tips(fields),
            **vega.colour(runs, vega.OUTCOME),
        },
    }
    title = "The error of the images during the attack"
    return [vega.chart("films", title, sentence + left_out, rows, fields, {"layer": [line, vega.threshold("y")]})]


def _endpoints(runs: Sequence[RunData]) -> list[vega.Chart]:
    rows: list[vega.Row] = []
    for run in runs:
        medians = run.leakage.groupby(["round", "client"])["mse"].median()
        rows += [
            {
                "run": run.name,
                "update": f"round {a['round']}, client {a['client']}",
                "x": float(a["evaluations"]),
                "objective": plain(a["objective"]),
                "mse": plain(medians.get((a["round"], a["client"]), math.nan)),
                "stop": str(a["stop_reason"]),
            }
            for _, a in run.attacks.iterrows()
            if a["evaluations"] > 0
        ]
    if len({row["x"] for row in rows}) < 2:
        return []  # all spent the same: there is nothing to see
    return [
        *_endpoint("objective", "Objective reached, against evaluations spent", "objective at the end", rows, runs),
        *_endpoint(
            "mse", "Error of the images, against evaluations spent", "median MSE of the update's images", rows, runs
        ),
    ]


def _endpoint(column: str, title: str, axis: str, rows: list[vega.Row], runs: Sequence[RunData]) -> list[vega.Chart]:
    have = [row for row in rows if row[column] is not None and row[column] > 0]
    if not have:
        return []
    shown, left_out = thinned(have, vega.MOST_POINTS)
    legend = {"orient": "top"} if len({row["stop"] for row in rows}) > 1 else None
    by_reason = {"color": {"field": "stop", "type": "nominal", "title": "stop reason", "legend": legend}}
    names = {"run": "run", "update": "update", "x": "evaluations"}
    tip = names | {"objective": "objective", "mse": "median MSE", "stop": "stop reason"}
    point = {
        "mark": vega.POINT,
        "encoding": {
            "x": vega.quantity("x", "evaluations"),
            "y": vega.logarithm(column, axis),
            "tooltip": vega.tips(tip),
            **vega.colour(runs, by_reason),
        },
    }
    value, spent = (median_high([row[name] for row in have]) for name in (column, "x"))
    sentence = f"A point an update. Median {short(value)} after a median of {spent:,.0f} evaluations."
    layer: list[vega.Row] = [point]
    if column == "mse":
        layer.append(vega.threshold("y"))
        sentence += " The dashed line is the threshold of a recovered image."
    fields = names | {column: axis, "stop": "stop reason"}
    return [vega.chart(f"effort-{column}", title, sentence + left_out, have, fields, {"layer": layer}, values=shown)]
