"""The charts of the report as Vega-Lite specifications, each with its message in a sentence and its table.

Colours are names (``@good``) that the page replaces by those of the light or the dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.report.pictures import evenly
from fedleak.report.run_data import RunData

MOST_POINTS = 1500
MOST_TRACES = 40
MOST_SENTENCES = 4
MOST_MAPS = 8  # runs that get heat maps of their own
MOST_CELLS = 40  # clients (and rounds, classes) a heat map shows


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        key: its id in the page.
        title: what it shows.
        sentence: what it says, in words: the caption, and what a screen reader reads.
        spec: the Vega-Lite specification, without size and theme.
        columns, rows: the table behind it.
    """

    key: str
    title: str
    sentence: str
    spec: dict[str, Any]
    columns: list[str]
    rows: list[list[Any]]

    def without_run(self) -> Chart:
        """The same chart for a single run, whose name need not stand in every line of the table."""
        if self.columns[0] != "run":
            return self
        return replace(self, columns=self.columns[1:], rows=[row[1:] for row in self.rows])


def federation_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Utility and loss by round, and what data the clients trained on."""
    charts = []
    for column, title, axis, rule in (
        ("test_accuracy", "Test accuracy of the shared model, by round", "test accuracy", "%"),
        ("train_loss", "Training loss of the clients, by round", "mean training loss", ".2~f"),
    ):
        series = {run.name: run.rounds[["round", column]].dropna() for run in runs}
        series = {name: table for name, table in series.items() if len(table)}
        if not series:
            continue
        said = [_course(name, table, column, rule, len(runs) > 1) for name, table in series.items()]
        rows = [
            {"run": name, "round": int(number), "value": _plain(value)}
            for name, table in series.items()
            for number, value in table.itertuples(index=False)
        ]
        charts.append(_lines(column, title, said, rows, axis, rule, runs))
    for index, run in enumerate(runs[:MOST_MAPS]):
        if run.data:
            charts.append(_data_chart(f"data-{index}", run, len(runs) > 1))
    return charts


def leak_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Labels and images, by round and client, and how close the images came."""
    several = len(runs) > 1
    charts = []
    if several:
        charts += _comparison(runs)
    labels = {run.name: run.attacks.dropna(subset=["label_accuracy"]) for run in runs}
    rows = [
        {"run": name, "round": int(number), "value": float(value), "of": f"{count} updates"}
        for name, table in labels.items()
        for number, value, count in table.groupby("round")["label_accuracy"].agg(["mean", "count"]).itertuples()
    ]
    if rows:
        said = [
            _said(
                name,
                f"{_percent(table['label_accuracy'].mean())} of the labels were inferred rightly, averaged over "
                f"{_many(len(table), 'update')}.",
                several,
            )
            for name, table in labels.items()
            if len(table)
        ]
        charts.append(_lines("labels", "Labels inferred, by round", said, rows, "label accuracy", "%", runs))
    known = {run.name: run.leakage.dropna(subset=["recovered"]) for run in runs if not run.labels_only}
    rows = [
        {"run": name, "round": int(number), "value": hits / count, "of": f"{int(hits)} of {count} images"}
        for name, table in known.items()
        for number, hits, count in table.groupby("round")["recovered"].agg(["sum", "count"]).itertuples()
    ]
    if rows:
        said = [_when(name, table, several) for name, table in known.items() if len(table)]
        charts.append(_lines("recovered", "Images recovered, by round", said, rows, "recovered", "%", runs))
    for index, run in enumerate(runs[:MOST_MAPS]):
        if len(known.get(run.name, ())):
            charts.append(_who_and_when(f"clients-{index}", run.name, known[run.name], several))
    return charts + _distributions(runs)


