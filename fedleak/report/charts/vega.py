"""What the charts are made of: the chart itself, and the pieces of Vega-Lite specifications that they share.

Colours are names (``@good``) that the page replaces by those of the light or the dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.report.common import join
from fedleak.report.run_data import RunData

MOST_POINTS = 1500  # a scatter shows
MOST_MAPS = 8  # runs that get heat maps of their own
MOST_CELLS = 40  # clients (and rounds, classes) a heat map shows

Row = dict[str, Any]


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


FORMATS = {"x": ",", "y": ".2e", "objective": ".2e", "mse": ".2e", "limit": ".2e", "accuracy": ".1%", "share": ".0%"}
"""How a tooltip shows the numbers of a field; shares stand in the table as they do there."""


def chart(
    key: str,
    title: str,
    sentence: str,
    rows: Sequence[Row],
    fields: Mapping[str, str],
    spec: Mapping[str, Any],
    *,
    values: Sequence[Row] | None = None,
    formats: Mapping[str, str] | None = None,
) -> Chart:
    """A chart and its table.

    Args:
        rows: of the table.
        fields: the columns of the table, name in a row -> heading.
        spec: the specification without its data.
        values: the rows to draw, all of them if None.
        formats: as `FORMATS`, beyond it.
    """
    shares = {name: rule for name, rule in (FORMATS | dict(formats or {})).items() if rule.endswith("%")}
    table = [[format(row[name], shares[name]) if name in shares else row[name] for name in fields] for row in rows]
    data = {"data": {"values": rows if values is None else values}}
    return Chart(key, title, sentence, data | dict(spec), list(fields.values()), table)


# Of a logarithmic axis, the powers of ten alone.
_IS_DECADE = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-6"
_DECADES = {"condition": {"test": _IS_DECADE, "value": 1}, "value": 0}
LOG_AXIS = {
    "format": ".0e",
    "labelExpr": f"{_IS_DECADE} ? datum.label : ''",
    "labelOverlap": True,
    "tickOpacity": _DECADES,
}
POINT = {"type": "point", "filled": True, "size": 45, "opacity": 0.65}
RECT = {"type": "rect", "cornerRadius": 2, "stroke": "@surface", "strokeWidth": 2}


def quantity(field: str, title: str, **more: Any) -> Row:
    """The encoding of a number."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def logarithm(field: str, title: str, **scale: Any) -> Row:
    """The encoding of a positive number, a line of the grid for each power of ten."""
    return quantity(field, title, scale={"type": "log", **scale}, axis=LOG_AXIS | {"gridOpacity": _DECADES})


def ordinal(field: str, **axis: Any) -> Row:
    """The encoding of a number that only counts."""
    return {"field": field, "type": "ordinal", "title": field, **({"axis": axis} if axis else {})}


def threshold(channel: str, value: float = RECOVERED_MSE) -> Row:
    """A dashed line across, which tells the recovered images from the others."""
    rule = {"type": "rule", "strokeDash": [4, 4], "strokeWidth": 1.5, "color": "@ink"}
    return {"mark": rule, "encoding": {channel: {"datum": value}}}


def colour(runs: Sequence[RunData], otherwise: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A colour a run, the same in every chart; `otherwise` for a single run."""
    if len(runs) == 1:
        return dict(otherwise or {})
    legend = {"orient": "top", "title": None, "labelLimit": 170}
    scale = {"domain": [run.name for run in runs]}
    return {"color": {"field": "run", "type": "nominal", "scale": scale, "legend": legend}}


OUTCOME = {
    "color": {
        "field": "outcome",
        "type": "nominal",
        "scale": {"domain": ["recovered", "not recovered"], "range": ["@leak", "@faint"]},
        "legend": {"orient": "top", "title": None},
    }
}


def tips(fields: Mapping[str, str], formats: Mapping[str, str] | None = None) -> list[Row]:
    """The tooltip: name in a row -> what it is called."""
    kinds = FORMATS | dict(formats or {})
    return [
        {"field": name, "title": title, **({"format": kinds[name], "type": "quantitative"} if name in kinds else {})}
        for name, title in fields.items()
    ]


def cells(x: str, clients: Sequence[Any]) -> dict[str, Any]:
    """The axes of a heat map, and its height: `x` across, clients down."""
    height = len(clients) * (24 if len(clients) <= 16 else 14)
    return {"height": height, "encoding": {"x": ordinal(x, labelAngle=0, labelOverlap=True), "y": ordinal("client")}}


def by_round(
    key: str, title: str, sentences: Sequence[str], rows: list[Row], axis: str, rule: str, runs: Sequence[RunData]
) -> Chart:
    """A line with points over the rounds; `rule` is the format of the values."""
    rounds = sorted({row["round"] for row in rows})
    formats = {"value": ".1%" if rule == "%" else ".4~g"}
    fields = {"run": "run", "round": "round", "value": axis} | ({"of": "of"} if "of" in rows[0] else {})
    x_axis = {
        **({"values": rounds} if len(rounds) <= 10 else {"tickMinStep": 1}),  # of few, ticks would fall between
        "format": "d",
        "grid": False,
        "labelExpr": "datum.value < 1 ? '' : datum.label",  # there is no round 0
    }
    whole: dict[str, Any] = {"scale": {"domain": [0, 1]}} if rule == "%" else {}
    spec = {
        "mark": {"type": "line", "point": {"size": 45} if len(rounds) <= 60 else False, "strokeWidth": 2},
        "encoding": {
            "x": quantity("round", "round", axis=x_axis, scale={"zero": False, "nice": False, "padding": 12}),
            "y": quantity("value", axis, axis={"format": rule}, **whole),
            "tooltip": tips(fields, formats),
            **colour(runs),
        },
    }
    known = [row for row in rows if row["value"] is not None]
    return chart(key, title, join(sentences), known, fields, spec, values=rows, formats=formats)
