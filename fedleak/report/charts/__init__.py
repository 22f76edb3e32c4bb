"""The charts of the report as Vega-Lite specifications, each with its message in a sentence and its table."""

from fedleak.report.charts.effort import effort_charts
from fedleak.report.charts.federation import federation_charts
from fedleak.report.charts.leak import leak_charts
from fedleak.report.charts.vega import Chart

__all__ = ["Chart", "effort_charts", "federation_charts", "leak_charts"]