def effort_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Why attacks stopped, and what their evaluations bought."""
    charts = []
    rows = [
        {"run": run.name, "reason": str(reason), "count": int(count)}
        for run in runs
        for reason, count in run.attacks["stop_reason"].fillna("not said").value_counts().items()
    ]
    if rows:
        reasons = pd.DataFrame(rows).groupby("reason")["count"].sum().sort_values(ascending=False)
        said = ", ".join(f"{reason} {count}" for reason, count in list(reasons.items())[:6])
        spec = {
            "data": {"values": rows},
            "height": 30 * len(reasons),
            "mark": {"type": "bar", "cornerRadiusEnd": 3},
            "encoding": {
                "y": {"field": "reason", "type": "nominal", "sort": "-x", "title": None, "axis": {"labelLimit": 220}},
                "x": {"field": "count", "type": "quantitative", "title": "updates", "axis": {"tickMinStep": 1}},
                "tooltip": _tips(("run", "run"), ("reason", "stop reason"), ("count", "updates")),
                **_colour(runs),
            },
        }
        charts.append(
            Chart(
                "stops",
                "Why the attack on an update stopped",
                f"{_many(int(reasons.sum()), 'update')}: {said}.",
                spec,
                ["run", "stop reason", "updates"],
                [[r["run"], r["reason"], r["count"]] for r in rows],
            )
        )
    return charts + [chart for chart in (_traces(runs), _films(runs), *_endpoints(runs)) if chart is not None]


def _traces(runs: Sequence[RunData]) -> Chart | None:
    every = [(run.name, *trace) for run in runs for trace in run.traces]
    shown = [every[i] for i in evenly(len(every), MOST_TRACES)]
    rows = [
        {"run": name, "update": f"{name}: round {number}, client {client}", "x": points[i][0], "y": points[i][1]}
        for name, number, client, points in shown
        for i in evenly(len(points), 150)
        if math.isfinite(points[i][1]) and points[i][1] > 0
    ]
    if not rows:
        return None
    left_out = f" Shown are {len(shown)} of {len(every)}, evenly chosen." if len(shown) < len(every) else ""
    ends = sorted(points[-1][1] for _, _, _, points in every if points and math.isfinite(points[-1][1]))
    spec = {
        "data": {"values": rows},
        "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.6},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "title": "evaluations of the objective"},
            "y": _log("y", "objective"),
            "detail": {"field": "update"},
            "tooltip": _tips(("update", "update"), ("x", "evaluations"), ("y", "objective")),
            **_colour(runs),
        },
    }
    return Chart(
        "traces",
        "The objective during the attack, a line an update",
        f"The lower the line, the closer the dummy update came to the captured one; the median trace ends at "
        f"{_short(ends[len(ends) // 2])}.{left_out}",
        spec,
        ["update", "evaluations", "objective"],
        [[r["update"], r["x"], r["y"]] for r in rows],
    )


def _films(runs: Sequence[RunData]) -> Chart | None:
    """The error along the way, of the images that snapshots were kept of."""
    every = [(run.name, m) for run in runs for m in run.matches if m.frames and m.mse is not None]
    shown = [every[i] for i in evenly(len(every), MOST_TRACES)]
    rows = [
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
        return None
    first, last = (sorted(m.frames[i].mse or 0.0 for _, m in every)[len(every) // 2] for i in (0, -1))
    passed = sorted(
        next(frame.evaluations for frame in m.frames if frame.mse is not None and frame.mse < RECOVERED_MSE)
        for _, m in every
        if m.recovered
    )
    sentence = f"A line an image. The median error goes from {_short(first)} at the start to {_short(last)} at the end."
    closest = sorted(min(frame.mse or 0.0 for frame in m.frames) for _, m in every)[len(every) // 2]
    if closest < last / 2:
        sentence += f" On the way it had come down to {_short(closest)}, which the attacker cannot see."
    if passed:
        half = passed[len(passed) // 2]
        sentence += f" Half of the recovered images were below the dashed line after {half:,} evaluations or sooner."
    if len(shown) < len(every):
        sentence += f" Shown are {len(shown)} of {len(every)}, evenly chosen."
    outcomes = {"domain": ["recovered", "not recovered"], "range": ["@leak", "@faint"]}
    line = {
        "mark": {"type": "line", "point": {"size": 20}, "strokeWidth": 1.5, "opacity": 0.6},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": "evaluations of the objective",
                "scale": {"type": "log", "nice": False},
                "axis": {"format": ",", "tickCount": 6, "grid": False},
            },
            "y": _log("mse", "MSE of the image"),
            "detail": {"field": "image"},
            "tooltip": _tips(("image", "image"), ("x", "evaluations"), ("mse", "MSE")),
            **(
                _colour(runs)
                or {
                    "color": {
                        "field": "outcome",
                        "type": "nominal",
                        "scale": outcomes,
                        "legend": {"orient": "top", "title": None},
                    }
                }
            ),
        },
    }
    return Chart(
        "films",
        "The error of the images during the attack",
        sentence,
        {"data": {"values": rows}, "layer": [line, {"mark": _RULE, "encoding": {"y": {"datum": RECOVERED_MSE}}}]},
        ["image", "evaluations", "MSE"],
        [[r["image"], r["x"], r["mse"]] for r in rows],
    )


def _endpoints(runs: Sequence[RunData]) -> list[Chart]:
    rows: list[dict[str, Any]] = []
    for run in runs:
        medians = run.leakage.groupby(["round", "client"])["mse"].median()
        for _, a in run.attacks.iterrows():
            if a["evaluations"] > 0:
                error = medians.get((a["round"], a["client"]), math.nan)
                rows.append(
                    {
                        "run": run.name,
                        "update": f"round {a['round']}, client {a['client']}",
                        "x": float(a["evaluations"]),
                        "objective": _plain(a["objective"]),
                        "mse": _plain(error),
                        "stop": str(a["stop_reason"]),
                    }
                )
    charts: list[Chart] = []
    if len({r["x"] for r in rows}) < 2:
        return charts  # all spent the same: there is nothing to see
    legend = {"orient": "top"} if len({r["stop"] for r in rows}) > 1 else None
    by_reason = {"color": {"field": "stop", "type": "nominal", "title": "stop reason", "legend": legend}}
    for column, title, axis in (
        ("objective", "Objective reached, against evaluations spent", "objective at the end"),
        ("mse", "Error of the images, against evaluations spent", "median MSE of the update's images"),
    ):
        have = [r for r in rows if r[column] is not None and r[column] > 0]
        if not have:
            continue
        shown = [have[i] for i in evenly(len(have), MOST_POINTS)]
        left_out = f" Shown are {len(shown)} of {len(have)}, evenly chosen." if len(shown) < len(have) else ""
        values, spent = sorted(r[column] for r in have), sorted(r["x"] for r in have)
        layer: list[dict[str, Any]] = [
            {
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.65},
                "encoding": {
                    "x": {"field": "x", "type": "quantitative", "title": "evaluations"},
                    "y": _log(column, axis),
                    "tooltip": _tips(
                        ("run", "run"),
                        ("update", "update"),
                        ("x", "evaluations"),
                        ("objective", "objective"),
                        ("mse", "median MSE"),
                        ("stop", "stop reason"),
                    ),
                    **(_colour(runs) or by_reason),
                },
            }
        ]
        if column == "mse":
            layer.append({"mark": _RULE, "encoding": {"y": {"datum": RECOVERED_MSE}}})
        below = " The dashed line is the threshold of a recovered image." if column == "mse" else ""
        charts.append(
            Chart(
                f"effort-{column}",
                title,
                f"A point an update. Median {_short(values[len(values) // 2])} after a median of "
                f"{spent[len(spent) // 2]:,.0f} evaluations.{below}{left_out}",
                {"data": {"values": shown}, "layer": layer},
                ["run", "update", "evaluations", axis, "stop reason"],
                [[r["run"], r["update"], r["x"], r[column], r["stop"]] for r in have],
            )
        )
    return charts


def _distributions(runs: Sequence[RunData]) -> list[Chart]:
    several = len(runs) > 1
    charts = []
    psnr_rows: list[dict[str, Any]] = []
    mse_rows: list[dict[str, Any]] = []
    decibels: list[str] = []
    errors: list[str] = []
    for run in runs:
        table = run.leakage.dropna(subset=["mse"])
        if not len(table):
            continue
        median = table["mse"].median()
        decibels.append(_said(run.name, f"the median image reached {_decibels(median)}.", several))
        errors.append(_said(run.name, f"the error of the median image is {_short(median)}.", several))
        for low, count in _bins((min(max(_psnr(m), 0), 98) for m in table["mse"]), 2).items():
            end = "98 dB and more, exact copies too" if low >= 98 else f"{low} to {low + 2} dB"
            psnr_rows.append({"run": run.name, "low": low, "high": low + 2, "count": count, "range": end})
        exponents = (min(max(math.log10(m) if m > 0 else -10, -10), 0.99) for m in table["mse"])
        for low, count in _bins(exponents, 0.5).items():
            mse_rows.append(
                {
                    "run": run.name,
                    "low": 10**low,
                    "high": 10 ** (low + 0.5),
                    "count": count,
                    "range": f"below {10 ** (low + 0.5):.1e}"
                    if low <= -10
                    else f"{10**low:.1e} to {10 ** (low + 0.5):.1e}",
                }
            )
    threshold = -10 * math.log10(RECOVERED_MSE)
    for key, title, rows, axis, scale, rule, leaked, said, message in (
        (
            "psnr",
            "How close the images came: PSNR",
            psnr_rows,
            "PSNR in dB (higher is closer)",
            {"domain": [0, max([40, *(row["high"] for row in psnr_rows)])]},
            threshold,
            f"datum.low >= {threshold - 1e-6}",
            decibels,
            f"Images right of the dashed line, at {threshold:.0f} dB, count as recovered.",
        ),
        (
            "mse",
            "How close the images came: mean squared error",
            mse_rows,
            "MSE (lower is closer)",
            {"type": "log", "domain": [min([1e-4, *(row["low"] for row in mse_rows)]), 10**0.5]},
            RECOVERED_MSE,
            f"datum.high <= {RECOVERED_MSE * (1 + 1e-6)}",
            errors,
            f"Images left of the dashed line, at {RECOVERED_MSE:g}, count as recovered.",
        ),
    ):
        if not rows:
            continue
        bar = {
            "mark": {"type": "bar", "binSpacing": 1, "opacity": 0.6 if several else 1},
            "encoding": {
                "x": {
                    "field": "low",
                    "bin": "binned",
                    "type": "quantitative",
                    "title": axis,
                    "scale": scale,
                    "axis": _LOG_AXIS if key == "mse" else {"tickCount": 8},
                },
                "x2": {"field": "high"},
                "y": {
                    "field": "count",
                    "type": "quantitative",
                    "title": "images",
                    "stack": None if several else "zero",
                    "axis": {"tickMinStep": 1},
                },
                "tooltip": _tips(("run", "run"), ("range", axis.split(" ")[0]), ("count", "images")),
                **(_colour(runs) or {"color": {"condition": {"test": leaked, "value": "@leak"}, "value": "@faint"}}),
            },
        }
        charts.append(
            Chart(
                key,
                title,
                f"{_join(said)} {message}",
                {"data": {"values": rows}, "layer": [bar, {"mark": _RULE, "encoding": {"x": {"datum": rule}}}]},
                ["run", axis.split(" ")[0], "images"],
                [[r["run"], r["range"], r["count"]] for r in rows],
            )
        )
    return charts


def _who_and_when(key: str, name: str, known: pd.DataFrame, several: bool) -> Chart:
    """A heat map: rounds across, clients down."""
    by_client = known.groupby("client")["recovered"].agg(["sum", "count"])
    order = by_client.sort_values(["sum", "count"], ascending=False, kind="stable")
    clients = sorted(order.index[:MOST_CELLS])
    rounds = sorted(known["round"].unique())
    rounds = [rounds[i] for i in evenly(len(rounds), MOST_CELLS)]
    cells = known.groupby(["round", "client"])["recovered"].agg(["sum", "count"])
    values = [
        {
            "round": int(number),
            "client": int(client),
            "share": hits / count,
            "text": f"{int(hits)}/{int(count)}",
        }
        for (number, client), hits, count in cells.itertuples()
        if number in rounds and client in clients
    ]
    left_out = [
        f"{len(shown)} of {total} {what}"
        for shown, total, what in (
            (clients, len(by_client), "clients, those who lost most"),
            (rounds, known["round"].nunique(), "attacked rounds, evenly chosen"),
        )
        if len(shown) < total
    ]
    small = len(rounds) <= 16
    encoding = {
        "x": {"field": "round", "type": "ordinal", "title": "round", "axis": {"labelAngle": 0, "labelOverlap": True}},
        "y": {"field": "client", "type": "ordinal", "title": "client"},
    }
    tips = _tips(("round", "round"), ("client", "client"), ("text", "recovered"))
    layer: list[dict[str, Any]] = [
        {
            "mark": {"type": "rect", "cornerRadius": 2, "stroke": "@surface", "strokeWidth": 2},
            "encoding": {
                "color": {
                    "field": "share",
                    "type": "quantitative",
                    "title": "recovered",
                    "scale": {"domain": [0, 1]},
                    "legend": {"format": "%", "orient": "top", "gradientLength": 140, "values": [0, 0.5, 1]},
                },
                "tooltip": tips,
            },
        }
    ]
    if small:
        layer.append(
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {
                    "text": {"field": "text"},
                    "color": {"condition": {"test": "datum.share >= 0.5", "value": "@onheat"}, "value": "@ink"},
                    "tooltip": tips,
                },
            }
        )
    spec = {
        "data": {"values": values},
        "height": len(clients) * (24 if len(clients) <= 16 else 14),
        "encoding": encoding,
        "layer": layer,
    }
    sentence = _to_whom(by_client) + (f" Shown: {'; '.join(left_out)}." if left_out else "")
    title = "Who lost images, and when" + (f": {name}" if several else "")
    rows = [[v["round"], v["client"], v["text"], f"{v['share']:.0%}"] for v in values]
    return Chart(key, title, sentence, spec, ["round", "client", "recovered", "share"], rows)


def _data_chart(key: str, run: RunData, several: bool) -> Chart:
    table = pd.DataFrame(
        [{"client": client, "class": label, "images": count} for (client, label), count in sorted(run.data.items())]
    )
    clients = sorted(table["client"].unique())
    shown = [clients[i] for i in evenly(len(clients), MOST_CELLS)]
    values = table[table["client"].isin(shown)].to_dict("records")
    sizes = table.groupby("client")["images"].sum()
    largest = table.groupby("client")["images"].max() / sizes
    sentence = (
        f"{_many(int(sizes.sum()), 'image')} trained on in all rounds together, by {_many(len(clients), 'client')} in "
        f"{_many(table['class'].nunique(), 'class', 'classes')}; the most frequent class of a client makes up "
        f"{_percent(largest.mean())} of its images on average."
    )
    if len(shown) < len(clients):
        sentence += f" Shown are {len(shown)} of {len(clients)} clients, evenly chosen."
    spec = {
        "data": {"values": values},
        "height": len(shown) * (24 if len(shown) <= 16 else 14),
        "mark": {"type": "rect", "cornerRadius": 2, "stroke": "@surface", "strokeWidth": 2},
        "encoding": {
            "x": {
                "field": "class",
                "type": "ordinal",
                "title": "class",
                "axis": {"labelAngle": 0, "labelOverlap": True},
            },
            "y": {"field": "client", "type": "ordinal", "title": "client"},
            "color": {
                "field": "images",
                "type": "quantitative",
                "title": "images",
                "scale": {"range": ["@cool0", "@cool1"], "domainMin": 0},
                "legend": {"orient": "top", "gradientLength": 140, "tickMinStep": 1},
            },
            "tooltip": _tips(("client", "client"), ("class", "class"), ("images", "images")),
        },
    }
    title = "What the clients trained on, by class" + (f": {run.name}" if several else "")
    rows = table.to_numpy().tolist()
    return Chart(key, title, sentence, spec, ["client", "class", "images"], rows)


def _comparison(runs: Sequence[RunData]) -> list[Chart]:
    """The trade a defense makes: utility across, leakage up."""
    points: list[dict[str, Any]] = []
    for run in runs:
        accuracy, known = run.rounds["test_accuracy"].dropna(), run.leakage["recovered"].dropna()
        if len(accuracy) and len(known) and not run.labels_only:
            points.append(
                {
                    "run": run.name,
                    "accuracy": float(accuracy.iloc[-1]),
                    "recovered": float(known.mean()),
                    "of": f"{int(known.sum())} of {len(known)}",
                }
            )
    if not points:
        return []
    encoding = {
        "x": {
            "field": "accuracy",
            "type": "quantitative",
            "title": "final test accuracy",
            "axis": {"format": "%"},
            "scale": {"domain": [0, 1]},
        },
        "y": {
            "field": "recovered",
            "type": "quantitative",
            "title": "images recovered",
            "axis": {"format": "%"},
            "scale": {"domain": [0, 1]},
        },
        "tooltip": _tips(("run", "run"), ("accuracy", "final test accuracy"), ("of", "images recovered")),
        **_colour(runs),
    }
    worst = max(points, key=lambda p: p["recovered"])
    least = min(points, key=lambda p: p["recovered"])
    sentence = (
        f"Down and to the right is better for the clients. Most leaked in {worst['run']} ({worst['of']} images "
        f"recovered at {_percent(worst['accuracy'])} accuracy), least in {least['run']} ({least['of']} at "
        f"{_percent(least['accuracy'])})."
    )
    spec = {"data": {"values": points}, "mark": {"type": "point", "filled": True, "size": 160}, "encoding": encoding}
    rows = [[p["run"], f"{p['accuracy']:.1%}", p["of"]] for p in points]
    return [
        Chart(
            "trade",
            "Utility against leakage, a point a run",
            sentence,
            spec,
            ["run", "final test accuracy", "images recovered"],
            rows,
        )
    ]


_RULE = {"type": "rule", "strokeDash": [4, 4], "strokeWidth": 1.5, "color": "@ink"}
# Of a logarithmic axis, the powers of ten alone.
_IS_DECADE = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-6"
_DECADES = {"condition": {"test": _IS_DECADE, "value": 1}, "value": 0}
_LOG_AXIS = {
    "format": ".0e",
    "labelExpr": f"{_IS_DECADE} ? datum.label : ''",
    "labelOverlap": True,
    "tickOpacity": _DECADES,
}


def _lines(
    key: str,
    title: str,
    sentences: Sequence[str],
    rows: list[dict[str, Any]],
    axis: str,
    rule: str,
    runs: Sequence[RunData],
) -> Chart:
    """A line with points over the rounds; `rule` is the format of the values."""
    few = len({r["round"] for r in rows}) <= 60
    y: dict[str, Any] = {"field": "value", "type": "quantitative", "title": axis, "axis": {"format": rule}}
    if rule == "%":
        y["scale"] = {"domain": [0, 1]}
    tips = [("run", "run"), ("round", "round"), ("value", axis), *([("of", "of")] if "of" in rows[0] else [])]
    spec = {
        "data": {"values": rows},
        "mark": {"type": "line", "point": {"size": 45} if few else False, "strokeWidth": 2},
        "encoding": {
            "x": {
                "field": "round",
                "type": "quantitative",
                "title": "round",
                "axis": {
                    "tickMinStep": 1,
                    "format": "d",
                    "grid": False,
                    "labelExpr": "datum.value < 1 ? '' : datum.label",  # there is no round 0
                },
                "scale": {"zero": False, "nice": False, "padding": 12},
            },
            "y": y,
            "tooltip": _tips(*tips, formats={"value": ".1%" if rule == "%" else ".4~g"}),
            **_colour(runs),
        },
    }
    extra = ["of"] if "of" in rows[0] else []
    table = [
        [r["run"], r["round"], f"{r['value']:.1%}" if rule == "%" else r["value"], *[r[e] for e in extra]]
        for r in rows
        if r["value"] is not None
    ]
    return Chart(key, title, _join(sentences), spec, ["run", "round", axis, *extra], table)


def _course(name: str, table: pd.DataFrame, column: str, rule: str, several: bool) -> str:
    first, last = table.iloc[0], table.iloc[-1]
    show = _percent if rule == "%" else _short
    said = f"{show(last[column])} in round {last['round']:.0f}."
    return _said(
        name, f"from {show(first[column])} in round {first['round']:.0f} to {said}" if len(table) > 1 else said, several
    )


def _when(name: str, known: pd.DataFrame, several: bool) -> str:
    by_round = known.groupby("round")["recovered"].agg(["sum", "count"])
    hit = by_round[by_round["sum"] > 0]
    attacked = _many(len(by_round), "attacked round")
    if not len(hit):
        return _said(name, f"no image was recovered in {attacked}.", several)
    return _said(
        name,
        f"images were recovered in {len(hit)} of {attacked}, first in round {hit.index[0]}; "
        f"most in {_most(hit, 'round')}.",
        several,
    )


def _to_whom(by_client: pd.DataFrame) -> str:
    hit = by_client[by_client["sum"] > 0]
    total = _many(len(by_client), "attacked client")
    if not len(hit):
        return f"None of {total} lost an image."
    return f"{len(hit)} of {total} lost at least one image; most were lost by {_most(hit, 'client')}."


def _most(hit: pd.DataFrame, noun: str) -> str:
    """``round 3 (7 of 8)``, or ``rounds 1 and 4 (8 of 8 each)``; by number of images."""
    worst = hit[hit["sum"] == hit["sum"].max()]
    names = [str(index) for index in worst.index]
    totals = f"{worst['sum'].iloc[0]:.0f} of {worst['count'].iloc[0]}"
    if len(names) == 1:
        return f"{noun} {names[0]} ({totals})"
    if len(names) > 4 or worst["count"].nunique() > 1:
        return f"{len(names)} {noun}s ({worst['sum'].iloc[0]:.0f} images each)"
    return f"{noun}s {', '.join(names[:-1])} and {names[-1]} ({totals} each)"


def _colour(runs: Sequence[RunData]) -> dict[str, Any]:
    """A colour a run, the same in every chart; none for a single run."""
    if len(runs) == 1:
        return {}
    legend = {"orient": "top", "title": None, "labelLimit": 170}
    scale = {"domain": [run.name for run in runs]}
    return {"color": {"field": "run", "type": "nominal", "scale": scale, "legend": legend}}


def _log(column: str, title: str) -> dict[str, Any]:
    axis = _LOG_AXIS | {"gridOpacity": _DECADES}
    return {"field": column, "type": "quantitative", "title": title, "scale": {"type": "log"}, "axis": axis}


def _tips(*pairs: tuple[str, str], formats: dict[str, str] | None = None) -> list[dict[str, Any]]:
    kinds = {"x": ",", "y": ".2e", "objective": ".2e", "mse": ".2e", "accuracy": ".1%"} | (formats or {})
    return [
        {"field": name, "title": title, **({"format": kinds[name], "type": "quantitative"} if name in kinds else {})}
        for name, title in pairs
    ]


def _bins(values: Iterable[float], width: float) -> dict[float, int]:
    counts: dict[float, int] = {}
    for value in values:
        low = math.floor(value / width + 1e-9) * width
        counts[low] = counts.get(low, 0) + 1
    return dict(sorted(counts.items()))


def _said(name: str, sentence: str, several: bool) -> str:
    """The sentence's subject where there are several runs."""
    return f"{name}: {sentence}" if several else sentence[:1].upper() + sentence[1:]


def _many(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.1 or 0.99 < share < 1 else f"{share:.0%}"


def _join(sentences: Sequence[str]) -> str:
    """The first few of them: more runs than that are easier read off the chart or its table."""
    rest = len(sentences) - MOST_SENTENCES
    return " ".join(sentences[:MOST_SENTENCES]) + (f" ({rest} more runs are in the table.)" if rest > 0 else "")


def _psnr(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf


def _decibels(error: float) -> str:
    return f"{_psnr(error):.1f} dB" if error > 0 else "an infinite PSNR: it is exact"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _plain(value: Any) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
