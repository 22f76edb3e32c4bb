"""The federation: utility and loss by round, and what data the clients trained on."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fedleak.report.charts import vega
from fedleak.report.common import many, percent, plain, said, short, thinned
from fedleak.report.run_data import RunData


def federation_charts(runs: Sequence[RunData]) -> list[vega.Chart]:
    """Utility and loss by round, and what data the clients trained on."""
    charts = []
    for column, title, axis, rule in (
        ("test_accuracy", "Test accuracy of the shared model, by round", "test accuracy", "%"),
        ("train_loss", "Training loss of the clients, by round", "mean training loss", ".2~f"),
    ):
        tables = {run.name: run.rounds[["round", column]].dropna() for run in runs}
        rows: list[vega.Row] = [
            {"run": name, "round": int(number), "value": plain(value)}
            for name, table in tables.items()
            for number, value in table.itertuples(index=False)
        ]
        if rows:
            sentences = [said(name, _course(table, column, rule), runs) for name, table in tables.items() if len(table)]
            charts.append(vega.by_round(column, title, sentences, rows, axis, rule, runs))
    maps = enumerate(runs[: vega.MOST_MAPS])
    return charts + [_classes(f"data-{index}", run, runs) for index, run in maps if run.data]


def _course(table: pd.DataFrame, column: str, rule: str) -> str:
    show = percent if rule == "%" else short
    first, last = (f"{show(row[column])} in round {row['round']:.0f}" for row in (table.iloc[0], table.iloc[-1]))
    return f"from {first} to {last}." if len(table) > 1 else f"{last}."


def _classes(key: str, run: RunData, runs: Sequence[RunData]) -> vega.Chart:
    """A heat map: classes across, clients down."""
    rows: list[vega.Row] = [
        {"client": client, "class": label, "images": count} for (client, label), count in sorted(run.data.items())
    ]
    table = pd.DataFrame(rows)
    clients = sorted(table["client"].unique())
    shown, left_out = thinned(clients, vega.MOST_CELLS, " clients")
    sizes = table.groupby("client")["images"].sum()
    largest = table.groupby("client")["images"].max() / sizes
    sentence = (
        f"{many(int(sizes.sum()), 'image')} trained on in all rounds together, by {many(len(clients), 'client')} in "
        f"{many(table['class'].nunique(), 'class', 'classes')}; the most frequent class of a client makes up "
        f"{percent(largest.mean())} of its images on average.{left_out}"
    )
    axes = vega.cells("class", shown)
    legend = {"orient": "top", "gradientLength": 140, "tickMinStep": 1}
    scale = {"range": ["@cool0", "@cool1"], "domainMin": 0}
    fields = {name: name for name in ("client", "class", "images")}
    more = {"color": vega.quantity("images", "images", scale=scale, legend=legend), "tooltip": vega.tips(fields)}
    spec = {"height": axes["height"], "mark": vega.RECT, "encoding": axes["encoding"] | more}
    values = [row for row in rows if row["client"] in shown]
    title = "What the clients trained on, by class" + (f": {run.name}" if len(runs) > 1 else "")
    return vega.chart(key, title, sentence, rows, fields, spec, values=values)
