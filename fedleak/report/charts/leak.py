"""The leak: what was read off the updates, when, and to whom; and what the defense that prevents it costs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fedleak.report.charts import vega
from fedleak.report.charts.closeness import distributions, reached_and_possible
from fedleak.report.common import evenly, many, percent, said
from fedleak.report.run_data import RunData


def leak_charts(runs: Sequence[RunData]) -> list[vega.Chart]:
    """Labels and images, by round and client, and how close the images came."""
    charts = _trade(runs) if len(runs) > 1 else []
    labels = {run.name: run.attacks.dropna(subset=["label_accuracy"]) for run in runs}
    rows: list[vega.Row] = [
        {"run": name, "round": int(number), "value": float(value), "of": f"{count} updates"}
        for name, table in labels.items()
        for number, value, count in table.groupby("round")["label_accuracy"].agg(["mean", "count"]).itertuples()
    ]
    if rows:
        sentences = [said(name, _labels(table), runs) for name, table in labels.items() if len(table)]
        charts.append(
            vega.by_round("labels", "Labels inferred, by round", sentences, rows, "label accuracy", "%", runs)
        )
    images = {run.name: run.leakage.dropna(subset=["recovered"]) for run in runs if not run.labels_only}
    images = {name: table for name, table in images.items() if len(table)}
    rows = [
        {"run": name, "round": int(number), "value": hits / count, "of": f"{int(hits)} of {count} images"}
        for name, table in images.items()
        for number, hits, count in table.groupby("round")["recovered"].agg(["sum", "count"]).itertuples()
    ]
    if rows:
        sentences = [said(name, _when(table), runs) for name, table in images.items()]
        charts.append(vega.by_round("recovered", "Images recovered, by round", sentences, rows, "recovered", "%", runs))
    charts += reached_and_possible(runs)
    maps = enumerate(run.name for run in runs[: vega.MOST_MAPS])
    charts += [_who_and_when(f"clients-{i}", name, images[name], runs) for i, name in maps if name in images]
    return charts + distributions(runs)


def _trade(runs: Sequence[RunData]) -> list[vega.Chart]:
    """The trade a defense makes: utility across, leakage up."""
    points: list[vega.Row] = []
    for run in runs:
        accuracy, known = run.rounds["test_accuracy"].dropna(), run.leakage["recovered"].dropna()
        if len(accuracy) and len(known) and not run.labels_only:
            of, share = f"{int(known.sum())} of {len(known)}", float(known.mean())
            points.append({"run": run.name, "accuracy": float(accuracy.iloc[-1]), "recovered": share, "of": of})
    if not points:
        return []
    shares = {"axis": {"format": "%"}, "scale": {"domain": [0, 1]}}
    fields = {"run": "run", "accuracy": "final test accuracy", "of": "images recovered"}
    encoding = {
        "x": vega.quantity("accuracy", "final test accuracy", **shares),
        "y": vega.quantity("recovered", "images recovered", **shares),
        "tooltip": vega.tips(fields),
        **vega.colour(runs),
    }
    worst, least = (choose(points, key=lambda point: point["recovered"]) for choose in (max, min))
    sentence = (
        f"Down and to the right is better for the clients. Most leaked in {worst['run']} ({worst['of']} images "
        f"recovered at {percent(worst['accuracy'])} accuracy), least in {least['run']} ({least['of']} at "
        f"{percent(least['accuracy'])})."
    )
    spec = {"mark": {"type": "point", "filled": True, "size": 160}, "encoding": encoding}
    return [vega.chart("trade", "Utility against leakage, a point a run", sentence, points, fields, spec)]


def _who_and_when(key: str, name: str, known: pd.DataFrame, runs: Sequence[RunData]) -> vega.Chart:
    """A heat map: rounds across, clients down."""
    by_client = known.groupby("client")["recovered"].agg(["sum", "count"])
    order = by_client.sort_values(["sum", "count"], ascending=False, kind="stable")
    clients = sorted(order.index[: vega.MOST_CELLS])
    rounds = sorted(known["round"].unique())
    rounds = [rounds[i] for i in evenly(len(rounds), vega.MOST_CELLS)]
    by_cell = known.groupby(["round", "client"])["recovered"].agg(["sum", "count"])
    rows: list[vega.Row] = [
        {"round": int(number), "client": int(client), "share": hits / count, "text": f"{int(hits)}/{int(count)}"}
        for (number, client), hits, count in by_cell.itertuples()
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
    fields = {"round": "round", "client": "client", "text": "recovered"}
    legend = {"format": "%", "orient": "top", "gradientLength": 140, "values": [0, 0.5, 1]}
    heat = vega.quantity("share", "recovered", scale={"domain": [0, 1]}, legend=legend)
    layer: list[vega.Row] = [{"mark": vega.RECT, "encoding": {"color": heat, "tooltip": vega.tips(fields)}}]
    if len(rounds) <= 16:
        ink = {"condition": {"test": "datum.share >= 0.5", "value": "@onheat"}, "value": "@ink"}
        number = {"text": {"field": "text"}, "color": ink, "tooltip": vega.tips(fields)}
        layer.append({"mark": {"type": "text", "fontSize": 11}, "encoding": number})
    sentence = _to_whom(by_client) + (f" Shown: {'; '.join(left_out)}." if left_out else "")
    title = "Who lost images, and when" + (f": {name}" if len(runs) > 1 else "")
    return vega.chart(
        key, title, sentence, rows, fields | {"share": "share"}, {**vega.cells("round", clients), "layer": layer}
    )


def _labels(table: pd.DataFrame) -> str:
    share = percent(table["label_accuracy"].mean())
    return f"{share} of the labels were inferred rightly, averaged over {many(len(table), 'update')}."


def _when(known: pd.DataFrame) -> str:
    by_number = known.groupby("round")["recovered"].agg(["sum", "count"])
    hit = by_number[by_number["sum"] > 0]
    attacked = many(len(by_number), "attacked round")
    if not len(hit):
        return f"no image was recovered in {attacked}."
    first = f"images were recovered in {len(hit)} of {attacked}, first in round {hit.index[0]}"
    return f"{first}; most in {_most(hit, 'round')}."


def _to_whom(by_client: pd.DataFrame) -> str:
    hit = by_client[by_client["sum"] > 0]
    total = many(len(by_client), "attacked client")
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
